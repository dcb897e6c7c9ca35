"""Gradients of groups from training's own backward passes, against one plain backward per group."""

import numpy as np
import pytest
import torch
from tiny import (
    assert_same_weights,
    fixed_reward,
    lora,
    make_trainer,
    online,
    weights,
)
from transformers import TrainerCallback
from trl import RLOOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler, Schedule
from trl_learnalign.curriculum import Gradient
from trl_learnalign.gradients.sketch import Sketch
from trl_learnalign.gradients.training import GroupGradients
from trl_learnalign.host import objective
from trl_learnalign.host.gradient_tap import ROW
from trl_learnalign.schedules import LearnsFromGradients


DIM = 512


class Wants(Schedule, LearnsFromGradients):
    """Random rows; keeps what it is given: the events in their order."""

    gradient_dim: int | None = DIM

    def __init__(self, run):
        super().__init__(run)
        self.drawn, self.events, self.reasons = 0, [], []

    def choose(self, n):
        rows = np.random.default_rng(self.drawn).permutation(self.run.pool_size)[:n]
        self.drawn += n
        return rows

    def observe(self, groups):
        self.events.append([(group.number, group.row) for group in groups])

    def observe_gradients(self, gradients):
        self.events.append(list(gradients))

    def no_gradients(self, reason):
        self.reasons.append(reason)

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]

    @property
    def gradients(self):
        return {one.number: one for event in self.events for one in event if isinstance(one, Gradient)}


class WantsNone(Wants):
    gradient_dim = None


def tapped(path, schedule=Wants, **changes):
    """A trainer with eight groups of four a chunk, some of them dead."""
    settings = {"reward": fixed_reward, "per_device_train_batch_size": 32, "max_steps": 3}
    trainer = make_trainer(path, **(settings | changes))
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(online(), schedule=schedule)))
    return trainer


class Oracle(TrainerCallback):
    """
    By chunk and place of a group, its exact gradient: of the trainer's own loss of each microbatch of the first
    iteration, with the advantages of all other rows zeroed, as it was before the trainer's own.
    """

    def __init__(self, trainer):
        self.trainer, self.chunks, self.lengths = trainer, [], set()
        self._seen = set()
        trainer.add_callback(self)

    def on_train_begin(self, *args, **kwargs):
        trainer, taken = self.trainer, self.trainer.compute_loss
        generate = trainer._generate_and_score_completions

        def generates(inputs):
            output = generate(inputs)
            self.chunks.append({})
            self._seen = set()
            return output

        def compute_loss(model, inputs, **kwargs):
            rows = tuple(inputs[ROW].tolist())
            if trainer.model.training and rows not in self._seen:
                self._seen.add(rows)
                self._take(rows, inputs)
            return taken(model, inputs, **kwargs)

        trainer._generate_and_score_completions, trainer.compute_loss = generates, compute_loss

    def _take(self, rows, inputs):
        trainer, groups = self.trainer, torch.tensor(rows) // 4
        self.lengths |= set(inputs["completion_mask"].sum(1).tolist())
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        for group in groups.unique().tolist():
            own = inputs | {"advantages": inputs["advantages"] * (groups == group)}
            before = [p.grad for p in parameters]
            if trainer.args.gradient_checkpointing:  # which wants `backward`
                for p in parameters:
                    p.grad = None
                type(trainer).compute_loss(trainer, trainer.model, own).backward()
                gradients = [p.grad for p in parameters]
                for p, grad in zip(parameters, before, strict=True):
                    p.grad = grad
            else:
                loss = type(trainer).compute_loss(trainer, trainer.model, own)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            found = torch.cat([grad.double().flatten() for grad in gradients]) / trainer.accelerator.num_processes
            self.chunks[-1][group] = self.chunks[-1].get(group, 0) + found


def sketched(trainer, exact):
    """The sketch of an exact gradient, as the taps' own engine makes it."""
    layers = GroupGradients(trainer.model, None, 0)._layers
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    sink, out, start = Sketch(sizes, DIM, trainer.args.seed), torch.zeros(1, DIM), 0
    for name, size in sizes.items():
        sink.add_(out, name, slice(None), exact[None, start : start + size])
        start += size
    return out[0].double()


def assert_equal_to_oracle(trainer, oracle, least=0.9999):
    schedule, compared = trainer.learnalign.schedule, 0
    assert schedule.reasons == []
    for chunk, groups in enumerate(oracle.chunks[:-1]):
        for place, exact in groups.items():
            given = schedule.gradients[8 * chunk + place]
            expected, found = sketched(trainer, exact), torch.from_numpy(given.sketch).double()
            assert found.dtype == torch.float64 and given.sketch.dtype == np.float32
            if expected.norm() == 0:
                assert found.norm() == 0
                continue
            cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
            assert cosine >= least and found.norm().item() == pytest.approx(
                expected.norm().item(), rel=100 * (1 - least)
            ), cosine
            compared += 1
    assert compared >= 4 and len(oracle.lengths) > 2
    return compared


SETTINGS = {
    "one microbatch": {},
    "accumulation": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "a chunk over several steps": {"per_device_train_batch_size": 8, "steps_per_generation": 4, "max_steps": 9},
    "iterations": {"per_device_train_batch_size": 16, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 9},
    "neither divides the other": {
        "per_device_train_batch_size": 16,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 3,
    },
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "RLOO": {"cls": RLOOTrainer, "per_device_train_batch_size": 16, "steps_per_generation": 2, "max_steps": 5},
    "bfloat16": {"bf16": True},
    "bfloat16 and checkpointing": {
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "dropout": {"peft": lora(lora_dropout=0.2)},
}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "dropout"])
def test_a_group_has_the_gradient_of_a_plain_backward(tmp_path, name):
    trainer = tapped(tmp_path, **SETTINGS[name])
    oracle = Oracle(trainer)
    trainer.train()
    assert_equal_to_oracle(trainer, oracle, 0.999 if "bfloat16" in name else 0.9999)


LOSSES = [(loss, level) for loss in objective.LOSS_TYPES for level in objective.LEVELS]


@pytest.mark.parametrize(
    ("loss", "level"),
    [pytest.param(*both, marks=[] if both[1] == "token" else pytest.mark.slow) for both in LOSSES],
)
def test_every_loss(tmp_path, loss, level):
    trainer = tapped(
        tmp_path,
        loss_type=loss,
        importance_sampling_level=level,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=2,
    )
    oracle = Oracle(trainer)
    trainer.train()
    assert_equal_to_oracle(trainer, oracle)


class Taken(TrainerCallback):
    """The gradient that the optimizer gets at every step."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args, **kwargs):
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.steps.append(torch.cat([p.grad.flatten() for p in parameters]))


def test_groups_add_up_to_the_gradient_that_the_optimizer_gets(tmp_path):
    """With a KL term and an entropy bonus, which are of every group."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
    trainer = tapped(tmp_path, beta=0.2, entropy_coef=0.1, top_entropy_quantile=0.5, **settings)
    taken = Taken(trainer)
    trainer.train()
    given = trainer.learnalign.schedule.gradients
    for step, exact in enumerate(taken.steps[:-1]):
        total = sum(torch.from_numpy(given[number].sketch) for number in range(8 * step, 8 * step + 8))
        torch.testing.assert_close(total.double(), sketched(trainer, exact), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_bit_for_bit_the_run_that_it_would_be(tmp_path, name):
    """Weights, and the random numbers that are drawn next."""
    runs = []
    for schedule in (Wants, WantsNone):
        trainer = tapped(tmp_path, schedule, **SETTINGS[name])
        methods = {"training_step", "compute_loss", "_generate_and_score_completions"}
        before = {key: value for key, value in vars(trainer).items() if key in methods}
        trainer.train()
        assert before == {key: value for key, value in vars(trainer).items() if key in methods}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
        runs.append((weights(trainer), torch.rand(1), trainer.learnalign.schedule))
    (ours, random, schedule), (plain, other, unwilling) = runs
    assert_same_weights(ours, plain)
    assert random == other and schedule.gradients and not unwilling.gradients


def test_gradients_come_before_the_rewards_of_the_next_chunk(tmp_path):
    """With the numbers and rows of the draws; dead groups with zeros."""
    trainer = tapped(tmp_path)
    trainer.train()
    events = trainer.learnalign.schedule.events
    assert len(events) == 6 and events[0] == []  # before the first rewards there is no chunk
    for rewarded, gradients in zip(events[1::2], events[2::2], strict=False):
        assert [(one.number, one.row) for one in gradients] == rewarded
        live = [len({*fixed_reward([""] * 4, [row] * 4)}) > 1 for _, row in rewarded]
        assert [bool(one.sketch.any()) for one in gradients] == live and 0 < sum(live) < 8
