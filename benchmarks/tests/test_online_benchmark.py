"""The pools and the other methods that choosing online is measured against."""

from decimal import Decimal
from functools import reduce
from operator import add, mul, sub
from types import SimpleNamespace

import alignment
import baselines
import numpy as np
import pools
import pytest
import run
from tiny import Seen, config, drawn, make_dataset, make_trainer
from transformers import AutoTokenizer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler
from trl_learnalign.curriculum import Group, OnlineSettings
from trl_learnalign.curriculum.memory import PromptMemory
from trl_learnalign.schedules.base import Run


@pytest.fixture(scope="module")
def hard():
    return pools.make_pool("hard", None)


def value(prompt):
    """The exact value of the last step of a chain, whose operators are all the same."""
    last = prompt.removesuffix("=").rsplit(";", 1)[-1]
    operator = next(sign for sign in "+-*" if sign in last)
    return reduce({"+": add, "-": sub, "*": mul}[operator], map(Decimal, last.split(operator)))


def test_the_hard_pool_is_what_it_says(hard):
    assert [int((hard.kind == kind).sum()) for kind in (0, 1, 2)] == [2000, 4800, 1200]
    rows = [hard.rows[int(i)] for kind in (1, 2) for i in np.flatnonzero(hard.kind == kind)[:300]]
    assert all(value(row["prompt"]) == Decimal(row["answer"]) for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(pools.POLICY)
    ids = tokenizer(list(hard.rows["prompt"]))["input_ids"]
    assert tokenizer.unk_token_id not in {token for prompt in ids for token in prompt}
    assert max(map(len, ids)) + pools.MAX_COMPLETION <= 256
    lengths = np.array([len(prompt) for prompt in ids])
    equations, too_hard = lengths[hard.kind == 0], lengths[hard.kind == 1]
    assert np.percentile(equations, 25) < np.median(too_hard) < np.percentile(equations, 90)
    again = pools.make_pool("hard", None)
    assert list(again.rows["prompt"]) == list(hard.rows["prompt"]) and (again.kind == hard.kind).all()
    assert list(pools.make_pool("hard", None, seed=1).rows["prompt"]) != list(hard.rows["prompt"])


def test_a_tenth_of_the_answers_is_wrong_and_the_trainer_is_not_told(hard):
    wrong = pools.make_pool("hard-wrong", None)
    assert wrong.rows.column_names == ["prompt", "answer"] and wrong.wrong.sum() == 800
    pairs = zip(wrong.rows["answer"], hard.rows["answer"], strict=True)
    assert [Decimal(a) != Decimal(b) for a, b in pairs] == wrong.wrong.tolist()


@pytest.mark.parametrize("name", baselines.SCHEDULES)
def test_another_method_trains_on_what_it_draws_and_learns_from_its_rewards(tmp_path, name):
    seen = Seen()
    sampler = LearnAlignSampler(config(), schedule=baselines.SCHEDULES[name])
    trainer = make_trainer(tmp_path, reward=seen, dataset=make_dataset(24), max_steps=4)
    trainer.add_callback(LearnAlignCallback(trainer, sampler))
    chunks = drawn(trainer)
    trainer.train()
    schedule, size = sampler.schedule, trainer.num_generations
    rows = [row for chunk in range(4) for row in chunks[chunk]]
    assert seen.rows[::size] == rows
    assert min(schedule._flight, default=schedule.drawn) == 16  # all groups of the four chunks were observed
    if name in ("beta mean", "mopps"):
        visits = np.bincount(rows, minlength=24)
        assert (schedule.a + schedule.b - 2 == size * visits).all() and (schedule.a > 1).any()


def test_greso_skips_prompts_without_a_gradient_more_often_the_longer_they_have_none():
    schedule, later = baselines.GRESO(Run(40, 8, 8, 0, config(), None)), []
    for chunk in range(60):
        rows = schedule.choose(8)
        rewards = np.where(rows[:, None] % 2, np.arange(8) % 2, 1)  # even rows are solved each time
        groups = enumerate(zip(rows.tolist(), rewards, strict=True), start=8 * chunk)
        schedule.observe([Group(number, row, own[:, None]) for number, (row, own) in groups])
        later += rows.tolist() if chunk >= 40 else []
    assert np.mean([row % 2 == 0 for row in later]) < 0.3
    assert schedule.keep["hard"] > 0.5  # none of that kind: it may look at more


def test_a_refill_trains_on_groups_with_a_gradient_and_pays_for_the_others(tmp_path):
    def reward(completions, row, **kwargs):
        return [float(i % 2) if r % 3 == 0 else 0.0 for i, r in enumerate(row)]

    seen, steps = Seen(reward), []

    class Watched(baselines.RefillingTrainer):
        def _prepare_inputs(self, batch):
            output = super()._prepare_inputs(batch)
            steps.append((output["advantages"].ne(0).sum().item(), len(output["advantages"]), len(seen.rows)))
            return output

    trainer = make_trainer(tmp_path, reward=seen, dataset=make_dataset(24), max_steps=3, cls=Watched)
    order = iter([row for _ in range(99) for row in range(24)])
    trainer.fresh = lambda number: [trainer.train_dataset[next(order)] for _ in range(number)]
    trainer.train()
    assert [(live, size) for live, size, _ in steps] == [(16, 16)] * 3  # a third of the prompts has a gradient
    assert steps[-1][2] > 3 * 16


def test_features_of_the_study_of_alignments_are_those_of_an_online_run(hard, tmp_path):
    rows = hard.rows.select(range(24)).add_column("row", list(range(24)))
    task = pools.make_task("hard", None, tmp_path)
    reward = run.Recorder(task.reward)
    trainer = run.build_trainer("online", task, None, rows, reward, 1, alignment.SEED, str(tmp_path), 1e-3, [])
    trainer.train()
    expected = trainer.learnalign.schedule.curriculum.features
    assert expected.shape[1] > 10  # hidden states, too
    np.testing.assert_array_equal(alignment.features(task, rows, None), expected)


@pytest.mark.parametrize("number", [7, 10, 12])
def test_wrong_answers_are_counted_among_as_many_suspects_as_there_are(number):
    memory = PromptMemory(100, 10, OnlineSettings())
    memory.surprise[:number] = np.linspace(9, 8, number)
    wrong = np.arange(100) % 2 == 1
    schedule = SimpleNamespace(curriculum=SimpleNamespace(memory=memory))
    trainer = SimpleNamespace(learnalign=SimpleNamespace(schedule=schedule))
    found = run.suspects(trainer, SimpleNamespace(wrong=wrong))
    assert found == ({"10": 5} if number > 10 else {}) | {str(number): number // 2}
