"""
The online schedule through trainer.train(): what it is told, what it costs, what it logs, and that a resumed run is
the run.
"""

import json
import logging
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from test_environments import Counter, chat_tokenizer, double, last_parity
from tiny import (
    EAGER,
    assert_same_weights,
    config,
    digit_reward,
    drawn,
    fixed_reward,
    graded_reward,
    grpo_args,
    lora,
    make_dataset,
    make_model,
    online,
    parity_reward,
    weights,
)
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer

from trl_learnalign import (
    LearnAlignCallback,
    LearnAlignGRPOTrainer,
    LearnAlignMixin,
    LearnAlignSampler,
)
from trl_learnalign.curriculum import OnlineSettings
from trl_learnalign.curriculum.states import split
from trl_learnalign.data import reading
from trl_learnalign.data.order import RandomOrder
from trl_learnalign.host.rewards import RewardError
from trl_learnalign.host.trial import COMPLETION
from trl_learnalign.report import online_page as online_report
from trl_learnalign.run.state import STATE_FILE
from trl_learnalign.schedules import OnlineSchedule, prompt_features
from trl_learnalign.schedules.online import LEARNALIGN


METRICS = (
    "choosing live_fraction predicted_success observed_success skill headroom pool_success retired unscored suspects"
).split()
LOGGED = {f"learnalign/{name}" for name in METRICS}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


# These runs are too short for a predictor to prove its skill, and for anything to fade with half-lives of real runs.
# Steps with one chunk fade by groups, those with several by steps
SETTINGS = replace(EAGER, half_life_steps=10.0, half_life_groups=48.0)
make_schedule = partial(OnlineSchedule, settings=SETTINGS)
make_trainer = partial(tiny.make_trainer, settings=SETTINGS)


class Counting(LearnAlignGRPOTrainer):
    """Counts the prompts of each generation; notes the chunks that it was given, with all that was drawn of them."""

    def _generate(self, prompts, *args, **kwargs):
        vars(self).setdefault("generated", []).append(len(prompts))
        return super()._generate(prompts, *args, **kwargs)


class OnlineRLOOTrainer(LearnAlignMixin, RLOOTrainer):
    """Without a line of its own."""


class Paid:
    """A reward function that notes what it was asked for and what it gave."""

    __name__ = "paid"

    def __init__(self, reward=digit_reward):
        self.reward, self.calls = reward, []

    def __call__(self, completions, row, **kwargs):
        rewards = self.reward(completions=completions, row=row)
        if COMPLETION not in completions:  # the trial before hidden states are computed
            self.calls.append((row, rewards))
        return rewards

    @property
    def chunks(self):
        """Rows of the prompts of each call; each is asked for in a group of four."""
        assert all(row[0::4] == row[3::4] for row, _ in self.calls)
        return [row[::4] for row, _ in self.calls]


def clocks(trainer):
    """
    Fills with the half-lives of the policy until each chunk was drawn, unless a run before had drawn it: by the steps
    till then, or by the groups.
    """
    sampler = trainer._get_train_sampler()
    found, ask = {}, sampler.chunk

    def chunk(i):
        steps, groups = trainer.state.global_step, sampler.schedule.curriculum.history.observed
        if i >= sampler.stream.drawn:
            found[i] = min(steps / SETTINGS.half_life_steps, groups / SETTINGS.half_life_groups)
        return ask(i)

    sampler.chunk = chunk
    return found


def expected(calls, drawn_at, size):
    """Successes, failures and visits of each prompt, by a loop over the rewards that were paid for."""
    successes, failures, last, visits = np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size, int)
    for chunk, (rows, rewards) in enumerate(calls):
        for first in range(0, len(rows), 4):
            row, own = rows[first], [r for r in rewards[first : first + 4] if r is not None and math.isfinite(r)]
            faded = 0.5 ** (drawn_at[chunk] - last[row])
            successes[row] = successes[row] * faded + sum(r >= 1 for r in own)
            failures[row] = failures[row] * faded + sum(r < 1 for r in own)
            last[row], visits[row] = drawn_at[chunk], visits[row] + 1
    return successes, failures, visits


def check_counts(schedule, calls, drawn_at, size=24):
    """The memory is that of a loop over `calls`, one a chunk, of which `drawn_at` has the `clocks`."""
    successes, failures, visits = expected(calls, drawn_at, size)
    kept, history = schedule.curriculum.memory, schedule.curriculum.history
    np.testing.assert_allclose(kept.successes, successes, rtol=1e-5)
    np.testing.assert_allclose(kept.failures, failures, rtol=1e-5)
    np.testing.assert_array_equal(kept.visits, visits)
    assert history.observed == sum(len(rows) // 4 for rows, _ in calls) and history.groups <= history.observed


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def snapshot(schedule):
    values, arrays = split(schedule.state_dict())
    return json.dumps(values), {name: array.copy() for name, array in arrays.items()}


def assert_unchanged(before, schedule):
    values, arrays = snapshot(schedule)
    assert values == before[0] and arrays.keys() == before[1].keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[1][name])


# A run -------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "a chunk a step": {},
    "a chunk over two steps": {"per_device_train_batch_size": 8, "steps_per_generation": 2},
    "several chunks a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "a chunk used twice": {"num_iterations": 2},
    "workers that read ahead": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_are_trained_on_and_their_rewards_are_counted(tmp_path, layout):
    paid = Paid()
    settings = {"num_train_epochs": 2} | LAYOUTS[layout]
    trainer = make_trainer(tmp_path, online(), cls=Counting, reward=paid, **settings)
    drawn_at, chunks = clocks(trainer), drawn(trainer)
    trainer.train()
    schedule, stream = trainer.learnalign.schedule, trainer._get_train_sampler().layout
    assert len(paid.calls) == 2 * stream.epoch_chunks == 12 and stream.chunk_prompts == 4
    assert paid.chunks == [chunks[i] for i in range(12)]
    check_counts(schedule, paid.calls, drawn_at)
    assert max(drawn_at.values()) > 0.3  # or the loop would not tell a clock from none
    assert len(trainer.generated) == 12  # training's own, and no other
    assert schedule.curriculum.history.column("choosing")[-1] == 1.0  # it was choosing
    for entry in logged(trainer):  # a step without a generation has no reward to tell of
        assert LOGGED & entry.keys() == (LOGGED if "reward" in entry else set())
    live = [len({*rewards[i : i + 4]}) > 1 for _, rewards in paid.calls for i in range(0, 16, 4)]
    shares = [entry["learnalign/live_fraction"] for entry in logged(trainer) if "reward" in entry]
    if layout in ("a chunk a step", "workers that read ahead"):
        assert shares == pytest.approx([sum(live[i : i + 4]) / 4 for i in range(0, 48, 4)])
        # The share of groups without a gradient, as the trainer itself has it
        assert shares == pytest.approx([1 - entry["frac_reward_zero_std"] for entry in logged(trainer)])


def test_hidden_states_of_the_prompts_cost_no_generation_and_change_nothing_else(tmp_path):
    """The first chunk, which is drawn before anything was observed, is that of a run without them."""
    paid, plain = Paid(), Paid()
    trainer = make_trainer(tmp_path / "a", online(prompt_features=True), cls=Counting, reward=paid, max_steps=4)
    drawn_at = clocks(trainer)
    trainer.train()
    assert trainer.generated == [16] * 4 and len(paid.calls) == 4
    check_counts(trainer.learnalign.schedule, paid.calls, drawn_at)
    features = trainer.learnalign.schedule.curriculum.features
    assert features.shape[0] == 24 and features.shape[1] > 2 and features.dtype == np.float16
    assert features_file(tmp_path / "a/learnalign").is_file()
    make_trainer(tmp_path / "b", online(), reward=plain, max_steps=1).train()
    assert paid.calls[0] == plain.calls[0]


def test_an_evaluation_leaves_the_schedule_untouched(tmp_path):
    evaluated = []

    def reward(completions, row, **kwargs):
        evaluated.extend(r for r in row if r >= 1000)
        return digit_reward(completions=completions, row=[r % 1000 for r in row])

    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before = snapshot(trainer.learnalign.schedule)
            trainer.evaluate()
            assert_unchanged(before, trainer.learnalign.schedule)

    paid = Paid(reward)
    others = make_dataset(4).map(lambda row: {"row": row["row"] + 1000})
    settings = {"per_device_eval_batch_size": 8, "max_steps": 3}
    trainer = make_trainer(tmp_path, online(), reward=paid, eval_dataset=others, **settings)
    trainer.add_callback(Between())
    drawn_at = clocks(trainer)
    trainer.train()
    assert len(evaluated) == 3 * 4 * 4
    check_counts(trainer.learnalign.schedule, [call for call in paid.calls if max(call[0]) < 1000], drawn_at)


class StopAtOnce(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (24, {"num_train_epochs": 2}),
        (23, {"num_train_epochs": 1.5}),  # TRL leaves out the last chunk, which is not whole
        (26, {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 1}),
        (24, {"num_train_epochs": 1, "gradient_accumulation_steps": 4, "num_iterations": 2}),
    ],
)
def test_an_epoch_is_as_long_as_a_stock_trainer_makes_it(tmp_path, rows, settings):
    steps = []
    for choice in (online(), None):
        trainer = make_trainer(tmp_path / str(choice is None), choice, dataset=make_dataset(rows), **settings)
        trainer.add_callback(StopAtOnce())
        trainer.train()
        steps.append(trainer.state.max_steps)
    assert steps[0] == steps[1] > 0


def test_without_skill_the_run_is_that_of_a_stock_trainer(tmp_path):
    """Bit for bit: prompts, rewards, weights."""
    ours, theirs = Paid(), Paid()
    doubting = replace(SETTINGS, begin_skill=2.0)
    trainer = make_trainer(tmp_path / "ours", online(), reward=ours, num_train_epochs=2, settings=doubting)
    trainer.train()
    stock = make_trainer(tmp_path / "stock", reward=theirs, num_train_epochs=2)
    stock.train()
    assert ours.calls == theirs.calls and trainer.learnalign.schedule.curriculum.history.observed == 48
    assert_same_weights(weights(trainer), weights(stock))


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_the_callback_on_a_trainer_already_built(tmp_path, kind):
    paid, again = Paid(), Paid()
    sampler = LearnAlignSampler(online(), schedule=make_schedule)
    trainer = make_trainer(tmp_path / "a", cls=kind, reward=paid, max_steps=8)
    trainer.add_callback(LearnAlignCallback(trainer, sampler))
    drawn_at = clocks(trainer)
    trainer.train()
    check_counts(sampler.schedule, paid.calls, drawn_at)
    assert LOGGED <= logged(trainer)[-1].keys()
    cls = LearnAlignGRPOTrainer if kind is GRPOTrainer else OnlineRLOOTrainer
    other = make_trainer(tmp_path / "b", online(), cls=cls, reward=again, max_steps=8)
    other.train()
    assert again.calls == paid.calls
    assert_same_weights(weights(trainer), weights(other))


def test_training_twice_starts_afresh(tmp_path):
    paid = Paid()
    trainer = make_trainer(tmp_path, online(), reward=paid, max_steps=4)
    drawn_at, times = clocks(trainer), []
    for _ in range(2):
        paid.calls.clear()
        drawn_at.clear()
        trainer.train()
        check_counts(trainer.learnalign.schedule, paid.calls, drawn_at)
        times.append(dict(drawn_at))
    assert times[0] == times[1]


# Resuming ----------------------------------------------------------------------------------------------------------

RESUMED = LAYOUTS | {
    "a chunk over four steps": {"per_device_train_batch_size": 4, "steps_per_generation": 4},
    "neither divides the other": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 2,
    },
}


REPEATED = {"num_iterations", "per_device_train_batch_size"}  # such settings make a chunk last several batches


def run_with_rates(path, reward, resume=None, **settings):
    """A column tells of success, so that what was seen of some prompts decides which others come."""
    paid = Paid(reward)
    dataset = make_dataset().add_column("rate", [(7 * i) % 24 / 24 for i in range(24)])
    trainer = make_trainer(path, online(pass_rate_column="rate"), reward=paid, dataset=dataset, **settings)
    paid.drawn_at = clocks(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(path / f"checkpoint-{resume}"))
    return trainer, paid


# Each resumes several times; the others do in `make test-all`
QUICK = "a chunk over two steps", "a chunk over four steps", "neither divides the other"


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in RESUMED]
)
def test_a_run_resumed_at_the_end_of_a_chunk_is_the_run(tmp_path, layout):
    """Prompts, rewards, weights and the state of the schedule, bit for bit."""
    settings = {"max_steps": 12} | EVERY_STEP | RESUMED[layout]
    whole, paid = run_with_rates(tmp_path, digit_reward, **settings)
    stream = whole._get_train_sampler().layout
    ends = [step for step in (2, 4, 6, 7, 8, 11) if stream.batches_trained(step) % stream.repeats == 0]
    for step in ends:
        again, since = run_with_rates(tmp_path, digit_reward, step, **settings | {"save_strategy": "no"})
        assert since.calls == paid.calls[stream.chunks_trained(step) :], step
        assert_same_weights(weights(again), weights(whole))
        assert_unchanged(snapshot(whole.learnalign.schedule), again.learnalign.schedule)
    assert len(ends) >= 2


@pytest.mark.parametrize("layout", [name for name, settings in RESUMED.items() if REPEATED & settings.keys()])
def test_a_run_resumed_inside_a_chunk_credits_every_chunk_once(tmp_path, layout):
    """
    TRL generates that chunk again, for the same prompts; its rewards, which were counted before, are not counted
    twice.
    """
    settings = {"max_steps": 12} | EVERY_STEP | RESUMED[layout]
    whole, paid = run_with_rates(tmp_path, digit_reward, **settings)
    stream = whole._get_train_sampler().layout
    inside = [step for step in range(1, 12) if stream.batches_trained(step) % stream.repeats]
    for step in inside[::2]:
        again, since = run_with_rates(tmp_path, digit_reward, step, **settings | {"save_strategy": "no"})
        first = stream.chunks_trained(step)
        left = stream.batches_trained(12) - stream.batches_trained(step)
        assert len(since.calls) == math.ceil(left / stream.repeats)
        assert since.chunks[0] == paid.chunks[first] and since.calls[0][1] != paid.calls[first][1]
        drawn_at = paid.drawn_at | since.drawn_at  # chunks that a run before had drawn keep their time
        check_counts(again.learnalign.schedule, paid.calls[: first + 1] + since.calls[1:], drawn_at)
        assert set(since.drawn_at) < set(paid.drawn_at)
    assert inside and stream.repeats > 1


def test_a_run_resumed_by_the_same_trainer_is_the_run(tmp_path):
    """The trainer still has rollouts of the chunk that the run before was in."""
    settings = {"max_steps": 6} | EVERY_STEP | RESUMED["a chunk over four steps"]
    trainer, paid = run_with_rates(tmp_path, digit_reward, **settings)
    calls, before = [*paid.calls], weights(trainer)
    paid.calls.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(calls) == 2 and paid.calls == calls[1:]
    assert_same_weights(weights(trainer), before)


def test_the_rewards_of_some_prompts_decide_which_others_come(tmp_path):
    """So the tests above would notice a schedule that forgets."""
    (_, real), (_, other) = (
        run_with_rates(tmp_path / reward.__name__, reward, max_steps=12) for reward in (digit_reward, fixed_reward)
    )
    assert real.chunks[:2] == other.chunks[:2] and real.chunks[3:6] != other.chunks[3:6]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with hidden states and a checkpoint of every step."""
    path, paid = tmp_path_factory.mktemp("run"), Paid()
    trainer = make_trainer(path, online(prompt_features=True), reward=paid, max_steps=6, **EVERY_STEP)
    trainer.train()
    return path, paid, weights(trainer)


def resume(path, choice=None, checkpoint=True, **changes):
    paid = Paid()
    settings = {"max_steps": 6, "save_strategy": "no"} | changes
    trainer = make_trainer(path, choice or online(prompt_features=True), reward=paid, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, paid


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    return tmp_path / "run"


def test_hidden_states_are_those_that_the_run_began_with(finished, copied):
    """They are read, not made again from the weights of now."""
    file = features_file(copied / "learnalign")
    before = file.read_bytes()
    trainer, paid = resume(copied, checkpoint=str(copied / "checkpoint-3"))
    assert paid.calls == finished[1].calls[3:]
    assert_same_weights(weights(trainer), finished[2])
    assert file.read_bytes() == before


def features_file(directory):
    (file,) = directory.glob("prompt_features-*")
    return file


def test_a_checkpoint_alone_is_enough_to_resume(finished, copied, tmp_path):
    """Moved to another place, after another run in its directory, into another; and it can be resumed again."""
    original = features_file(finished[0] / "checkpoint-3")
    assert original.samefile(features_file(finished[0] / "learnalign"))  # no copy
    make_trainer(copied, online(prompt_features=True, where="row < 20"), max_steps=1, reward=Paid()).train()
    assert len(list((copied / "learnalign").glob("prompt_features-*"))) == 2
    moved = tmp_path / "moved"
    shutil.move(copied / "checkpoint-3", moved)
    shutil.rmtree(copied)
    trainer, paid = resume(tmp_path / "other", checkpoint=str(moved), **EVERY_STEP)
    assert paid.calls == finished[1].calls[3:]
    assert features_file(tmp_path / "other/checkpoint-5").read_bytes() == original.read_bytes()
    shutil.rmtree(tmp_path / "other/learnalign")
    trainer, paid = resume(tmp_path / "other", checkpoint=str(tmp_path / "other/checkpoint-5"))
    assert paid.calls == finished[1].calls[5:]
    assert_same_weights(weights(trainer), finished[2])


@pytest.mark.parametrize("loss", ["missing", "damaged"])
def test_a_checkpoint_without_its_features_is_passed_over_or_refused(finished, copied, loss):
    for step in (4, 5):
        file = features_file(copied / f"checkpoint-{step}")
        content = file.read_bytes()
        file.unlink()
        if loss == "damaged":  # not the file that the other checkpoints are linked to
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    what = "is missing" if loss == "missing" else "does not agree with its checksum"
    with pytest.raises(ValueError, match=f"checkpoint-5' is not complete: prompt_features-.*{what}"):
        resume(copied, checkpoint=str(copied / "checkpoint-5"))
    trainer, paid = resume(copied)
    assert paid.calls == finished[1].calls[3:]


def test_of_a_large_pool_a_part_that_the_run_can_visit_is_looked_at(tmp_path, monkeypatch, capsys):
    """Uniform draws are those of a run without hidden states, and in the part, as is what is chosen."""
    monkeypatch.setattr(prompt_features, "PER_VISIT", 2)
    monkeypatch.setattr(prompt_features, "LEAST_PART", 8)
    dataset = make_dataset(100)
    runs = {}
    for name, choice in (("part", online(prompt_features=True, where="row < 90")), ("none", online(where="row < 90"))):
        paid = runs[name] = Paid()
        trainer = make_trainer(tmp_path / name, choice, reward=paid, dataset=dataset, max_steps=6, **EVERY_STEP)
        trainer.train()
        schedule = trainer.learnalign.schedule
        if name == "part":
            assert "first a forward over 48 of 100 prompts" in capsys.readouterr().out
            part = schedule
    choosable = part.curriculum.choosable.tolist()
    assert len(choosable) == 48 and len(part.pool) == len(part.curriculum.pool) == 90
    order = RandomOrder(90, part.layout.seed)
    assert set(choosable) == {order[place] for place in range(48)}
    looked_at = np.abs(part.curriculum.features[:, 2:]).max(1) > 0  # the first two: a constant and the length
    assert set(np.flatnonzero(looked_at)) <= set(choosable) and looked_at.sum() > 24
    assert {row for chunk in runs["part"].chunks for row in chunk} <= set(choosable)
    assert runs["part"].chunks[0] == runs["none"].chunks[0]
    longer = {"max_steps": 9, "save_strategy": "no"}  # the part stays
    resumed = make_trainer(
        tmp_path / "part", online(prompt_features=True, where="row < 90"), dataset=dataset, **longer
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.learnalign.schedule.curriculum.choosable.tolist() == choosable


@pytest.mark.parametrize("loss", ["missing", "cut short", "another"])
def test_a_checkpoint_without_its_state_is_passed_over_or_refused(finished, copied, loss):
    file = copied / "checkpoint-5" / STATE_FILE
    match loss:
        case "missing":
            file.unlink()
        case "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        case "another":
            shutil.copy(copied / "checkpoint-4" / STATE_FILE, file)
    with pytest.raises(ValueError, match=rf"checkpoint-5' is not complete: {STATE_FILE} "):
        resume(copied, checkpoint=str(copied / "checkpoint-5"))
    # A stock trainer with the callback takes what it is told to
    trainer = make_trainer(copied, reward=Paid(), max_steps=6)
    sampler = LearnAlignSampler(online(prompt_features=True), schedule=make_schedule)
    callback = LearnAlignCallback(trainer, sampler)
    trainer.add_callback(callback)
    with pytest.raises(
        ValueError, match=f"{STATE_FILE}', the state of the schedule in this checkpoint, cannot be used"
    ):
        trainer.train(resume_from_checkpoint=str(copied / "checkpoint-5"))
    callback.ended()
    trainer, paid = resume(copied)  # from the one before it
    assert paid.calls == finished[1].calls[4:]
    assert_same_weights(weights(trainer), finished[2])


def test_what_a_resumed_run_must_not_change(copied):
    for choice, changes, message in (
        (config(), {}, "schedule OnlineSchedule .*but this sampler has StagedSchedule"),
        (online(), {}, "`prompt_features` was True and is False"),
        (online(prompt_features=True, success_threshold=0.5), {}, "`success_threshold` was 1.0 and is 0.5"),
        (None, {"seed": 8}, "seed was 7 and is 8"),
        (None, {"num_generations": 8}, "group_size was 4 and is 8"),
        (None, {"per_device_train_batch_size": 8}, "chunk_prompts was 4 and is 2"),
        (None, {"dataset": make_dataset(23)}, "pool_size was 24 and is 23"),
    ):
        with pytest.raises(ValueError, match=message):
            resume(copied, choice, **({"max_steps": 6} | changes))
    other = make_dataset().map(lambda row: {"prompt": row["prompt"] + "="})
    with pytest.raises(ValueError, match="The training dataset has other rows"):
        trainer = make_trainer(copied, online(prompt_features=True), reward=Paid(), dataset=other, max_steps=6)
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("schedule", ["staged", "online"])
def test_trainer_state_does_not_grow_with_the_number_of_prompts(tmp_path, schedule):
    """Nor does the file beside it grow by more than 40 bytes a prompt."""
    sizes = {}
    for rows in (24, 1024):
        choice = config(score="random", num_prompts=rows, warmup_prompts=4) if schedule == "staged" else online()
        path = tmp_path / str(rows)
        make_trainer(path, choice, dataset=make_dataset(rows), max_steps=3, **EVERY_STEP).train()
        state = json.loads((path / "checkpoint-3/trainer_state.json").read_text())["stateful_callbacks"]["learnalign"]
        sizes[rows] = len(json.dumps(state)), (path / "checkpoint-3" / STATE_FILE).stat().st_size
    assert sizes[1024][0] - sizes[24][0] < 100
    assert 0 < sizes[1024][1] - sizes[24][1] <= 40 * 1000


# Rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_that_are_missing_are_neither_successes_nor_failures(tmp_path):
    def patchy(completions, row, **kwargs):
        rewards = digit_reward(completions=completions, row=row)
        return [
            None if r % 3 == 0 else math.nan if (r % 3 == 1 and place % 2) else reward
            for place, (r, reward) in enumerate(zip(row, rewards, strict=True))
        ]

    paid = Paid(patchy)
    trainer = make_trainer(tmp_path, online(), reward=paid, num_train_epochs=2)
    drawn_at = clocks(trainer)
    trainer.train()
    check_counts(trainer.learnalign.schedule, paid.calls, drawn_at)
    kept = trainer.learnalign.schedule.curriculum.memory
    assert kept.successes[::3].sum() == kept.failures[::3].sum() == 0
    assert trainer.state.global_step == 12


def test_several_reward_functions(tmp_path):
    with pytest.raises(ValueError, match="several reward functions.*Set `success_reward`"):
        make_trainer(tmp_path / "a", online(), reward=[graded_reward, digit_reward])
    paid = Paid()
    choice = online(success_reward="paid")
    trainer = make_trainer(tmp_path / "b", choice, reward=[graded_reward, paid], max_steps=8)
    drawn_at = clocks(trainer)
    trainer.train()
    check_counts(trainer.learnalign.schedule, paid.calls, drawn_at)
    # Any difference between total rewards makes a gradient
    for entry in logged(trainer):
        assert entry["learnalign/live_fraction"] == pytest.approx(1 - entry["frac_reward_zero_std"])


def test_graded_rewards(tmp_path):
    calls = []

    def graded(completions, row, **kwargs):
        calls.append((row, graded_reward(completions=completions)))
        return calls[-1][1]

    choice = online(learnability="variance")
    trainer = make_trainer(tmp_path, choice, reward=graded, max_steps=8, settings=EAGER)
    trainer.train()
    curriculum = trainer.learnalign.schedule.curriculum
    assert curriculum.settings.graded
    rewards = np.array([reward for _, given in calls for reward in given])
    np.testing.assert_allclose(np.sort(curriculum.scale.recent), np.sort(rewards), rtol=1e-6)
    assert (curriculum.memory.successes + curriculum.memory.failures).sum() >= 0.8 * len(rewards)  # some have faded
    assert all(0 <= entry["learnalign/observed_success"] <= 1 for entry in logged(trainer))


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    """Without a warm-up an epoch is as long whatever their number, as it is for a stock trainer."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, online(), num_train_epochs=1, **settings).train()
    paid = Paid()
    longer = make_trainer(tmp_path, online(), reward=paid, num_train_epochs=2, **settings)
    longer.train(resume_from_checkpoint=True)
    assert len(paid.calls) == 6 and longer.state.global_step == 12
    assert longer.learnalign.schedule.curriculum.history.observed == 48


def test_where_and_deduplicate_leave_rows_out(tmp_path):
    rows = make_dataset(24)
    twice = Dataset.from_dict({"prompt": rows["prompt"][:12] * 2, "row": rows["row"]})
    paid = Paid()
    choice = online(where="row != 3 and row != 4", deduplicate=True)
    trainer = make_trainer(tmp_path, choice, reward=paid, dataset=twice, num_train_epochs=2)
    drawn_at = clocks(trainer)
    trainer.train()
    # Of the rows 3 and 4 it is the copies that may be trained on
    assert {row for chunk in paid.chunks for row in chunk} == set(range(12)) - {3, 4} | {15, 16}
    assert len(paid.chunks) == 6  # two epochs of the 12 prompts that may be trained on
    check_counts(trainer.learnalign.schedule, paid.calls, drawn_at)


def test_columns_that_tell_of_success(tmp_path, capsys):
    rows = make_dataset(24)
    dataset = rows.add_column("kind", [f"k{i % 3}" for i in range(24)]).add_column("rate", [i / 24 for i in range(24)])
    choice = online(group_column="kind", pass_rate_column="rate")
    trainer = make_trainer(tmp_path, choice, dataset=dataset, max_steps=2)
    trainer.train()
    assert trainer.learnalign.schedule.curriculum.features.shape == (24, 1 + 1 + 3 + 1)
    said = capsys.readouterr().out
    assert (
        "LearnAlign plan: steps 1 to 2 train on prompts chosen by the success rates known beforehand (12.5% are "
        "random until 4 of these confirmed them, then 5%), as long as choosing helps." in said
    )
    assert "LearnAlign plan: 8 prompts in all, 4 at once, from a pool of 24: 0.33 visits per prompt." in said
    assert "length, kind, rate." in said


def test_a_pass_rate_column_counts_from_the_first_chunk_on(tmp_path, capsys):
    """With the settings of users. A resumed run is the run."""
    rates = [0.5 if i % 4 == 1 else i % 2 * 1.0 for i in range(48)]
    changes = {"settings": OnlineSettings(history_groups=1), "max_steps": 3, **EVERY_STEP}

    def run(resume=None):
        paid = Paid(fixed_reward)
        dataset = make_dataset(48).add_column("rate", rates)
        trainer = make_trainer(tmp_path, online(pass_rate_column="rate"), reward=paid, dataset=dataset, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return paid.chunks, trainer.learnalign.schedule.curriculum

    chunks, curriculum = run()
    assert (curriculum.history.column("choosing") == 1).all() and curriculum.judge.wait == 24
    assert sum(row % 4 == 1 for row in chunks[0] + chunks[1]) >= 6  # a draw in eight is uniform
    said = capsys.readouterr().out
    assert "from now on prompts are chosen by predicted learnability" in said
    assert "by the success rates known beforehand, which 24 random prompts are to confirm" in said
    again, _ = run(str(tmp_path / "checkpoint-1"))
    assert again == chunks[1:]
    said = capsys.readouterr().out
    assert "steps 2 to 3 train on prompts chosen by the success rates known beforehand (12.5% are random" in said

    changes["max_steps"] = 7  # too few groups for a share of them
    trainer = make_trainer(tmp_path / "without", online(), **changes)
    trainer.train()
    assert trainer.learnalign.schedule.curriculum.judge.wait == 24
    assert "a prediction is judged after 24 random prompts" in capsys.readouterr().out


def test_a_run_that_choosing_cannot_help_is_warned(tmp_path, caplog):
    make_trainer(tmp_path / "a", online(), max_steps=1).train()
    assert "The run has only 0.17 visits per prompt" in caplog.text
    caplog.clear()
    make_trainer(tmp_path / "b", online(prompt_features=True), max_steps=1).train()
    make_trainer(tmp_path / "c", online(), num_train_epochs=1).train()
    assert "visits per prompt, so most" not in caplog.text


# Prompts that are more than a text ---------------------------------------------------------------------------------


def chat_trainer(path, rewards, dataset, **kwargs):
    return Counting(
        model=make_model(max_position_embeddings=256),
        reward_funcs=rewards,
        args=grpo_args(path, max_completion_length=40, max_steps=4, **EVERY_STEP),
        train_dataset=dataset,
        processing_class=chat_tokenizer(),
        peft_config=lora(),
        train_sampler=LearnAlignSampler(online(prompt_features=True), schedule=make_schedule),
        **kwargs,
    )


def chats():
    texts = [f"{i % 10}+{i // 10}=" for i in range(12)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, of experimental features
def test_tools(tmp_path):
    """The hidden states of a prompt are those with the tools in its template."""
    trainer = chat_trainer(tmp_path, last_parity, chats(), tools=[double])
    trainer.train()
    schedule = trainer.learnalign.schedule
    assert schedule.curriculum.history.observed == schedule.curriculum.memory.visits.sum() == 16
    assert schedule.state_dict()["features_key"] is not None
    again = chat_trainer(tmp_path, last_parity, chats(), tools=[double])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(again), weights(trainer))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("prompts", [True, False])
def test_environments(tmp_path, caplog, prompts):
    """Which may supply the prompts themselves: then only what was seen of a row can tell of it."""
    if not prompts and Version(trl.__version__) < Version("1.16"):
        pytest.skip("every row needs a prompt there")
    rows = chats() if prompts else Dataset.from_dict({"environment": ["a", "b"] * 6, "level": list(range(12))})
    factory = Counter if prompts else {"a": Counter, "b": Counter}
    trainer = chat_trainer(tmp_path, None, rows, environment_factory=factory)
    trainer.train()
    schedule = trainer.learnalign.schedule
    assert schedule.curriculum.history.observed == schedule.curriculum.memory.visits.sum() == 16
    assert schedule.state_dict()["features_key"] is None
    assert schedule.curriculum.features.shape == (12, 1 + prompts)
    assert "Success is predicted without hidden states of the prompts, as an environment adds" in caplog.text
    assert all(0 <= entry["learnalign/observed_success"] <= 1 for entry in logged(trainer))


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 8}, "`num_prompts` is 8, but has no effect with `schedule='online'`"),
        ({"warmup_prompts": 8}, "`warmup_prompts` is 8, but has no effect"),
        ({"reselect_every": 2}, "`reselect_every` is 2, but has no effect"),
        ({"prompt_order": "ranked"}, "`prompt_order` is 'ranked', but has no effect"),
        ({"score": "random"}, "`score` is 'random', but `schedule='online'` chooses by predicted learnability"),
        ({"schedule": "staged", "group_column": "row"}, "`group_column` is 'row', but has no effect.*'staged'"),
        ({"schedule": "staged", "prompt_features": False}, "`prompt_features` is False, but has no effect"),
        ({"schedule": "sometimes"}, "`schedule` must be one of staged, online, mopps"),
        ({"prompt_features": 1}, "`prompt_features` must be True or False, but is 1"),
        ({"group_column": 3}, "`group_column` must be a text, but is 3"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        online(**settings) if settings.get("schedule") != "staged" else config(**settings)


def with_column(values):
    return make_dataset().add_column("odd", values)


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (
            {"group_column": "kind"},
            [0] * 24,
            "`group_column` is 'kind', but the training dataset has no column 'kind'",
        ),
        ({"pass_rate_column": "p"}, [0] * 24, "`pass_rate_column` is 'p', but the training dataset has no column"),
        (
            {"pass_rate_column": "odd"},
            ["a"] * 24,
            "`pass_rate_column` is 'odd', but the column 'odd' holds no numbers",
        ),
        (
            {"pass_rate_column": "odd"},
            [[0.5]] * 24,
            "`pass_rate_column` is 'odd', but the column 'odd' holds no numbers",
        ),
        ({"pass_rate_column": "odd"}, [0.5] * 23 + [50.0], "are between 0 and 1, and row 23 has 50"),
        ({"pass_rate_column": "odd"}, [-0.5] + [0.5] * 23, "are between 0 and 1, and row 0 has -0.5"),
        ({"pass_rate_column": "odd"}, [math.nan] * 24, "`pass_rate_column` is 'odd', but that column has no value"),
        ({"group_column": "odd"}, [[1]] * 24, "`group_column` is 'odd', which is nested"),
        (
            {"where": "success_rate > 0.1"},
            [0] * 24,
            "`where` is .*the training dataset has no column 'success_rate'.*nothing is measured before an online run",
        ),
        ({"where": "odd > 1"}, [0] * 24, "`where` is 'odd > 1', which holds for no row of the training dataset"),
        (
            {"success_reward": "other"},
            [0] * 24,
            "`success_reward` is 'other', but 'other' is not among the trainer's reward",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_when_the_trainer_is_built(tmp_path, settings, values, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, online(**settings), dataset=with_column(values))


def test_groups_too_many_to_be_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_learnalign.schedules.prompt_features.MOST_GROUPS", 23)
    with pytest.raises(ValueError, match="which has 24 different values; at most 23 can be told apart"):
        make_trainer(tmp_path, online(group_column="row"))


def test_a_column_without_a_value_for_every_row(tmp_path):
    """Null in a group is a group; a null rate is the mean."""
    dataset = make_dataset().add_column("kind", ["a", None] * 12).add_column("rate", [0.5, None, math.nan] * 8)
    choice = online(group_column="kind", pass_rate_column="rate")
    trainer = make_trainer(tmp_path, choice, dataset=dataset, max_steps=2)
    trainer.train()
    features = trainer.learnalign.schedule.curriculum.features
    assert np.isfinite(features.astype(float)).all() and features.shape[1] == 5


def test_a_dataloader_that_changes_the_order_is_found_out(tmp_path):
    """Rewards would be credited to the wrong prompts."""

    class Reversed(LearnAlignGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs[::-1])

    with pytest.raises(RuntimeError, match=r"Training generated for another prompt than row \d+, which the schedule"):
        make_trainer(tmp_path, online(), cls=Reversed, reward=parity_reward, max_steps=2).train()


def test_rewards_of_other_rollouts_than_those_of_the_chunk_are_found_out(tmp_path):
    """Not read as those of another reward function."""

    class Twice(LearnAlignGRPOTrainer):
        def _calculate_rewards(self, *args):
            return super()._calculate_rewards(*args).repeat(2, 1)

    with pytest.raises(RuntimeError, match="Rewards of 32 rollouts came for 4 prompts with 4 each"):
        make_trainer(tmp_path, online(), cls=Twice, reward=parity_reward, max_steps=2).train()


def test_a_report_that_cannot_be_written_is_no_reason_to_end_a_run(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("no report")

    monkeypatch.setattr(online_report, "write_online_report", broken)
    trainer = make_trainer(tmp_path, online(write_report=True), max_steps=2, **EVERY_STEP)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2 and "could not be written (ZeroDivisionError" in caplog.text
    assert Path(tmp_path, "checkpoint-2", STATE_FILE).is_file()


# Groups that say nothing -------------------------------------------------------------------------------------------


def odd_rows(completions, row, **kwargs):
    return [reward if r % 2 else None for r, reward in zip(row, parity_reward(completions), strict=True)]


def even_rows(completions, row, **kwargs):
    return [None if r % 2 else reward for r, reward in zip(row, parity_reward(completions), strict=True)]


@pytest.mark.parametrize("several", [False, True])
def test_a_reward_function_for_each_task(tmp_path, caplog, several):
    """TRL's documented pattern: each gives None for the rows of the other."""
    names = ["odd_rows", "even_rows"] if several else "odd_rows"
    choice = online(success_reward=names)
    rewards = [odd_rows, even_rows]
    settings = replace(SETTINGS, tried=16)
    trainer = make_trainer(tmp_path, choice, reward=rewards, max_steps=12, dataset=make_dataset(48), settings=settings)
    chunks = drawn(trainer)
    trainer.train()
    kept = trainer.learnalign.schedule.curriculum.memory
    visits = np.bincount(np.concatenate([chunks[i] for i in range(12)]), minlength=48)
    np.testing.assert_array_equal(kept.visits, visits)  # those without a reward, too
    unscored = (kept.visits > 0) & (np.arange(48) % 2 == 0)
    warned = [record.message for record in caplog.records if "no reward that decides success" in record.message]
    if several:
        assert not (kept.unscored > 0).any() and not warned
        assert (kept.successes + kept.failures > 0).sum() == (visits > 0).sum()
        return
    np.testing.assert_array_equal(kept.unscored > 0, unscored)
    chosen = np.concatenate([chunks[i] for i in range(4, 12)])
    assert (chosen % 2 == 0).mean() <= 0.5
    assert len(warned) == 1 and "odd_rows, even_rows: where each scores the rows of its own task" in warned[0]
    assert [entry["learnalign/unscored"] for entry in logged(trainer)][-1] == unscored.sum()


def test_completions_that_are_all_cut_off_make_dead_groups(tmp_path, caplog):
    """With `mask_truncated_completions` no token of theirs is in the loss: the trainer's own gradient says so."""
    changes = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 6}
    settings = replace(SETTINGS, tried=16)
    trainer = make_trainer(tmp_path, online(), reward=parity_reward, settings=settings, **changes)
    trainer.train()
    cut = [entry["completions/clipped_ratio"] for entry in logged(trainer)]
    assert np.mean(cut) > 0.8
    for entry in logged(trainer):
        assert (entry["learnalign/live_fraction"] > 0) == (entry["grad_norm"] > 0)
    assert trainer.learnalign.schedule.curriculum.memory.unscored.max() > 0
    assert any(
        "of the completions of the last 16 groups were cut off" in record.message and "%" in record.message
        for record in caplog.records
    )


class Marked:
    """A reward with a setting that a trainer may read."""

    __name__ = "marked"
    scale = 2.0

    def __call__(self, completions, **kwargs):
        return parity_reward(completions)


class OwnCalls(LearnAlignGRPOTrainer):
    """Calls its reward functions itself, by position, and leaves out half of what was generated."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        (reward,) = self.reward_funcs
        assert reward.scale == 2.0 and reward.__name__ == "marked" and self.bonus == 1.0
        return reward.scale * torch.tensor(reward(completions, row=[one["row"] for one in inputs]))[:, None]

    def _generate(self, *args, **kwargs):
        self.bonus = 1.0  # which only a generation leaves
        return super()._generate(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {name: value[:8] if torch.is_tensor(value) and value.ndim else value for name, value in output.items()}


@pytest.mark.parametrize("schedule", ["online", "staged"])
def test_a_trainer_that_calls_its_reward_functions_itself(tmp_path, schedule, caplog):
    """And generates for more rows than it trains on: those are not taken for cut off."""
    choice = online(prompt_features=True, success_threshold=2.0) if schedule == "online" else config(score="random")
    settings = {"max_steps": 4, "mask_truncated_completions": True, "max_completion_length": 20}
    trainer = make_trainer(tmp_path, choice, cls=OwnCalls, reward=Marked(), **settings)
    trainer.train()
    assert trainer.state.global_step == 4
    if schedule == "online":
        assert "could not be tried before training (AttributeError" in caplog.text
        assert (trainer.learnalign.schedule.curriculum.memory.unscored <= 0).all()


def test_reward_functions_are_tried_with_a_row_that_may_be_trained_on(tmp_path):
    def picky(completions, row, **kwargs):
        assert min(row) >= 5
        return [undefined for r in row if r < 5] + parity_reward(completions)  # noqa: F821

    trainer = make_trainer(tmp_path, online(prompt_features=True, where="row >= 5"), reward=picky, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_transform_that_draws_random_numbers_changes_neither_features_nor_training(tmp_path):
    """What is read of it beforehand is the same each time, and takes none of training's random numbers."""
    made = []
    for name in ("a", "b"):
        dataset = make_dataset().with_transform(
            lambda batch: batch | {"prompt": [text + "0" * int(torch.randint(3, ())) for text in batch["prompt"]]}
        )
        trainer = make_trainer(tmp_path / name, online(), dataset=dataset, max_steps=1 + (name == "b"))
        if name == "b":
            torch.rand(100)
            np.random.random(100)
        trainer.train()
        made.append(trainer.learnalign.schedule.curriculum.features)
    np.testing.assert_array_equal(*made)
    state = torch.get_rng_state()
    reading.read_rows(dataset, range(4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda n: ["1.0"] * n, "TypeError: reward 0 is '1.0', a str, not a number"),
        (lambda n: 1.0, "TypeError: it returned 1.0, a float, in place of a list of rewards"),
        (lambda n: "1" * n, "a str, in place of a list of rewards"),
        (lambda n: {"a": 1.0}, "a dict, in place of a list of rewards"),
        (lambda n: None, "TypeError: it returned None, a NoneType, in place of a list"),
        (lambda n: np.float64(1), "in place of a list of rewards"),
        (lambda n: [1.0] * (n - 1), "ValueError: it returned 15 rewards for 16 completions"),
    ],
)
@pytest.mark.parametrize("selects", [False, True])
def test_rewards_that_are_none_are_told_by_the_function_and_the_reason(tmp_path, caplog, returned, words, selects):
    """The same in training and in a selection, and without TRL's line of a row that had no reward."""

    def odd(completions, **kwargs):
        return returned(len(completions))

    choice = config(score="learnability", warmup_prompts=0, num_rollouts=4) if selects else online()
    with pytest.raises(RewardError, match="The reward function `odd` failed: .*It must return a number") as caught:
        make_trainer(tmp_path, choice, reward=odd, max_steps=1).train()
    assert words in str(caught.value) and "All reward functions returned None" not in caplog.text


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter, lambda values: np.array(values) > 0])
def test_rewards_of_every_kind_that_trl_takes(tmp_path, kind):
    """They make the same run."""
    paid, plain = (Paid(lambda completions, row, k=k: k(digit_reward(completions, row))) for k in (kind, list))
    made = []
    for path, reward in (("a", paid), ("b", plain)):
        trainer = make_trainer(tmp_path / path, online(), reward=reward, max_steps=2)
        trainer.train()
        made.append(weights(trainer))
    assert_same_weights(*made)


@pytest.mark.parametrize(
    ("changes", "tried"),
    [({}, 16), ({}, 20), ({"gradient_accumulation_steps": 4, "steps_per_generation": 1}, 16)],
    ids=["plain", "an epoch ends", "several chunks a step"],
)
def test_the_plan_says_from_which_step_prompts_can_be_chosen(tmp_path, capsys, changes, tried):
    changes = changes | {"max_steps": 12, "settings": replace(SETTINGS, tried=tried, history_groups=1)}
    trainer = make_trainer(tmp_path, online(), **EVERY_STEP, **changes)
    trainer.train()
    stream, history = trainer._get_train_sampler().layout, trainer.learnalign.schedule.curriculum.history
    assert (np.diff(history.column("groups")) == stream.chunk_prompts).all()  # a row for each chunk
    chunk = int(np.flatnonzero(history.column("choosing"))[0])
    first = next(step for step in range(13) if stream.batches_trained(step) > chunk * stream.repeats)
    said = capsys.readouterr().out
    assert "steps 1 to 12 train on random prompts, as TRL would, until success is predicted well enough" in said
    assert f"(not before step {first})" in said
    make_trainer(tmp_path, online(), **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "steps 2 to 12 train on random prompts" in (said := capsys.readouterr().out)
    assert f"(not before step {first})" in said
    make_trainer(tmp_path, online(), **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))
    assert "step 12 trains on chosen prompts, as long as choosing helps" in capsys.readouterr().out


# Settings, and small chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reward", "said"), [(0.0, "0.0% .* easier prompts"), (1.0, "100.0% .* harder prompts")])
def test_groups_that_are_nearly_all_dead_are_warned_of(tmp_path, caplog, reward, said):
    settings = replace(EAGER, tried=8)
    sampler = LearnAlignSampler(online(), schedule=partial(OnlineSchedule, settings=settings))
    trainer = tiny.make_trainer(
        tmp_path, reward=lambda completions, **kwargs: [reward] * len(completions), max_steps=4
    )
    trainer.add_callback(LearnAlignCallback(trainer, sampler))
    trainer.train()
    (text,) = [record.message for record in caplog.records if "had a gradient, and" in record.message]
    assert re.fullmatch(f"Of the first 8 groups 0 had a gradient, and {said} teach more\\.", text)


def test_settings_are_those_that_the_sampler_was_given(tmp_path):
    """And the run obeys them; what a reward means is taken from the configuration."""
    changes = {"uniform": 0.0, "cooldown_share": 0.0, "least_cooldown": 3, "most_cooldown": 5, "history_groups": 8}
    settings = replace(EAGER, tried=11, success_threshold=7.0, graded=True, **changes)
    sampler = LearnAlignSampler(online(success_threshold=0.5), schedule=partial(OnlineSchedule, settings=settings))
    paid = Paid()
    trainer = tiny.make_trainer(tmp_path, reward=paid, max_steps=8)
    trainer.add_callback(LearnAlignCallback(trainer, sampler))
    trainer.train()
    curriculum, rows = sampler.schedule.curriculum, [row for chunk in paid.chunks for row in chunk]
    assert (
        curriculum.settings
        == replace(settings, success_threshold=0.5, graded=False, alignment=True)
        == sampler.schedule.settings
    )
    history = curriculum.history
    assert history.column("groups").tolist() == [8, 16, 24, 32]
    # The first three chunks had to be tried, and a fourth was read ahead; later draws are none of them uniform
    assert history.column("uniform_draws").tolist() == [8, 8, 0, 0]
    assert history.column("choosing").tolist() == [0, 0, 1, 1]
    distances = [i - j for i in range(16, 32) for j in range(i) if rows[j] == rows[i]]
    assert min(distances, default=4) > 3
    defaults = LearnAlignSampler(online())
    other = tiny.make_trainer(tmp_path / "other", max_steps=1)
    other.add_callback(LearnAlignCallback(other, defaults))
    assert defaults.schedule.settings == replace(LEARNALIGN, alignment=True)
    plain = LearnAlignSampler(online(score="learnability"))
    again = tiny.make_trainer(tmp_path / "plain", max_steps=1)
    again.add_callback(LearnAlignCallback(again, plain))
    assert plain.schedule.settings == OnlineSettings()


FEW = "An optimizer step trains on "


@pytest.mark.parametrize(
    ("changes", "said", "wanted"),
    [
        ({}, "4 prompts (16 rollouts, 4 for each)", 2),
        ({"gradient_accumulation_steps": 2}, None, None),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, None, None),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 8}, "6 prompts (24 rollouts", 4),
        ({"per_device_train_batch_size": 4}, "1 prompt (4 rollouts", 8),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 2}, "0.5 prompts (2 rollouts", 16),
        # Eleven batches of three would do, but hold no whole groups
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}, "3 prompts (12 rollouts", 12),
        ({"per_device_train_batch_size": 32}, None, None),
    ],
)
def test_steps_of_few_prompts_are_warned_of_with_the_number_to_set(tmp_path, caplog, changes, said, wanted):
    trainer = make_trainer(tmp_path, online(), max_steps=1, **changes)
    trainer.add_callback(StopAtOnce())
    trainer.train()
    warnings = [record.message for record in caplog.records if FEW in record.message]
    if said is None:
        assert not warnings
        return
    (warning,) = warnings
    assert FEW + said in warning and f"Use 8 or more: `gradient_accumulation_steps={wanted}`, or a larger" in warning
    caplog.clear()
    followed = changes | {"gradient_accumulation_steps": wanted}
    trainer = make_trainer(tmp_path / "followed", online(), max_steps=1, **followed)
    trainer.add_callback(StopAtOnce())
    trainer.train()
    assert FEW not in caplog.text


def test_chunks_of_one_prompt_choose_as_chunks_of_four_do(tmp_path, capsys):
    """At the same number of groups, with rewards that the prompts alone decide, and a column that tells of them."""
    dataset = make_dataset(48).add_column("rate", [i % 5 / 5 for i in range(48)])
    found = {}
    for chunk in (1, 4):
        changes = {"per_device_train_batch_size": 4 * chunk, "max_steps": 64 // chunk, "settings": EAGER}
        changes |= {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
        paid = Paid(fixed_reward)
        choice = online(pass_rate_column="rate")
        trainer = make_trainer(tmp_path / str(chunk), choice, reward=paid, dataset=dataset, **changes)
        trainer.train()
        history = trainer.learnalign.schedule.curriculum.history
        assert history.column("groups").tolist() == [16, 32, 48, 64]
        assert history.column("step").tolist() == [groups // chunk - 1 for groups in (16, 32, 48, 64)]
        assert (history.column("choosing") == 1).all()
        assert capsys.readouterr().out.count("from now on prompts are chosen") == 1
        counts = np.bincount([row for rows in paid.chunks for row in rows], minlength=48)
        assert np.count_nonzero(counts) == history.column("visited")[-1] < 46
        live = [len({*own[i : i + 4]}) > 1 for _, own in paid.calls for i in range(0, 4 * chunk, 4)]
        found[chunk] = [np.count_nonzero(counts), np.sort(counts)[-16:].sum(), np.mean(live)]
        assert 0 < history.column("uniform_draws")[1:].sum() < 8
    np.testing.assert_allclose(found[1], found[4], rtol=0.15)
