"""Candidates by cheaper scores, one after another, before the score that needs rollouts."""

import json
import tracemalloc

import pytest
from datasets import Dataset
from test_likelihood import one_by_one, rows_with_answers
from tiny import Seen, config, make_trainer, parity_reward

from trl_learnalign import LearnAlignConfig, Selection, select_prompts
from trl_learnalign.measures import forwards, likelihood
from trl_learnalign.selection.dry_run import plan_selection


FUNNEL = {
    "score": "learnability",
    "candidate_score": ["column:row", "confidence"],
    "candidate_prompts": [16, 7],
    "answer_column": "answer",
    "num_prompts": 4,
}


def with_gaps(num=26):
    """Rows 24 and 25, the last by their column, have no answer."""
    dataset = rows_with_answers(num)
    answers = [None if row >= 24 else answer for row, answer in enumerate(dataset["answer"])]
    return dataset.remove_columns("answer").add_column("answer", answers)


def test_each_score_chooses_from_what_the_one_before_has_left(tmp_path, monkeypatch, capsys):
    """Killed in the second choice and run again: the forwards are made once, and only 7 prompts are rolled out."""
    monkeypatch.setattr(likelihood, "WINDOW", 4)
    dataset, choice = with_gaps(), config(**FUNNEL, where="answer is not None", write_report=True)
    seen, left, windows = Seen(parity_reward), [2], []

    def killed(*args, original=forwards.fill):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        windows.append(1)
        return original(*args)

    monkeypatch.setattr(forwards, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        select_prompts(make_trainer(tmp_path, reward=seen, dataset=dataset), choice)
    assert not seen.rows
    trainer = make_trainer(tmp_path, reward=seen, dataset=dataset)
    selection = select_prompts(trainer, choice)
    assert len(windows) == 4 == 16 // likelihood.WINDOW
    # By the column rows 8 to 23; of these seven by confidence, over the mean of the sixteen
    likelihoods = one_by_one(trainer, dataset.select(range(8, 24)))
    near = abs(likelihoods - likelihoods.mean()).argsort()[:7]
    assert set(seen.rows) == set(8 + near) == set(selection.scores["index"].to_pylist())
    assert set(selection.indices) < set(8 + near) and len(selection.indices) == 4
    about = selection.provenance["candidates"]
    assert [(one["score"], one["price"], one["prompts"], one["kept"]) for one in about] == [
        ("column:row", "none", 24, 16),
        ("confidence", "forward", 16, 7),
    ]
    step = tmp_path / "learnalign/step-000000"
    assert Selection.load(step / "candidates-2").scores["answer_likelihood"].to_numpy() == pytest.approx(
        likelihoods, rel=1e-5
    )
    assert "candidates 16 of 24 by column:row, 7 of 16 by confidence" in capsys.readouterr().out
    page = (tmp_path / "learnalign/report.html").read_text()
    assert 'id="candidates"' in page and "confidence" in page.partition('id="candidates"')[2].partition("<h2")[0]
    # What is finished is read again; other sizes are another selection, which the forwards of the same prompts serve
    windows.clear()
    seen.rows.clear()
    assert select_prompts(make_trainer(tmp_path, reward=seen, dataset=dataset), choice).indices == selection.indices
    assert not windows and not seen.rows
    other = config(**FUNNEL | {"candidate_prompts": [16, 5]}, where="answer is not None")
    assert len(select_prompts(make_trainer(tmp_path, reward=seen, dataset=dataset), other).scores) == 5 and not windows


def test_memory_of_a_column_over_many_prompts(tmp_path):
    """Bytes at the peak for each more prompt. Lists of Python's numbers or texts would take 40 to 150 more each."""

    def peak(num):
        texts = [f"{row}+1=" for row in range(num)]
        dataset = Dataset.from_dict({"prompt": texts, "answer": texts, "row": range(num)})
        trainer = make_trainer(tmp_path / str(num), dataset=dataset)
        choice = config(**FUNNEL | {"score": "confidence", "candidate_score": "column:row", "candidate_prompts": 16})
        tracemalloc.start()
        try:
            assert min(select_prompts(trainer, choice).indices) >= num - 16
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is imported or kept by the first selection
    few, many = 5_000, 25_000
    assert (peak(many) - peak(few)) / (many - few) < 130


def test_prices_of_a_funnel(tmp_path, capsys):
    choice = config(**FUNNEL, where="answer is not None", warmup_prompts=0)
    dataset = with_gaps()
    text, possible = plan_selection(make_trainer(tmp_path, dataset=dataset, reward=parity_reward), choice)
    assert possible and text.startswith(
        "candidates: 24 prompts, 16 of them by column:row\n"
        "candidates: 16 prompts, a forward over each, 7 of them by confidence\n"
        "pool: 7 prompts x 8 rollouts = 56\n"
    )
    assert "expected time: candidates by confidence" in text
    make_trainer(tmp_path / "run", choice, dataset=dataset, reward=parity_reward, max_steps=1).train()
    said = (
        "24 prompts, 16 of them by column:row; then 16 prompts, a forward over each, 7 of them by confidence; then 7"
    )
    assert f"{said} prompts x 8 rollouts = 56" in capsys.readouterr().out
    written = json.loads((tmp_path / "run/learnalign/step-000000/selection.json").read_text())
    assert written["provenance"]["config"]["candidate_score"] == ["column:row", "confidence"]


def of_length(table):
    return -table["prompt"].str.len()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate_score": "learnability"}, "`candidate_score` is 'learnability', which .* as much as `score`"),
        ({"score": "confidence", "candidate_score": "pvi"}, "as much as `score` .'confidence'."),
        ({"score": "column:row", "candidate_score": of_length}, "of_length', which .* as much as `score`"),
        ({"candidate_score": "column:level"}, "no column 'level'"),
        ({"candidate_score": "likely"}, "`candidate_score`, as a score of its own: `score` is 'likely'"),
        ({"candidate_score": 3}, "`candidate_score` is 3, but must be a score"),
        ({"candidate_prompts": None}, "names 1 scores and `candidate_prompts` 0 sizes"),
        ({"candidate_score": None, "candidate_prompts": [16, 8]}, "names 0 scores and `candidate_prompts` 2 sizes"),
        ({"candidate_score": ["random", "confidence"], "candidate_prompts": [8, 8]}, "must leave fewer prompts"),
        ({"candidate_score": ["random", "confidence"], "candidate_prompts": [16, 2]}, "is smaller than `num_prompts`"),
        ({"candidate_prompts": [16.5]}, "16.5, but must be a whole number"),
        ({"candidate_score": lambda table: table["row"] * float("nan")}, "gave none of 24 prompts a number"),
    ],
)
def test_funnels_that_are_refused(tmp_path, changes, message):
    settings = {"score": "learnability", "candidate_score": "confidence", "candidate_prompts": 8, "num_prompts": 4}
    with pytest.raises(ValueError, match=message):
        choice = LearnAlignConfig(**settings | {"answer_column": "answer", "write_report": False} | changes)
        select_prompts(make_trainer(tmp_path, dataset=rows_with_answers(), reward=parity_reward), choice)


def test_a_list_of_one_is_that_one_and_a_function_sees_columns():
    choice = LearnAlignConfig(num_prompts=2, candidate_prompts=[8], candidate_score=[of_length])
    assert choice.candidate_prompts == 8 and choice.candidate_score is of_length
    assert choice.to_dict()["candidate_score"].endswith("of_length")
    (stage,) = choice.stages()
    assert stage.num_prompts == 8 and stage.ranking().measures == ("columns",)
