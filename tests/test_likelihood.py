"""The likelihood of the right answers, against one forward for each prompt; and a score whose price is a forward."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny import config, grpo_args, make_model, make_trainer

from trl_learnalign import Selection, select_prompts
from trl_learnalign.host import Host
from trl_learnalign.measures import forwards, likelihood
from trl_learnalign.report.cards import dataset_card
from trl_learnalign.selection.dry_run import plan_selection


SETTINGS = {"score": "confidence", "answer_column": "answer"}


def rows_with_answers(num=24, conversational=False):
    """Sums with answers of different lengths, after prompts of different lengths."""
    texts = ["+".join(str(i * j % 10) for j in range(2 + i % 4)) + f"+{i}=" for i in range(num)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    return Dataset.from_dict({"prompt": prompts, "answer": [str(7 ** (i % 5)) for i in range(num)], "row": range(num)})


def one_by_one(trainer, dataset):
    """s of every row: a forward without padding, a log-softmax of all of its logits."""
    model, tokenizer, found = trainer.model.eval(), trainer.processing_class, []
    for row in dataset:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(str(row["answer"]), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0].float()
        total = 0.0
        for place, token in enumerate(answer_ids, len(prompt_ids)):
            total += torch.log_softmax(logits[place - 1], 0)[token].item()
        found.append(np.exp(total / len(answer_ids)))
    model.train()
    return np.array(found)


def never_called(completions, **kwargs):
    raise AssertionError("nothing is to be rolled out")


def trainer_of(path, dataset=None, **changes):
    changes = {"model": make_model(attention_dropout=0.5), "reward": never_called} | changes
    return make_trainer(path, dataset=rows_with_answers() if dataset is None else dataset, **changes)


@pytest.mark.parametrize("conversational", [False, True])
def test_confidence_is_that_of_one_forward_for_each_prompt(tmp_path, monkeypatch, conversational):
    """In batches of several lengths, with halving where memory is full; and a killed selection goes on."""
    monkeypatch.setattr(likelihood, "WINDOW", 10)
    monkeypatch.setattr(forwards, "MOST_TOKENS", 90)
    dataset = rows_with_answers(conversational=conversational)
    trainer = trainer_of(tmp_path, dataset)
    sizes, left, run = [], [2], likelihood._AnswerForward.run

    def counted(self, sequences):
        sizes.append(len(sequences) * max(map(len, sequences)))
        if sizes[-1] > 24:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, sequences)

    def killed(*args, original=forwards.fill):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(likelihood._AnswerForward, "run", counted)
    with monkeypatch.context() as patch:
        patch.setattr(forwards, "fill", killed)
        with pytest.raises(KeyboardInterrupt):
            select_prompts(trainer, config(**SETTINGS))
    assert sum(size > 24 for size in sizes) == 1  # what did not fit is not tried again
    done, state = len(sizes), torch.get_rng_state()
    selection = select_prompts(trainer, config(**SETTINGS))
    assert len(sizes) - done < done and torch.equal(torch.get_rng_state(), state)
    table = selection.scores.to_pandas().set_index("index")
    expected = one_by_one(trainer, dataset)
    np.testing.assert_allclose(table["answer_likelihood"], expected, rtol=1e-5)
    assert len(set(expected.round(4))) > 10
    np.testing.assert_allclose(table["score"], 1 - (expected - expected.mean()) ** 2, rtol=1e-5)
    assert selection.indices == table["score"].sort_values(ascending=False).index[:8].tolist()
    assert table["eligible"].all() and table[["success_rate", "learnability", "alignment"]].isna().all(axis=None)


@pytest.mark.parametrize("kind", ["text", "messages", "with a system message"])
def test_pvi_is_what_the_prompt_tells_of_the_answer(tmp_path, caplog, kind):
    """Against a forward for each prompt, with and without its words, and log-probabilities summed one by one."""
    dataset = rows_with_answers(conversational=kind != "text")
    if kind == "with a system message":
        dataset = dataset.map(lambda row: {"prompt": [{"role": "system", "content": "1+1"}, *row["prompt"]]})
    trainer = trainer_of(tmp_path, dataset)
    selection = select_prompts(trainer, config(score="pvi", answer_column="answer"))
    table = selection.scores.to_pandas().set_index("index")

    def without_words(row):
        if kind == "text":
            return {"prompt": trainer.processing_class.eos_token}
        return {"prompt": [*row["prompt"][:-1], {"role": "user", "content": ""}]}

    given, alone = one_by_one(trainer, dataset), one_by_one(trainer, dataset.map(without_words))
    np.testing.assert_allclose(table["answer_likelihood"], given, rtol=1e-5)
    np.testing.assert_allclose(table["answer_likelihood_alone"], alone, rtol=1e-5)
    tokens = [
        len(trainer.processing_class(answer, add_special_tokens=False)["input_ids"]) for answer in dataset["answer"]
    ]
    bits = np.array(tokens) * (np.log2(given) - np.log2(alone))
    np.testing.assert_allclose(table["score"], bits, rtol=1e-3, atol=1e-4)
    assert selection.indices == table["score"].sort_values(ascending=False).index[:8].tolist() and len(set(tokens)) > 2
    assert f"{(table['score'] <= 0).sum()} of 24 answers are at least as likely without their prompt" in caplog.text
    some = config(score="pvi", answer_column="answer", where="prompt_information > 0", num_prompts=24)
    assert set(select_prompts(trainer, some).indices) == set(table.index[table["prompt_information"] > 0])


def test_the_forward_is_made_once_and_known_by_its_answers(tmp_path, monkeypatch):
    forwards_made = []

    def counted(self, sequences, original=likelihood._AnswerForward.run):
        forwards_made.append(len(sequences))
        return original(self, sequences)

    monkeypatch.setattr(likelihood._AnswerForward, "run", counted)
    dataset = rows_with_answers()
    first = select_prompts(trainer_of(tmp_path, dataset), config(**SETTINGS))
    assert sum(forwards_made) == 24
    least = config(
        score=lambda table: -table["answer_likelihood"], score_measures=["likelihood"], answer_column="answer"
    )
    assert select_prompts(trainer_of(tmp_path, dataset), least).indices[0] == (
        first.scores.to_pandas().set_index("index")["answer_likelihood"].idxmin()
    )
    assert sum(forwards_made) == 24
    other = dataset.add_column("other", list(range(24)))
    select_prompts(trainer_of(tmp_path, other), config(**SETTINGS | {"answer_column": "other"}))
    assert sum(forwards_made) == 48


def test_what_is_said_of_a_selection_without_rollouts(tmp_path, capsys, caplog):
    """Dry run, plan, summary, warnings, report and plot speak of forwards, and of nothing that was not measured."""
    choice = config(**SETTINGS, warmup_prompts=0, write_report=True, reselect_every=1)
    text, possible = plan_selection(trainer_of(tmp_path), choice)
    assert possible and "pool: 24 prompts, a forward over each\n" in text
    assert "rollouts: none" in text and "likelihoods" in text
    assert "learnable" not in text and "warning" not in text and " x " not in text
    trainer = make_trainer(tmp_path, choice, dataset=rows_with_answers(), max_steps=4)
    trainer.train()
    out = capsys.readouterr().out
    assert "over the selected prompts: 24 prompts, a forward over each." in out
    assert "selecting, 24 prompts, a forward" in out
    assert "pool 24; chosen 8 by confidence; likelihoods" in out
    assert "learnable" not in caplog.text + out
    selection = Selection.load(tmp_path / "learnalign/step-000000")
    assert selection.measures == ("likelihood",) and selection.provenance["unscorable"] == []
    page = (tmp_path / "learnalign/report.html").read_text()
    rows = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    labels = [column["label"] for column in rows["columns"]]
    assert "answer likelihood" in labels and "success rate" not in labels and "chosen by confidence" not in labels
    # Of two selections: their prompts and what was measured, in enough digits, and nothing of rollouts
    stages = page.partition('id="stages"')[2].partition("<h2")[0]
    assert (
        "also chosen before" in stages
        and "learnable" not in stages
        and "nan" not in stages + page.partition('id="figures"')[2].partition("data:")[0]
    )
    assert {file.name for file in (tmp_path / "learnalign/figures").iterdir()} == {"seconds.png"}
    ends = page.partition('id="why"')[2].partition("<h2")[0]
    assert "answer likelihood" in ends and "completion" not in ends and "its reward" not in ends
    last = Selection.load(max((tmp_path / "learnalign").glob("step-*")))
    table, number = last.to_pandas(), {column["key"]: place for place, column in enumerate(rows["columns"])}
    for key in ("score", "answer_likelihood"):
        values = [row[number[key]] for row in rows["rows"]]
        assert len(set(values)) == table[key].nunique() > 10
        assert values == pytest.approx(table[key].tolist(), abs=10.0 ** -rows["columns"][number[key]]["digits"])
    digits = rows["columns"][number["score"]]["digits"]
    assert digits > 5 and f"{table['score'].iloc[0]:.{digits}f}" in ends and len(last.indices) == 8
    card = dataset_card(last, "rows.jsonl")
    assert "`success_rate`, which is null" in card and "rollouts" not in card.partition("| setting")[0]
    assert "no prompt could be scored" not in " ".join(text.get_text() for text in selection.plot().axes[0].texts)
    assert selection.select(30).indices != []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_column": None}, "`answer_column` is not set"),
        ({"answer_column": "solution"}, "has no column 'solution'"),
        ({"answer": ["1", None, "", "4"] * 6}, r"missing: row 1, 5.*empty: row 2, .*dataset.filter"),
        ({"answer": [["1", "2"]] * 24}, "neither a text nor a number: row 0, 1"),
        ({"image": ["x"] * 24}, "the training dataset has images"),
    ],
)
def test_what_has_no_likelihood_is_refused_before_anything_is_computed(tmp_path, changes, message):
    settings = {name: changes[name] for name in changes if name == "answer_column"}
    dataset = rows_with_answers()
    for name in changes.keys() - settings.keys():
        kept = dataset.remove_columns(name) if name in dataset.column_names else dataset
        dataset = kept.add_column(name, changes[name])
    trainer = trainer_of(tmp_path, dataset)
    with pytest.raises(ValueError, match=message):
        select_prompts(trainer, config(**SETTINGS | settings))


def test_numbers_are_answers_and_rows_without_one_may_be_left_out(tmp_path):
    answers = pd.Series([float(i % 9) if i % 3 else None for i in range(24)])
    dataset = Dataset.from_pandas(pd.DataFrame({"prompt": rows_with_answers()["prompt"], "answer": answers}))
    trainer = trainer_of(tmp_path, dataset)
    selection = select_prompts(trainer, config(**SETTINGS, where="answer is not None"))
    assert selection.scores["index"].to_pylist() == [i for i in range(24) if i % 3]
    expected = one_by_one(trainer, dataset.filter(lambda row: row["answer"] is not None))
    np.testing.assert_allclose(selection.scores["answer_likelihood"], expected, rtol=1e-5)
    assert grpo_args(tmp_path).temperature == 1.0


@pytest.mark.parametrize("name", ["answer", "extra.answer"])
def test_whole_numbers_stay_whole_beside_rows_without_an_answer(tmp_path, monkeypatch, name):
    """And so the tokens are those of "7", not those of "7.0"."""
    answers, texts = [None if i % 3 == 0 else i % 9 for i in range(24)], []
    dataset = rows_with_answers().remove_columns("answer")
    if name == "answer":
        dataset = dataset.add_column("answer", answers)
    else:
        dataset = dataset.add_column("extra", [{"answer": answer} for answer in answers])
    text_ids = Host.text_ids
    monkeypatch.setattr(Host, "text_ids", lambda host, given: [texts.extend(given), text_ids(host, given)][1])
    settings = SETTINGS | {"answer_column": name, "where": f"{name} is not None"}
    select_prompts(trainer_of(tmp_path, dataset), config(**settings))
    assert texts == [str(answer) for answer in answers if answer is not None]
