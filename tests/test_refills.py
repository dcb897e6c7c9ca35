"""Batches of several generations: dead groups are refilled, and a resumed run is the run."""

import numpy as np
import pytest
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


def texts(batch):
    """Of each rollout: prompt, completion, advantage and log-probabilities that it was drawn with, without padding."""
    found, old = [], batch.get("old_per_token_logps")
    for i, advantage in enumerate(batch["advantages"].tolist()):
        prompt, length = batch["prompt_mask"][i].bool(), int(batch["completion_mask"][i].sum())
        logps = () if old is None else tuple(old[i, :length].tolist())
        completion = tuple(batch["completion_ids"][i, :length].tolist())
        found.append((tuple(batch["prompt_ids"][i][prompt].tolist()), completion, round(advantage, 5), logps))
    return sorted(found)


def run(path, resume=None, cls=Watched, **changes):
    seen = Seen(reward)
    settings = {"max_steps": 4, "num_train_epochs": 9, "save_strategy": "steps", "save_steps": 1} | CHUNKED
    choice = online(max_refills=8, **changes.pop("config", {}))
    trainer = make_trainer(path, choice, cls=cls, reward=seen, settings=EAGER, **(settings | changes))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, *run(path, beta=0.1)


def test_a_batch_holds_live_groups_alone_and_every_rollout_is_counted(whole):
    _, trainer, seen = whole
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
    assert history.observed == len(seen.rows) / 4 == trainer.learnalign.schedule.curriculum.drawn - 4  # in flight


@pytest.mark.parametrize("schedule", ["online", "mopps"])
def test_a_resumed_run_is_the_run(tmp_path, whole, schedule):
    settings = {"beta": 0.1, "config": {} if schedule == "online" else {"schedule": schedule, "prompt_features": True}}
    path, trainer, _ = whole if schedule == "online" else (tmp_path, *run(tmp_path, **settings))
    again, seen = run(path, str(path / "checkpoint-2"), **settings)
    assert_same_weights(weights(again), weights(trainer))
    values, arrays = split(again._get_train_sampler().stream.state_dict())
    expected, others = split(trainer._get_train_sampler().stream.state_dict())
    assert values == expected and arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name])
    assert 0 < len(seen.rows) < sum(entry.get("learnalign/rollouts", 0) for entry in again.state.log_history)


def test_after_so_many_rounds_training_goes_on_with_what_there_is(tmp_path, caplog):
    seen = Seen(lambda completions, row, **kwargs: [float(r == 0 and place % 2) for place, r in enumerate(row)])
    trainer = make_trainer(tmp_path, online(max_refills=2), reward=seen, max_steps=2)
    trainer.train()
    assert caplog.text.count("After 2 more generations (`max_refills`)") == 1
    assert 2 * 3 * 16 - 8 <= len(seen.rows) <= 2 * 3 * 16  # at most one group of each chunk was live


class RefillingRLOO(LearnAlignMixin, RLOOTrainer):
    pass


@pytest.mark.slow
def test_rloo(tmp_path):
    trainer, seen = run(tmp_path, cls=RefillingRLOO, max_steps=2, save_strategy="no")
    assert len(seen.rows) > 2 * 16 and trainer.state.global_step == 2


def test_where_batches_cannot_be_refilled(tmp_path):
    with pytest.raises(ValueError, match="`max_refills` is 2, but has no effect with `schedule='staged'`"):
        LearnAlignConfig(max_refills=2)
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
