"""Prompts that nothing can be generated for, and equal prompts."""

import random
import re

import pytest
from datasets import Dataset
from tiny import Seen, config, lora, make_dataset, make_model, make_tokenizer, make_trainer, online, parity_reward

from trl_learnalign import LearnAlignCallback, LearnAlignGRPOTrainer, LearnAlignSampler, select_prompts
from trl_learnalign.data.prompts import check_duplicates, check_prompts, equal_prompts, prompt_lengths


def user(content, **more):
    return {"role": "user", "content": content, **more}


def rows_of(prompts):
    return Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "", "b", ""], r"\(empty: rows 1, 3\)"),
        (["", "a"], r"\(empty: row 0\)"),
        (["a", None, ""], r"\(null: row 1; empty: row 2\)"),
        ([None, None], r"\(null: rows 0, 1\)"),
        ([""] * 2000, r"\(empty: rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 1,990 more\)"),
        ([[user("a")], [], [user("b")]], r"\(empty: row 1\)"),
        ([[user("a")], None], r"\(null: row 1\)"),
        ([[user("a")], [user("b"), user(None)]], r"\(a message without content: row 1\)"),
        ([[user("a")], [None]], r"\(a message without content: row 1\)"),
        ([[user("a", tool_calls=None)], [user(None, tool_calls=None)]], r"\(a message without content: row 1\)"),
    ],
)
def test_rows_are_named(prompts, message):
    with pytest.raises(ValueError, match=message + ".*leave them out"):
        check_prompts(rows_of(prompts))


@pytest.mark.parametrize(
    "dataset",
    [
        rows_of([" ", "a", "\n"]),
        rows_of([[user("")], [user("a")]]),  # the template adds tokens
        rows_of([[user(None, tool_calls=[{"name": "f"}])], [user("a", tool_calls=None)]]),
        rows_of([[user([{"type": "text", "text": "a"}])]]),
        Dataset.from_dict({"question": ["", None]}),
        Dataset.from_dict({"prompt": [[3, 4], [5]]}),  # tokens
    ],
)
def test_what_is_not_a_fault(dataset):
    check_prompts(dataset)


def test_faults_are_those_of_a_look_at_every_row():
    """In a dataset of several batches, also where its rows are picked from another."""
    draw = random.Random(0)
    kinds = [[user("a")], [user("a"), user("b")], [user("")], [], None, [user(None)], [None], [user("a"), None]]
    for trial in range(20):
        prompts = [draw.choice(kinds[: draw.choice([3, 8])]) for _ in range(1500)] if trial < 2 else None
        prompts = prompts or [draw.choice(kinds) for _ in range(5)] + [kinds[0]]
        dataset = rows_of(prompts)
        picked = [draw.randrange(len(prompts)) for _ in range(len(prompts))]
        for rows, whole in ((range(len(prompts)), dataset), (picked, dataset.select(picked))):
            faults = {"null": [], "empty": [], "a message without content": []}
            for row, index in enumerate(rows):
                prompt = prompts[index]
                if prompt is None:
                    faults["null"].append(row)
                elif prompt == []:
                    faults["empty"].append(row)
                elif any(message is None or message["content"] is None for message in prompt):
                    faults["a message without content"].append(row)
            if any(faults.values()):
                with pytest.raises(ValueError) as caught:
                    check_prompts(whole)
                for name, found in faults.items():
                    shown = ", ".join(map(str, found[:10])) + (
                        f" and {len(found) - 10:,} more" if len(found) > 10 else ""
                    )
                    assert (f"{name}: row{'s' * (len(found) > 1)} {shown}" in str(caught.value)) == bool(found)
            else:
                check_prompts(whole)


def test_a_trainer_refuses_them_before_it_loads_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"\(empty: row 1\). Correct these rows \(counted from 0\)"):
        LearnAlignGRPOTrainer(
            model="no-such-model",
            reward_funcs=parity_reward,
            train_dataset=rows_of(["1+1=", ""]),
            train_sampler=LearnAlignSampler(config()),
        )
    seen = Seen()
    for prompts, fault in ((["1+1="] * 7 + [""], "empty: row 7"), (["1+1=", None] * 4, "null: rows 1, 3, 5, 7")):
        stock = make_trainer(tmp_path, dataset=rows_of(prompts), reward=seen)
        with pytest.raises(ValueError, match=fault):
            LearnAlignCallback(stock, LearnAlignSampler(config()))
        with pytest.raises(ValueError, match=fault):
            select_prompts(stock, config())
    assert not seen.rows


def test_a_rollout_func_may_need_no_prompt(tmp_path):
    def own_rollouts(prompts, trainer):
        raise NotImplementedError

    trainer = LearnAlignGRPOTrainer(
        model=make_model(),
        reward_funcs=parity_reward,
        args=make_trainer(tmp_path).args,
        train_dataset=rows_of(["", "1+1=", "1+1="]),
        processing_class=make_tokenizer(),
        peft_config=lora(),
        rollout_func=own_rollouts,
        train_sampler=LearnAlignSampler(config(num_prompts=2)),
    )
    assert len(trainer.train_dataset) == 3


def test_equal_prompts_are_those_of_a_look_at_every_pair():
    draw = random.Random(1)
    kinds = (
        ["a", "b", "a ", "('a',)"],
        [[user("a")], [user("b")], [user("a"), user("a")], [{"role": "system", "content": "a"}]],
    )
    for texts in kinds:
        prompts = [draw.choice(texts) for _ in range(30)]
        dataset = rows_of(prompts)
        assert equal_prompts(dataset).tolist() == [prompts.index(prompt) for prompt in prompts]
        picked = list(range(29, -1, -2))
        rows = [prompts[index] for index in picked]
        assert equal_prompts(dataset.select(picked)).tolist() == [rows.index(prompt) for prompt in rows]
    many = [f"{i % 1700}" for i in range(2500)]  # over several batches
    assert equal_prompts(rows_of(many)).tolist() == [i % 1700 for i in range(2500)]
    assert equal_prompts(Dataset.from_dict({"question": ["a", "a"]})).tolist() == [0, 1]


def test_equal_texts_about_other_images_are_other_prompts():
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(np.full((2, 2), shade, np.uint8)) for shade in (0, 9, 0)]
    dataset = Dataset.from_dict({"prompt": [[user("what?")]] * 3, "image": pictures})
    assert equal_prompts(dataset).tolist() == [0, 1, 0]


TEN = [f"{i % 10}+1=" for i in range(60)]


def distinct_best(selection, number):
    """The learnable rows of the table, best first, and only the first of each prompt."""
    table = selection.to_pandas()
    table = table[~(table["learnability"] == 0)]
    prompts = [TEN[index] for index in table.index]
    return [index for place, index in enumerate(table.index) if TEN[index] not in prompts[:place]][:number]


@pytest.mark.parametrize("score", ["learnability", "random"])
def test_of_equal_prompts_the_best_is_chosen(tmp_path, score):
    """60 rows, 10 different prompts."""
    settings = {"reward": parity_reward, "dataset": rows_of(TEN)}
    choice = {"num_prompts": 40, "score": score}
    with pytest.warns(UserWarning, match="has 60 rows, but only 10 different prompts.*deduplicate=True"):
        plain = select_prompts(make_trainer(tmp_path / "plain", **settings), config(**choice))
    assert len(plain.indices) == 40 and len({TEN[index] for index in plain.indices}) <= 10
    trainer = make_trainer(tmp_path / "distinct", **settings)
    selection = select_prompts(trainer, config(**choice, deduplicate=True))
    assert selection.indices == distinct_best(plain, 40)
    assert len({TEN[index] for index in selection.indices}) == len(selection.indices) == 10
    table = selection.to_pandas()
    assert set(table.index[table["selected"]]) == set(selection.indices)
    assert "chosen 10" in selection.summary() and "(50 duplicates left out)" in selection.summary()
    assert selection.provenance["duplicates"] == sorted(set(range(60)) - set(selection.indices))
    fewer = selection.select(4)
    assert fewer.indices == distinct_best(plain, 4) and fewer.provenance["config"]["deduplicate"]
    with pytest.warns(
        UserWarning, match="`num_prompts` is 30, but the pool of 60 has only 10.* and different prompts"
    ):
        assert selection.select(30).indices == selection.indices
    small = config(**choice | {"num_prompts": 4}, deduplicate=True)
    assert select_prompts(make_trainer(tmp_path / "small", **settings), small).indices == fewer.indices


def test_training_on_different_prompts(tmp_path, caplog, recwarn):
    choice = config(num_prompts=20, warmup_prompts=4, score="learnability", deduplicate=True)
    trainer = make_trainer(tmp_path, choice, reward=parity_reward, dataset=rows_of(TEN), num_train_epochs=1)
    trainer.train()
    chosen = trainer._get_train_sampler().schedule.log[1].indices
    assert len(chosen) == len({TEN[index] for index in chosen}) == 10
    assert "Only 10 different prompts are learnable, fewer than `num_prompts` (20)" in caplog.text
    assert not [warning for warning in recwarn if "different prompts" in str(warning.message)]


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="`deduplicate=True` compares the column `prompt`.*only these: row"):
        check_duplicates(make_dataset().remove_columns("prompt"), True, warn=True)


# Rows as the trainer reads them -----------------------------------------------------------------------------------


RANDOM = random.Random(0)


def of_another_column(rows):
    return {"prompt": [f"0+{q}" if s == "a" else q for q, s in zip(rows["prompt"], rows["source"], strict=True)]}


def made(rows):
    return {"prompt": list(rows["question"]), "row": rows["row"]}


def augmented(rows):
    return rows | {"prompt": [f"{RANDOM.randrange(10)}+{prompt}" for prompt in rows["prompt"]]}


def as_read(kind):
    plain = make_dataset(24).add_column("source", ["a", "b"] * 12)
    match kind:
        case "reads another column":
            return plain.with_transform(of_another_column)
        case "makes the prompt":
            return plain.rename_column("prompt", "question").with_transform(made)
        case "is random":
            return plain.with_transform(augmented)
    return plain.with_format(kind)


KINDS = ["reads another column", "makes the prompt", "is random", "pandas", "numpy", "torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_with_a_transform_or_a_format_is_trained_on(tmp_path, kind):
    """With all that the online schedule asks of a dataset; and a selection. Once with reports, which take long."""
    settings, report = {"reward": parity_reward, "dataset": as_read(kind)}, kind == "reads another column"
    choice = {"prompt_features": True, "group_column": "source", "where": "row < 20", "deduplicate": True}
    choice = online(**choice, write_report=report)
    trainer = make_trainer(tmp_path / "online", choice, max_steps=3, **settings)
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "online/learnalign/report.html").is_file() == report
    lengths = {"reads another column": 6, "makes the prompt": 4, "is random": 6}
    assert prompt_lengths(trainer.train_dataset)[0] == lengths.get(kind, 4)
    choice = config(score="learnability", where="source == 'a'", write_report=report)
    selection = select_prompts(make_trainer(tmp_path / "select", **settings), choice)
    assert selection.indices and all(index % 2 == 0 for index in selection.indices)


def test_a_transform_is_asked_for_whole_rows_and_for_each_once():
    read = []

    def transform(rows):
        read.extend(rows["row"])
        return {"prompt": [f"{row % 7}+{kind}" for row, kind in zip(rows["row"], rows["kind"], strict=True)]}

    stored = Dataset.from_dict({"row": list(range(2500)), "kind": ["a", "bb"] * 1250})
    dataset = stored.with_transform(transform)
    check_prompts(dataset)
    expected = [f"{row % 7}+{'a' if row % 2 == 0 else 'bb'}" for row in range(2500)]
    assert equal_prompts(dataset).tolist() == [expected.index(prompt) for prompt in expected]
    assert prompt_lengths(dataset).tolist() == [len(prompt) for prompt in expected]
    assert read.count(1234) == 1  # and row 0 where only the names of the columns are asked for
    dataset.set_transform(lambda rows: {"prompt": ["same"] * len(rows["row"])})
    assert equal_prompts(dataset).tolist() == [0] * 2500


@pytest.mark.parametrize("prompts", [["a", "", None, "b"], [[user("a")], [], [user(None)], [None], [user("")], None]])
def test_faults_that_a_transform_makes_are_named_as_those_of_a_file(prompts):
    stored = rows_of(prompts)
    with pytest.raises(ValueError) as expected:
        check_prompts(stored)
    made = rows_of(["a"] * len(prompts)).with_transform(lambda rows: {"prompt": [prompts[row] for row in rows["row"]]})
    with pytest.raises(ValueError) as found:
        check_prompts(made)
    assert reasons(found) == reasons(expected)


def reasons(error):
    return set(re.search(r"generated for \((.*)\)\. Correct", str(error.value))[1].split("; "))


def test_a_column_that_only_a_transform_makes_is_told_of(tmp_path):
    dataset = make_dataset().with_transform(lambda rows: rows | {"kind": ["a"] * len(rows["row"])})
    with pytest.raises(
        ValueError, match=r"no column 'kind'.*a transform makes are not seen: write them with `dataset.map`"
    ):
        make_trainer(tmp_path, online(group_column="kind"), dataset=dataset)
