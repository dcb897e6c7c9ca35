"""What prompts are ranked on, and taken by: through real selections and real training runs."""

import pickle
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from tiny import Seen, config, digit_reward, make_dataset, make_trainer, online

from trl_learnalign import Selection, select_prompts
from trl_learnalign.cli.main import main as command
from trl_learnalign.data.columns import dataset_columns
from trl_learnalign.report import trackers
from trl_learnalign.scores import builtin as scores
from trl_learnalign.selection import rehearsal


ROWS = 24
select = Dataset.select


def graded(num=ROWS):
    """Rows with a grade, a source and a hint of their own; one grade is missing."""
    dataset = make_dataset(num)
    dataset = dataset.add_column("grade", [None if i == 5 else float((i * 7) % num) for i in range(num)])
    return dataset.add_column("source", ["web" if i % 3 == 0 else "book" for i in range(num)])


def shortest(table):
    return -table["completion_length_mean"]


def table_of(selection):
    return selection.scores.to_pandas().set_index("index")


def test_a_column_ranks_without_rollouts_and_training_follows(tmp_path):
    """Through training: the first prompts that are generated for are the chosen ones, the best first."""
    seen = Seen()
    settings = config(score="column:grade", warmup_prompts=0, prompt_order="ranked")
    trainer = make_trainer(tmp_path, settings, reward=seen, dataset=graded(), num_train_epochs=1)
    trainer.train()
    grades = pd.Series(trainer.train_dataset["grade"], dtype=float)
    expected = grades.sort_values(ascending=False).index[:8].tolist()
    selection = Selection.load(tmp_path / "learnalign/step-000000")
    assert selection.indices == expected and seen.rows[:: trainer.num_generations] == expected
    table = table_of(selection)
    assert table["score"].equals(grades.rename("score").rename_axis("index")) and not table.loc[5, "eligible"]
    assert table["success_rate"].isna().all() and selection.measures == ()
    assert "chosen 8 by column:grade" in selection.summary()


@pytest.mark.parametrize("score", ["function", "text"])
def test_a_function_ranks_what_was_measured(tmp_path, score):
    file = tmp_path / "mine.py"
    file.write_text("def shortest(table):\n    return -table['completion_length_mean']\n")
    score = shortest if score == "function" else f"{file}:shortest"
    trainer = make_trainer(tmp_path, dataset=graded())
    selection = select_prompts(trainer, config(score=score, score_measures=["rollouts"]))
    table = table_of(selection)
    assert (table["score"] == -table["completion_length_mean"]).all()
    assert (table["eligible"] == (table["learnability"] > 0)).all()
    best = table[table["eligible"]].sort_values("score", ascending=False)["score"].head(8)
    assert table.loc[selection.indices, "score"].tolist() == best.tolist()
    assert selection.measures == ("rollouts",) and table["alignment"].isna().all()


def test_a_file_with_the_name_of_a_module_replaces_nothing(tmp_path):
    import statistics

    from trl_learnalign.cli.build import load_reward

    file = tmp_path / "statistics.py"
    file.write_text("def f(*args, **kwargs):\n    return 'mine'\n")
    loaded = scores.load_function(f"{file}:f"), load_reward(f"{file}:f")
    assert sys.modules["statistics"] is statistics and [function() for function in loaded] == ["mine"] * 2


@pytest.mark.parametrize("load", ["score", "reward"])
def test_a_file_that_fails_is_told_with_its_line(tmp_path, load):
    from trl_learnalign.cli.build import load_reward

    file = tmp_path / "broken.py"
    file.write_text("limit = 3\nleast = limitt\n")
    with pytest.raises(ValueError, match=r"The file of the .*broken.py:f' failed in line 2: NameError"):
        config(score=f"{file}:f") if load == "score" else load_reward(f"{file}:f")


@pytest.mark.parametrize("measures", [["rollouts"], ["gradients"]])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda table: table[["success_rate"]], "a DataFrame without a column `score`, but with success_rate"),
        (lambda table: 3.0, "The score returned 3.0, but must return a number for each row"),
        (lambda table: None, "The score returned None, but must"),
        (lambda table: [1.0] * 5, "returned 5 values for 24 prompts"),
    ],
)
def test_a_function_that_returns_no_score_is_told(tmp_path, measures, returned, message):
    with pytest.raises(ValueError, match=message):
        select_prompts(make_trainer(tmp_path), config(score=returned, score_measures=measures))


def test_a_function_may_return_rows_in_any_order_with_more_columns(tmp_path):
    def shuffled(table):
        return table.assign(score=table.index * 1.0, mine=1)[::-1]

    trainer = make_trainer(tmp_path)
    table = table_of(select_prompts(trainer, config(score=shuffled, score_measures=["gradients"])))
    assert table["score"].tolist() == list(range(ROWS)) and "mine" not in table
    assert table["alignment"].notna().any()


def test_a_function_of_gradients_and_columns(tmp_path):
    """It sees what LearnAlign ranks on, and the dataset's own columns."""
    names = []

    def most_alike(table):
        names.extend(table.columns)
        return table["alignment"] + 10 * (table["source"] == "web")

    kwargs = {"dataset": graded(), "loss_type": "grpo"}
    trainer = make_trainer(tmp_path / "mine", **kwargs)
    mine = table_of(select_prompts(trainer, config(score=most_alike, score_measures=["gradients"])))
    theirs = table_of(select_prompts(make_trainer(tmp_path / "theirs", **kwargs), config()))
    for column in ("alignment", "gradient_norm", "learnability"):
        assert mine[column].equals(theirs[column])
    assert {"grade", "source", "prompt", "success_rate", "alignment"} <= set(names) and "score" not in names
    web = [i for i in mine.index[mine["selected"]] if i % 3 == 0]
    assert len(web) == min(8, (mine["eligible"] & (mine.index % 3 == 0)).sum())


def test_a_score_from_outside_is_one_entry(tmp_path, monkeypatch):
    """As a contributor adds one: one function in one dict."""
    toy = scores.Score(("rollouts",), lambda table, align: -(table["success_rate"] - 0.75).abs())
    monkeypatch.setitem(scores.SCORES, "toy", toy)
    table = table_of(select_prompts(make_trainer(tmp_path), config(score="toy")))
    assert table["score"].tolist() == (-(table["success_rate"] - 0.75).abs()).tolist()


def test_groups_of_equal_graded_rewards_are_never_chosen(tmp_path):
    """Though one of each group could not be scored: the mean of seven equal rewards may be off in the last digit."""

    def reward(completions, row, **kwargs):
        rewards = [1.7 * (place % 2) if r in (3, 8) else (r + 1) / 30 for place, r in enumerate(row)]
        return [None if place % 8 == 0 else value for place, value in enumerate(rewards)]

    settings = config(score="learnability", learnability="variance")
    selection = select_prompts(make_trainer(tmp_path, reward=reward, num_generations=8), settings)
    assert sorted(selection.indices) == [3, 8] and selection.num_learnable() == 2


def test_a_condition_on_the_dataset_saves_rollouts(tmp_path):
    seen = Seen(digit_reward)
    trainer = make_trainer(tmp_path, reward=seen, dataset=graded())
    selection = select_prompts(trainer, config(score="learnability", where="source == 'web' and grade > 3"))
    rows = {i for i in range(ROWS) if i % 3 == 0 and (i * 7) % ROWS > 3}
    assert set(seen.rows) == rows == set(selection.scores["index"].to_pylist())
    assert set(selection.indices) <= rows


def test_a_condition_on_what_was_measured(tmp_path):
    settings = config(score="learnability", where="success_rate < .5 and source == 'book'", num_prompts=ROWS)
    with pytest.warns(match="num_prompts"):
        selection = select_prompts(make_trainer(tmp_path, dataset=graded(20)), settings)
    table = table_of(selection)
    expected = (table["learnability"] > 0) & (table["success_rate"] < 0.5) & (table.index % 3 != 0)
    assert len(table) == 20 and table["eligible"].equals(expected.rename("eligible"))
    assert set(selection.indices) == set(table.index[expected])


def test_a_condition_on_a_name_of_a_column_and_a_measure_is_refused(tmp_path):
    """As a dataset that a selection has written has it: the two would be mixed up."""
    dataset = graded().add_column("success_rate", [0.5] * ROWS)
    trainer = make_trainer(tmp_path, dataset=dataset)
    with pytest.raises(ValueError, match="'success_rate' is both a column of the training dataset and measured"):
        select_prompts(trainer, config(score="learnability", where="success_rate < .5"))
    settings = config(score="column:grade", where="success_rate < .6")  # nothing is measured
    assert len(select_prompts(trainer, settings).indices) == 8


def test_a_condition_on_the_score(tmp_path):
    settings = config(score="learnability", where="score > .2 and source == 'book'", num_prompts=ROWS)
    table = table_of(select_prompts(make_trainer(tmp_path, dataset=graded()), settings))
    assert table["eligible"].equals(((table["score"] > 0.2) & (table.index % 3 != 0)).rename("eligible"))
    assert 0 < table["eligible"].sum() < (table["score"] > 0.2).sum()


@pytest.mark.parametrize("quota", ["proportional", "equal"])
def test_quotas(tmp_path, quota):
    settings = config(score="learnability", num_prompts=6, quota_column="source", quota=quota)
    selection = select_prompts(make_trainer(tmp_path, dataset=graded()), settings)
    table = table_of(selection)
    eligible = Counter("web" if i % 3 == 0 else "book" for i in table.index[table["eligible"]])
    assert min(eligible.values()) >= 4  # else this test shows nothing
    shares = {"web": 2, "book": 4} if quota == "proportional" else {"web": 3, "book": 3}
    assert Counter(table.loc[selection.indices, "quota_group"]) == shares
    for source, number in shares.items():  # the best of each
        ranked = table[(table["quota_group"] == source) & table["eligible"]].sort_values("rank")
        assert set(ranked.index[:number]) <= set(selection.indices)
    smaller = Selection.load(tmp_path / "learnalign/step-000000").select(3)
    assert len(smaller.indices) == 3 and len(set(table.loc[smaller.indices, "quota_group"])) == 2


def test_a_draw_in_proportion(tmp_path):
    settings = {"score": "learnability", "take": "proportional"}
    first, again, other = (
        select_prompts(make_trainer(tmp_path / name), config(**settings, selection_seed=seed))
        for name, seed in (("0", 3), ("1", 3), ("2", 4))
    )
    assert first.indices == again.indices and set(first.indices) != set(other.indices)
    assert all(table_of(first).loc[i, "learnability"] > 0 for i in first.indices)


def test_folding_goes_through_rising_scores_again_and_again(tmp_path):
    """DELT: positions 0, 3, 6, then 1, 4, 7, then 2, 5, counted from the lowest score, in every epoch."""
    seen = Seen()
    settings = config(score="column:grade", warmup_prompts=0, prompt_order="folding", fold=3)
    trainer = make_trainer(tmp_path, settings, reward=seen, dataset=graded(), num_train_epochs=2)
    trainer.train()
    ranked = Selection.load(tmp_path / "learnalign/step-000000").indices
    rising = sorted(ranked, key=lambda row: graded()["grade"][row])
    assert rising == ranked[::-1]
    folded = [rising[position] for position in (0, 3, 6, 1, 4, 7, 2, 5)]
    assert seen.rows[:: trainer.num_generations] == folded * 2


def test_rows_of_the_command_line(tmp_path, capsys):
    from tiny import make_model, make_tokenizer

    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    graded().to_json(tmp_path / "rows.jsonl")
    (tmp_path / "rewards.py").write_text("def zero(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    command(
        f"select --dataset_name {tmp_path}/rows.jsonl --model_name_or_path {tmp_path}/policy --reward_funcs "
        f"{tmp_path}/rewards.py:zero --output_dir {tmp_path}/run --score column:grade --num_prompts 4 --use_cpu "
        "--bf16 false --report_to none --write_report false --where grade<20".split()
    )
    assert Selection.load(tmp_path / "run/learnalign/step-000000").indices == [
        i
        for _, i in sorted(((i * 7 % ROWS, i) for i in range(ROWS) if i != 5 and i * 7 % ROWS < 20), reverse=True)[:4]
    ]


@pytest.mark.parametrize("form", ["series", "frame", "list"])
def test_scores_are_matched_by_row_whatever_their_order(tmp_path, form):
    """
    A Series that was sorted on the way belongs to the rows that its index names; a list is in the order of the table.
    """

    def by_grade(table):
        grades = table["grade"]
        if form == "list":
            return grades.tolist()
        turned = grades.sort_values(ascending=False)
        return turned if form == "series" else turned.to_frame("score")

    trainer = make_trainer(tmp_path, dataset=graded())
    table = table_of(select_prompts(trainer, config(score=by_grade, where="source == 'book'")))
    assert len(table) == 16  # so that the rows are not numbered from 0
    grades = pd.Series(trainer.train_dataset["grade"], dtype=float)
    assert table["score"].dropna().tolist() == grades[table.index].dropna().tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "column:mark"}, "no column 'mark'. Its columns are: prompt, row, grade, source"),
        ({"score": "column:source"}, "the column 'source' holds no numbers"),
        ({"where": "mark > 3"}, "`where` is 'mark > 3', but the training dataset has no column 'mark'"),
        ({"where": "success_rate > 3", "score": "column:grade"}, "no column 'success_rate'"),
        ({"where": "grade > 99"}, "holds for no row"),
        ({"where": "source > 3"}, "cannot be compared"),
        ({"quota_column": "mark"}, "`quota_column` is 'mark', but .* no column 'mark'"),
        ({"score": lambda table: [1.0]}, "returned 1 values for 24 prompts"),
        ({"score": lambda table: table["source"]}, "not a number for every prompt"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        select_prompts(make_trainer(tmp_path, dataset=graded()), config(**{"score": "learnability"} | settings))


def reads_a_file(table):
    return pd.read_csv("not/yet/there.csv")["score"]


def misspells(table):
    return table["sucess_rate"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": "completion_length_mean < '800'"}, "cannot be compared"),
        ({"where": "score > 'x'", "score": "learnalign"}, "cannot be compared"),
        ({"score": misspells, "score_measures": ["rollouts"]}, r"misspells failed .*line \d+\): KeyError: 'sucess"),
        ({"score": lambda table: 1 / 0, "score_measures": ["gradients"]}, "made-up measurements.*ZeroDivisionError"),
        ({"score": lambda table: ["a"] * len(table), "score_measures": ["gradients"]}, "not a number for every"),
    ],
)
def test_what_cannot_be_is_known_before_the_warm_up(tmp_path, settings, message):
    """When the trainer is made: nothing was trained or rolled out that could be lost."""
    seen = Seen()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, config(**settings), reward=seen, dataset=graded())
    assert not seen.rows


@pytest.mark.parametrize(("name", "measure"), [("alignment", "gradients"), ("success_rate", "rollouts")])
def test_a_column_with_the_name_of_a_measure_is_refused_for_a_function(tmp_path, name, measure):
    dataset = graded().add_column(name, [0.5] * ROWS)
    settings = config(score=lambda table: table[name], score_measures=[measure])
    with pytest.raises(ValueError, match=f"'{name}' is both a column of the training dataset and measured"):
        make_trainer(tmp_path, settings, dataset=dataset)
    select_prompts(make_trainer(tmp_path, dataset=dataset), config(score=lambda table: table[name]))


def test_a_function_that_needs_a_file_of_the_warm_up_is_only_warned_of(tmp_path, caplog):
    make_trainer(tmp_path, config(score=reads_a_file), dataset=graded())
    assert "made-up measurements" in caplog.text and "If it will be right" in caplog.text


def test_functions_of_any_kind_pass_the_rehearsal(tmp_path, monkeypatch):
    """Quantiles, groups, as many values as the pool has rows; of a large pool a part, whose failure is no error."""
    fixed = list(range(ROWS))

    def spread(table):
        best = table["success_rate"].quantile(0.9) - table.groupby("source")["alignment"].transform("mean")
        return (best + table["completion_length_mean"].rank() + np.random.rand(len(table)) + fixed).where(
            table["learnability"] > 0
        )

    before = np.random.get_state()[1].tolist()
    settings = config(score=spread, score_measures=["gradients"], where="success_rate <= 1 and alignment > -2")
    make_trainer(tmp_path, settings, dataset=graded())
    state = np.random.get_state()[1].tolist()
    make_trainer(tmp_path, config(), dataset=graded())
    assert np.random.get_state()[1].tolist() == state and len(before) == len(state)
    monkeypatch.setattr(rehearsal, "MOST_ROWS", 5)
    make_trainer(tmp_path, settings, dataset=graded())


def test_a_file_that_changes_counts_for_the_next_configuration(tmp_path):
    """The function of a run is the one that its configuration was made with, like a reward function."""
    file = tmp_path / "mine.py"
    file.write_text("def rank(table):\n    return table['grade']\n")
    first = config(score=f"{file}:rank")
    file.write_text("def rank(table):\n    return -table['grade']\n")
    second = config(score=f"{file}:rank")
    file.unlink()
    found = [
        table_of(select_prompts(make_trainer(tmp_path, dataset=graded()), one))["score"] for one in (first, second)
    ]
    assert found[0].dropna().equals(-found[1].dropna())
    assert pickle.loads(pickle.dumps(config(score="learnability"))) == config(score="learnability")


def test_a_resumed_run_ranks_again_and_rolls_nothing_out_again(tmp_path, monkeypatch):
    """Killed after a selection by a function of one's own, before a checkpoint holds it."""
    seen = Seen(digit_reward)
    settings = config(score=misspelt_no_more, score_measures=["gradients"], warmup_prompts=4, num_prompts=4)
    kwargs = {"reward": seen, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    measures = tmp_path / "_learnalign"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trackers, "log_values", killed)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, settings, **kwargs).train()
    before = len(seen.rows)
    assert list(measures.glob("step-*"))
    trainer = make_trainer(tmp_path, settings, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    trained = (
        trainer.state.max_steps - min(one.provenance["global_step"] for one in trainer.learnalign.selections)
    ) * 16
    assert len(seen.rows) - before == trained and trainer.learnalign.selections[0].indices
    assert not list(measures.glob("step-*"))


def misspelt_no_more(table):
    return table["success_rate"]


def test_nothing_eligible_says_why(tmp_path, caplog):
    nothing = config(score=lambda table: np.full(len(table), np.nan))
    selection = select_prompts(make_trainer(tmp_path, dataset=graded()), nothing)
    assert selection.indices == [] and "0 are eligible" in caplog.text


def nested(num=ROWS):
    """As a dataset of verl: fields of columns, and names that are none of Python."""
    dataset = graded(num).add_column("extra", [{"level": i % 4, "split": "ab"[i % 2]} for i in range(num)])
    dataset = dataset.add_column("problem-type", ["algebra" if i < 12 else "other" for i in range(num)])
    return dataset.add_column("easy", [i % 3 > 0 for i in range(num)])


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("extra.level in [1, 2]", [i for i in range(ROWS) if i % 4 in (1, 2)]),
        ("`problem-type` == 'algebra' and not easy", [0, 3, 6, 9]),
    ],
)
def test_a_condition_names_any_column(tmp_path, where, rows):
    selection = select_prompts(make_trainer(tmp_path, dataset=nested()), config(score="column:row", where=where))
    assert selection.scores["index"].to_pylist() == rows and selection.indices == rows[::-1][:8]


def test_fields_rank_and_divide_as_columns_do(tmp_path):
    choice = config(score="column:extra.level", quota_column="extra.split", quota="equal")
    selection = select_prompts(make_trainer(tmp_path, dataset=nested()), choice)
    table = table_of(selection).loc[selection.indices]
    assert Counter(table["quota_group"]) == {"a": 4, "b": 4} and set(table["score"]) == {2.0, 3.0}


@pytest.mark.parametrize("schedule", ["staged", "online"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("source != 3", "`source` holds texts, and 3 is a number"),
        ("extra != 'a'", "`extra` holds nested values"),
        ("extra.levle < 3", "no column 'extra.levle'.*The fields of 'extra' are: level, split"),
        ("grade", "`grade` holds numbers, and only one of True and False"),
        ("grade > 99", "holds for no row"),
    ],
)
def test_a_condition_is_tried_before_the_first_step(tmp_path, schedule, where, message):
    """When the trainer is built, though a selection comes after the warm-up."""
    choice = config(where=where) if schedule == "staged" else online(where=where)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, choice, dataset=nested(), max_steps=6)


def test_a_condition_on_a_measure_is_tried_before_the_first_rollout(tmp_path):
    seen = Seen()
    trainer = make_trainer(tmp_path, reward=seen, dataset=nested())
    with pytest.raises(ValueError, match="`completion_length_mean` holds numbers, and '800' is a text"):
        select_prompts(trainer, config(score="learnability", where="completion_length_mean < '800' and easy"))
    assert not seen.rows


@pytest.mark.parametrize("knob", ["quota_column", "group_column"])
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("odd", [{"a": i % 2} for i in range(ROWS)], "'odd', which is nested.*or a field such as `odd.a`"),
        ("odd", [[i % 2] for i in range(ROWS)], "'odd', which is nested"),
        ("odd", [i % 4 / 4 for i in range(ROWS)], "'odd', which holds fractions such as 0.25.*a few bins"),
        ("odd", list(range(ROWS)), "'odd', but each of the 24 rows has another value"),
        ("even", [0] * ROWS, "has no column 'odd'"),
    ],
)
def test_what_are_no_groups_is_refused(tmp_path, knob, column, values, message):
    choice = config(quota_column="odd") if knob == "quota_column" else online(group_column="odd")
    with pytest.raises(ValueError, match=f"`{knob}` is .*{message}"):
        make_trainer(tmp_path, choice, dataset=make_dataset().add_column(column, values), max_steps=6)


def test_whole_numbers_are_groups_whatever_their_type(tmp_path):
    """A column of whole numbers with a gap is one of floats where it comes from CSV."""
    dataset = make_dataset().add_column("level", [None if i == 3 else float(i % 3) for i in range(ROWS)])
    make_trainer(tmp_path, online(group_column="level"), dataset=dataset, max_steps=6)
    make_trainer(tmp_path, config(quota_column="level"), dataset=dataset, max_steps=6)


def test_a_missing_value_and_an_empty_text_are_two_quota_groups(tmp_path):
    dataset = make_dataset().add_column("kind", [("", None, "a")[i % 3] for i in range(ROWS)])
    choice = config(score="column:row", quota_column="kind", quota="equal", num_prompts=6)
    selection = select_prompts(make_trainer(tmp_path, dataset=dataset), choice)
    assert Counter(i % 3 for i in selection.indices) == {0: 2, 1: 2, 2: 2}


def test_columns_of_most_rows_are_not_read_row_by_row(tmp_path, monkeypatch):
    """Which takes a million rows a quarter of a minute, on every process."""
    dataset, picked = graded(100), []
    monkeypatch.setattr(Dataset, "select", lambda self, rows: picked.append(len(rows)) or select(self, rows))
    for rows in (range(100), [i for i in range(100) if i != 7], [99, 3, 0], [3]):
        table = dataset_columns(dataset, rows, None)
        assert table.index.tolist() == list(rows) and table["row"].tolist() == list(rows)
    assert picked == [3, 1]
