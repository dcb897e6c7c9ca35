"""What a run tells of its rewards and its checkpoints, against what its reward functions were asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_generation import RolloutFunction
from tiny import Seen, config, digit_reward, graded_reward, make_dataset, make_trainer, parity_reward
from trl import GRPOTrainer, RLOOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignGRPOTrainer, LearnAlignSampler, select_prompts
from trl_learnalign.host import find_host


class Counting(LearnAlignGRPOTrainer):
    """Counts the batches of one call of `train`, as an oracle for the number that the tap gives."""

    batches = 0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.batches += 1
        return loss


class Asked:
    """A reward function that notes the batch, the rows and the rewards of each call in training."""

    __name__ = "asked"

    def __init__(self):
        self.trainer, self.calls = None, []

    def __call__(self, completions, row, **kwargs):
        rewards = digit_reward(completions=completions, row=row)
        self.calls.append((self.trainer.batches, row, rewards))
        return rewards


def observed(trainer):
    """A list that grows with every observation."""
    seen = []

    def observer(batch, inputs, completions, rewards, trained, tokens):
        assert rewards.dtype == np.float64 and trained.shape == (len(inputs),) and trained.all()
        assert len(tokens) == len(completions) == len(inputs)
        seen.append((batch, [row["row"] for row in inputs], rewards.copy()))

    find_host(trainer).on_rewards(observer)
    return seen


def run(path, choice, resume=None, **changes):
    asked = Asked()
    # A chunk of 6 prompts or 3; an epoch whose last step is not full
    settings = {"per_device_train_batch_size": 12, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(path, choice, cls=Counting, reward=asked, **(settings | changes))
    asked.trainer = trainer
    seen = observed(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, asked, seen


LAYOUTS = {
    "several chunks a step": {"gradient_accumulation_steps": 3, "steps_per_generation": 1},
    "a chunk over several steps": {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
    "neither divides the other": {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
    "chunks used twice": {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2},
    "chunks used twice, across steps": {
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 1,
        "num_iterations": 2,
    },
}


SLOW = ("a chunk over several steps", "chunks used twice")  # each is a part of another layout
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]


@pytest.mark.parametrize("layout", PARAMETERS)
def test_rewards_of_training_with_the_number_of_their_batch(tmp_path, layout):
    """Also in a run that is resumed, at the first and at the last checkpoint of each place in a chunk."""
    choice, settings = config(score="random", num_prompts=13, warmup_prompts=6), LAYOUTS[layout]
    trainer, asked, seen = run(tmp_path, choice, **settings)
    stream = trainer._get_train_sampler().layout
    assert trainer.batches == 2 * stream.epoch_chunks * stream.repeats
    assert [batch for batch, _, _ in seen] == list(range(0, trainer.batches, stream.repeats))
    for (batch, rows, rewards), (expected, asked_rows, asked_rewards) in zip(seen, asked.calls, strict=True):
        assert (batch, rows) == (expected, asked_rows) and rewards[:, 0].tolist() == asked_rewards
    chunks = [rows for _, rows, _ in seen]
    resumed, places = 0, {}
    for step in range(1, trainer.state.global_step):
        places.setdefault(stream.batches_trained(step) % stream.repeats, []).append(step)
    for step in sorted({step for steps in places.values() for step in (steps[0], steps[-1])}):
        before = stream.batches_trained(step)
        again, asked, seen = run(tmp_path, choice, str(tmp_path / f"checkpoint-{step}"), **settings, save_steps=10**6)
        assert before + again.batches == trainer.batches
        for (batch, rows, _), (since, asked_rows, _) in zip(seen, asked.calls, strict=True):
            assert batch == before + since and rows == asked_rows == chunks[batch // stream.repeats]
        resumed += before % stream.repeats > 0
    assert resumed or stream.repeats == 1


def test_an_evaluation_and_a_selection_are_not_training(tmp_path):
    asked = Asked()
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "num_generations_eval": 2,
        "eval_dataset": make_dataset(4),
    }
    trainer = make_trainer(tmp_path, config(num_prompts=8), cls=Counting, reward=asked, max_steps=4, **settings)
    asked.trainer = trainer
    seen = observed(trainer)
    trainer.train()
    select_prompts(trainer, config(score="learnability"))
    trainer.evaluate()
    assert [batch for batch, _, _ in seen] == [0, 1, 2, 3] and len(asked.calls) > 4 + 4 * 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, of experimental features
def test_a_rollout_function_that_leaves_the_model_in_another_mode(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.rollout_func = RolloutFunction()
    seen = observed(trainer)
    trainer.train()
    assert [batch for batch, _, _ in seen] == [0, 1, 2]


def test_every_reward_function_and_what_it_did_not_score(tmp_path):
    def some(completions, row, **kwargs):
        return [None if r % 3 == 0 else float("inf") if r % 3 == 1 else 0.5 for r in row]

    trainer = make_trainer(tmp_path, reward=[some, graded_reward], max_steps=2)
    seen = observed(trainer)
    trainer.train()
    for _, rows, rewards in seen:
        assert rewards.shape == (len(rows), 2) and np.isfinite(rewards[:, 1]).all()
        assert [value == 0.5 for value in rewards[:, 0]] == [row % 3 == 2 for row in rows]
        assert np.isnan(rewards[:, 0]).tolist() == [row % 3 != 2 for row in rows]


def test_rows_are_those_of_the_rewards_with_the_prompts_that_were_drawn(tmp_path):
    """TRL 1.8 lets an environment write into the prompts of the batch. A subclass may change the order of the rows."""
    dataset, seen, reward = make_dataset(conversational=True), [], Seen()
    trainer = make_trainer(tmp_path, reward=reward, dataset=dataset, max_steps=2)
    generate = trainer._generate_and_score_completions

    def adds(inputs):
        for row in inputs:
            row["prompt"][-1]["content"] += "7"
        return generate(inputs[::-1])

    trainer._generate_and_score_completions = adds
    find_host(trainer).on_rewards(lambda batch, inputs, *others: seen.extend(inputs))
    trainer.train()
    assert len(seen) == 32 and [row["row"] for row in seen] == reward.rows
    assert all(row["prompt"] == dataset[row["row"]]["prompt"] for row in seen)


def test_a_second_training_counts_from_its_own_beginning(tmp_path):
    trainer = make_trainer(tmp_path, reward=Seen(), max_steps=2)
    seen = observed(trainer)

    def stops(completions, row, **kwargs):
        raise KeyboardInterrupt

    trainer.train()
    reward, trainer.reward_funcs[0] = trainer.reward_funcs[0], stops
    with pytest.raises(KeyboardInterrupt):  # inside the first step
        trainer.train()
    trainer.reward_funcs[0] = reward
    trainer.train()
    assert [batch for batch, _, _ in seen] == [0, 1, 0, 1]


def test_methods_that_the_user_has_patched(tmp_path):
    """Before and after: both stay in force, and when the tap is gone nothing of it is left."""
    trainer, calls, numbers = make_trainer(tmp_path, reward=parity_reward, max_steps=1), [], []
    stock = trainer._calculate_rewards

    def own(*args):
        calls.append("own")
        return stock(*args) + 1

    trainer._calculate_rewards = own
    before = dict(vars(trainer))
    end = find_host(trainer).on_rewards(
        lambda batch, inputs, completions, rewards, *others: numbers.extend(rewards.ravel())
    )
    trainer.train()
    assert calls == ["own"] and set(numbers) <= {1.0, 2.0}
    end()
    assert all(vars(trainer)[name] is before[name] for name in ("_calculate_rewards",))
    assert not {"training_step", "_generate_and_score_completions"} & vars(trainer).keys()

    end = find_host(trainer).on_rewards(lambda *args: calls.append("tap"))
    tapped = trainer._calculate_rewards

    def later(*args):
        calls.append("later")
        return tapped(*args)

    trainer._calculate_rewards = later
    calls.clear()
    trainer.train()
    assert calls == ["later", "own", "tap"]
    end()
    end()
    calls.clear()
    trainer.train()
    assert calls == ["later", "own"] and vars(trainer)["_calculate_rewards"] is later


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_what_is_written_before_a_checkpoint_is_part_of_it(tmp_path, cls):
    """By the callback on a trainer already built."""
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 2, "cls": cls}
    trainer = make_trainer(tmp_path, **args)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config(score="random", warmup_prompts=0))))
    written, before = [], vars(trainer)["_save_checkpoint"]  # the callback's own

    def write(directory, is_writer, peers):
        assert is_writer and directory.is_dir() and not (directory / "trainer_state.json").exists()
        (directory / "state.bin").write_bytes(b"%d" % trainer.state.global_step)
        trainer.state.stateful_callbacks["written"] = {"step": trainer.state.global_step}
        written.append(directory.name)

    end = find_host(trainer).before_checkpoint(write)
    trainer.train()
    assert written == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for step in (2, 3):  # the first was deleted, whole
        directory = Path(tmp_path, f"checkpoint-{step}")
        state = json.loads((directory / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["written"] == {"step": step}
        assert (directory / "state.bin").read_bytes() == b"%d" % step
    assert not (tmp_path / "checkpoint-1").exists()
    end()
    assert vars(trainer)["_save_checkpoint"] is before
