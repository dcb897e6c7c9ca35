"""What a selection and its measures are known by: equal keys are the same result, so nothing may be left out."""

import pandas as pd
import torch
from tiny import Seen, config, make_dataset, make_trainer
from trl import GRPOTrainer

from trl_learnalign import select_prompts
from trl_learnalign.host import find_host
from trl_learnalign.measures import MEASURES, Finding, Measure, likelihood
from trl_learnalign.scores.builtin import SCORES, Score


class Marks(Measure):
    """A mark for each prompt, which costs nothing."""

    name, columns, price = "marks", ("mark",), "none"

    def __init__(self, sign=1.0):
        self.sign = sign

    def key(self, context, rows):
        return {**super().key(context, rows), "sign": self.sign}

    def run(self, context, rows, log):
        return Finding(pd.DataFrame({"mark": [self.sign * row for row in rows]}, index=list(rows)))


class Squares(Marks):
    """The same with other numbers."""

    def run(self, context, rows, log):
        return Finding(pd.DataFrame({"mark": [-self.sign * row**2 for row in rows]}, index=list(rows)))


def by_mark(table, align):
    return table["mark"] + 0 * table["learnability"]


def against_mark(table, align):
    return -table["mark"] + 0 * table["learnability"]


def small(path, seen, cls=None, **changes):
    return make_trainer(path, cls=cls, reward=seen, dataset=make_dataset(8), **changes)


def by_turns(completions, **kwargs):
    """Every prompt is learnable."""
    return [float(place % 2) for place in range(len(completions))]


def test_another_measure_or_score_of_ones_own(tmp_path, monkeypatch):
    """Its key, its code, and the code of the score. Nothing else is measured again."""
    seen = Seen(by_turns)
    for kind, sign, rank, first in (
        (Marks, 1.0, by_mark, 7),
        (Marks, -1.0, by_mark, 0),
        (Marks, -1.0, against_mark, 7),
        (Squares, -1.0, against_mark, 0),
    ):
        monkeypatch.setitem(MEASURES, "marks", kind(sign))
        monkeypatch.setitem(SCORES, "mine", Score(("rollouts", "marks"), rank))
        selection = select_prompts(small(tmp_path, seen), config(score="mine", num_rollouts=4))
        assert selection.indices[0] == first and len(seen.rows) == 8 * 4


class Doubled(GRPOTrainer):
    """A trainer with rewards of its own."""

    def _calculate_rewards(self, *args):
        return 2 * super()._calculate_rewards(*args)


class Tripled(GRPOTrainer):
    """Another one."""

    def _calculate_rewards(self, *args):
        return 3 * super()._calculate_rewards(*args)


class Marked(GRPOTrainer):
    """A trainer with tokens of its own."""

    def _tokenize_prompts(self, prompts):
        return super()._tokenize_prompts([prompt + ":" for prompt in prompts])


def test_a_trainer_with_methods_of_its_own_is_another_trainer(tmp_path, capsys, caplog):
    """Also where the user has put a method in place of the class's. What LearnAlign puts around it is nobody's."""
    seen, choice = Seen(by_turns), config(score="learnability", learnability="variance", num_rollouts=4)

    def select(cls, change=lambda trainer: None):
        trainer, before = small(tmp_path, seen, cls), len(seen.rows)
        change(trainer)
        undo = find_host(trainer).on_rewards(lambda *args: None)
        selection = select_prompts(trainer, choice)
        undo()
        return selection.scores["reward_mean"][0].as_py(), len(seen.rows) - before

    assert [select(cls) for cls in (None, None, Doubled, Doubled)] == [(0.5, 32), (0.5, 0), (1.0, 32), (1.0, 0)]
    capsys.readouterr()
    assert [select(cls) for cls in (Tripled, Tripled)] == [(1.5, 32), (1.5, 0)]
    assert "from other the trainer's `_calculate_rewards` (made" in capsys.readouterr().out
    assert select(Marked) == (0.5, 32) and select(None)[1] == 32

    def rewards_of(*args):
        return torch.full((16, 1), 4.0)

    assert select(None, lambda trainer: setattr(trainer, "_calculate_rewards", rewards_of))[0] == 4.0
    assert "cannot tell" not in caplog.text


def test_forwards_in_another_precision_are_others(tmp_path, monkeypatch):
    """Of the likelihood as of the hidden states."""
    made, run = [], likelihood._AnswerForward.run
    monkeypatch.setattr(likelihood._AnswerForward, "run", lambda self, rows: made.append(len(rows)) or run(self, rows))
    dataset, found = make_dataset(8).add_column("answer", list("12345678")), []
    for bf16 in (True, False, False):
        trainer = make_trainer(tmp_path, dataset=dataset, bf16=bf16)
        selection = select_prompts(trainer, config(score="confidence", answer_column="answer"))
        found.append(
            (sum(made), selection.scores["answer_likelihood"].to_pylist(), find_host(trainer).base_identity())
        )
    assert [count for count, *_ in found] == [8, 16, 16]
    assert found[0][1] != found[1][1] == found[2][1] and found[0][2] != found[1][2] == found[2][2]


def test_numbers_that_the_trainer_gives_are_in_the_key(tmp_path):
    """The size of a group where `num_rollouts` is left out, and the seed where nothing is generated."""
    seen = Seen(by_turns)
    for size in (4, 8):
        choice = config(score="learnability", num_rollouts=None)
        select_prompts(small(tmp_path, seen, num_generations=size), choice)
    assert len(seen.rows) == 8 * 4 + 8 * 8
    dataset = make_dataset(24).add_column("answer", ["1"] * 24)
    choice = config(score="confidence", answer_column="answer", candidate_prompts=6, num_prompts=2)
    pools = [
        select_prompts(make_trainer(tmp_path, dataset=dataset, seed=seed), choice).scores["index"].to_pylist()
        for seed in (7, 8)
    ]
    assert pools[0] != pools[1]


def test_what_only_one_of_two_scores_measures_is_not_what_differs(tmp_path, capsys):
    dataset = make_dataset(8).add_column("answer", list("12345678"))
    select_prompts(make_trainer(tmp_path, dataset=dataset), config(score="confidence", answer_column="answer"))
    capsys.readouterr()
    select_prompts(make_trainer(tmp_path, dataset=dataset), config(score="learnability", num_rollouts=8))
    out = capsys.readouterr().out
    assert (
        "from other `num_rollouts` (it was None and is 8), `score` (it was 'confidence' and is 'learnability'), "
        "`answer_column` (it was 'answer' and is None) (made"
    ) in out
