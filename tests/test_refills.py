"""Batches of several generations: dead groups are refilled, and a resumed run is the run."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import EAGER, Seen, assert_same_weights, make_trainer, online, weights
from trl import RLOOTrainer

from trl_learnalign import (
    LearnAlignCallback,
    LearnAlignConfig,
    LearnAlignGRPOTrainer,
    LearnAlignMixin,
    LearnAlignSampler,
)
from trl_learnalign.curriculum.states import split
from trl_learnalign.host import find_host
from trl_learnalign.schedules.refills import check_refills
from trl_learnalign.schedules.replay import Kept, ReplayBuffer
from trl_learnalign.schedules.staged import StagedSchedule


CHUNKED = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 2}


def reward(completions, row, **kwargs):
    """A third of the prompts has a gradient, whatever the policy writes."""
    return [float(place % 2) if r % 3 == 0 else 0.0 for place, r in enumerate(row)]


class Watched(LearnAlignGRPOTrainer):
    """Keeps every batch that training gets of a generation, and what each generation returned."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        vars(self).setdefault("generated", []).append(output)
        return output

    def _compute_loss(self, model, inputs):
        vars(self).setdefault("trained", []).append(inputs)
        return super()._compute_loss(model, inputs)


def texts(batch, key="ref_per_token_logps"):
    """Of each rollout: prompt, completion, advantage and the log-probabilities `key`, without padding."""
    found, kept = [], batch.get(key)
    for i, advantage in enumerate(batch["advantages"].tolist()):
        prompt, length = batch["prompt_mask"][i].bool(), int(batch["completion_mask"][i].sum())
        logps = () if kept is None else tuple(kept[i, :length].tolist())
        completion = tuple(batch["completion_ids"][i, :length].tolist())
        found.append((tuple(batch["prompt_ids"][i][prompt].tolist()), completion, advantage, logps))
    return sorted(found)


def run(path, resume=None, cls=Watched, **changes):
    seen = Seen(reward)
    settings = {"max_steps": 4, "num_train_epochs": 9, "save_strategy": "steps", "save_steps": 1} | CHUNKED
    choice = online(**{"max_refills": 8, "save_rollouts": True} | changes.pop("config", {}))
    trainer = make_trainer(path, choice, cls=cls, reward=seen, settings=EAGER, **(settings | changes))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, *run(path, beta=0.1)


def test_a_batch_holds_live_groups_alone_and_every_rollout_is_counted_and_kept(whole):
    path, trainer, seen = whole
    live = [row for row in seen.rows if row % 3 == 0]
    assert len(live) >= 4 * 16 and len(seen.rows) > len(live)
    # The rows that had a gradient, as they were generated, in the shape of TRL
    steps = [trainer.trained[i : i + 2] for i in range(0, 8, 2)]
    generated = [row for batch in trainer.generated for row in texts(batch)]
    for batches in steps:
        found = [row for batch in batches for row in texts(batch)]
        assert all(batch["prompt_ids"].shape[0] == 8 for batch in batches) and set(found) <= set(generated)
        assert all(row[2] != 0 for row in found)
        assert {batch["num_items_in_batch"].item() for batch in batches} == {sum(len(row[1]) for row in found)}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(entry["learnalign/rollouts"] for entry in logs) == len(seen.rows)
    assert sum(entry["learnalign/refills"] for entry in logs) == len(seen.rows) / 4 - 4 * 4
    assert all(entry["learnalign/dead_groups"] == 0 for entry in logs)
    history = trainer.learnalign.schedule.curriculum.history
    kept = pd.concat(map(pd.read_parquet, (path / "_learnalign/rollouts/training").glob("*.parquet")))
    assert sorted(kept["index"]) == sorted(seen.rows) and set(kept.groupby("draw").size()) == {4}
    assert kept.groupby("draw")["index"].nunique().eq(1).all()
    assert history.observed == len(seen.rows) / 4 == trainer.learnalign.schedule.curriculum.drawn - 4  # in flight


REPLAYS = {"schedule": "mopps", "prompt_features": True, "replay_share": 0.5, "replay_groups": 3}


@pytest.mark.parametrize("replays", [False, True])
def test_a_resumed_run_is_the_run(tmp_path, whole, replays):
    settings = {"beta": 0.1, "config": REPLAYS if replays else {}}
    path, trainer, _ = (tmp_path, *run(tmp_path, **settings)) if replays else whole
    again, seen = run(path, str(path / "checkpoint-2"), **settings)
    assert_same_weights(weights(again), weights(trainer))
    values, arrays = split(again._get_train_sampler().stream.state_dict())
    expected, others = split(trainer._get_train_sampler().stream.state_dict())
    assert values == expected and arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name])
    assert 0 < len(seen.rows) < sum(entry.get("learnalign/rollouts", 0) for entry in again.state.log_history)
    assert not replays or (len(values["replay"]["single"]) == 1 and arrays["replay/draws"].shape == (3, 2))


def test_after_so_many_rounds_training_goes_on_with_what_there_is(tmp_path, caplog):
    seen = Seen(lambda completions, row, **kwargs: [float(r == 0 and place % 2) for place, r in enumerate(row)])
    trainer = make_trainer(tmp_path, online(max_refills=2), reward=seen, max_steps=2)
    trainer.train()
    assert caplog.text.count("After 2 more generations (`max_refills`)") == 1
    assert 2 * 3 * 16 - 8 <= len(seen.rows) <= 2 * 3 * 16  # at most one group of each chunk was live


class Remembers(Watched):
    """Keeps the policy of each generation; compares each loss with that of a loop over rows without padding."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        policy = weights(self)
        for row in texts(output, "old_per_token_logps"):
            vars(self).setdefault("drawn_by", {})[row] = len(self.generated) - 1, policy
        return output

    def _compute_loss(self, model, inputs):
        loss, losses = super()._compute_loss(model, inputs), []
        for row in texts(inputs, "old_per_token_logps"):
            prompt, completion, advantage, _ = row
            when, policy = self.drawn_by[row]
            now, then = (logps(self.model, one, prompt, completion) for one in ({}, policy))
            ratio = (now - then).exp()
            clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            vars(self).setdefault("ratios", []).append((len(self.generated) - 1 - when, ratio))
            losses.append(-torch.minimum(ratio * advantage, clipped * advantage).mean())
        torch.testing.assert_close(loss.detach() * self.current_gradient_accumulation_steps, sum(losses) / len(losses))
        return loss


@torch.no_grad()
def logps(model, policy, prompt, completion):
    """Log-probabilities of the tokens of a completion, with the weights of `policy`."""
    ids = torch.tensor([*prompt, *completion])
    found = torch.func.functional_call(model, policy, (), {"input_ids": ids[None]}).logits[0].log_softmax(-1)
    return found[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]


@pytest.mark.parametrize("aligned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_replayed_groups_are_clipped_against_the_policy_that_drew_them(tmp_path, aligned):
    """Also where TRL takes no log-probabilities: where each generation is trained on in one step."""
    settings = {"loss_type": "grpo", "learning_rate": 3e-2, "max_steps": 5, "save_strategy": "no"}
    layout = {} if aligned else {"gradient_accumulation_steps": 1, "max_steps": 8}
    trainer, seen = run(tmp_path, cls=Remembers, config=REPLAYS | {"max_refills": 0}, **settings | layout)
    logs = [entry for entry in trainer.state.log_history if "learnalign/rollouts" in entry]
    rollouts = [entry["learnalign/rollouts"] for entry in logs]
    assert rollouts == [16 - 4 * entry.get("learnalign/replayed", 0) for entry in logs]
    assert sum(rollouts) == len(seen.rows) and rollouts[0] == 16 and rollouts[-1] == 8
    replayed = [ratio for age, ratio in trainer.ratios if age > 0]
    assert len(replayed) == len(trainer.ratios) - sum(rollouts) and max(logs[-1]["learnalign/replay_age"], 1) < 4
    assert any((ratio < 0.8).any() or (ratio > 1.2).any() for ratio in replayed)
    again = [row for batch in trainer.trained for row in texts(batch)]
    assert len(set(again)) < len(again) == 16 * len(rollouts)
    buffer = trainer._get_train_sampler().stream.replay
    assert len(buffer.groups) == 3 and all(group.weight > 0 for group in buffer.groups)


def test_a_damaged_buffer_is_refused():
    rows = [{"prompt_ids": np.arange(3), "advantages": np.float32(place)} for place in range(8)]
    buffer = ReplayBuffer(2, 0)
    buffer.add([Kept(0, 0, rows[:4]), Kept(1, 0, rows[4:])])
    state = buffer.state_dict()
    state["values"]["prompt_ids"] = state["values"]["prompt_ids"][1:]
    with pytest.raises(ValueError, match="for replay.*damaged.*23 values instead of 24 in prompt_ids"):
        ReplayBuffer(2, 0).load_state_dict(state, 4)


class RefillingRLOO(LearnAlignMixin, RLOOTrainer):
    pass


@pytest.mark.slow
def test_rloo(tmp_path):
    trainer, seen = run(tmp_path, cls=RefillingRLOO, max_steps=2, save_strategy="no")
    assert len(seen.rows) > 2 * 16 and trainer.state.global_step == 2


def test_where_batches_cannot_be_refilled(tmp_path):
    with pytest.raises(ValueError, match="`max_refills` is 2, but has no effect with `schedule='staged'`"):
        LearnAlignConfig(max_refills=2)
    with pytest.raises(ValueError, match="`replay_share` is 1.0, but a share of a chunk is.*less than 1"):
        online(replay_share=1.0)
    with pytest.raises(ValueError, match="`replay_share` is 0.1, which is 0 of the 4 prompts"):
        make_trainer(tmp_path, online(replay_share=0.1))
    with pytest.raises(ValueError, match="`max_refills` is -1, but must be at least 0"):
        online(max_refills=-1)
    sampler = LearnAlignSampler(online(max_refills=1), schedule=StagedSchedule)
    with pytest.raises(ValueError, match="`max_refills` is 1, but StagedSchedule trains on selected prompts"):
        LearnAlignCallback(make_trainer(tmp_path), sampler)
    trainer = make_trainer(tmp_path)
    host = find_host(trainer)
    host.composes = False
    with pytest.raises(ValueError, match="the batches of a GRPOTrainer are not put together"):
        check_refills(host, None, online(max_refills=1))
