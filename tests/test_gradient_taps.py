"""Gradients of groups from training's own backward passes, against one plain backward per group."""

import re
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import (
    assert_same_weights,
    config,
    fixed_reward,
    lora,
    make_dataset,
    make_model,
    make_trainer,
    online,
    peak_bytes,
    weights,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from trl import RLOOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler, Schedule, select_prompts
from trl_learnalign.curriculum import Gradient
from trl_learnalign.gradients.sketch import Sketch
from trl_learnalign.gradients.training import GroupGradients
from trl_learnalign.ground.randomness import random_state, set_random_state
from trl_learnalign.host import find_host, gradient_tap, objective
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
        # On several processes all of them, as the loss has collectives
        several, chunk = trainer.accelerator.num_processes > 1, trainer.args.generation_batch_size // 4
        for group in range(chunk) if several else groups.unique().tolist():
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
            found = torch.cat([grad.double().flatten().cpu() for grad in gradients])
            found /= trainer.accelerator.num_processes
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


# Each is a part of another, or covered by the test of every loss
SLOW = {"one microbatch", "accumulation", "a chunk over several steps", "bfloat16", "checkpointing"}
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SETTINGS]


@pytest.mark.parametrize("name", [parameter for parameter in PARAMETERS if parameter != "dropout"])
def test_a_group_has_the_gradient_of_a_plain_backward(tmp_path, name):
    trainer = tapped(tmp_path, **SETTINGS[name])
    oracle = Oracle(trainer)
    trainer.train()
    assert_equal_to_oracle(trainer, oracle, 0.999 if "bfloat16" in name else 0.9999)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["accumulation", "iterations", "bfloat16", "bfloat16 and checkpointing"])
def test_a_group_has_the_gradient_of_a_plain_backward_on_a_gpu(tmp_path, name):
    trainer = tapped(tmp_path, use_cpu=False, **SETTINGS[name])
    oracle = Oracle(trainer)
    trainer.train()
    assert trainer.model.device.type == "cuda"
    assert_equal_to_oracle(trainer, oracle, 0.999 if "bfloat16" in name else 0.9999)


LOSSES = [(loss, level) for loss in objective.LOSS_TYPES for level in objective.LEVELS]
FAST = ("dapo", "token"), ("vespo", "token"), ("luspo", "sequence")


@pytest.mark.parametrize(
    ("loss", "level"),
    [pytest.param(*both, marks=[] if both in FAST else pytest.mark.slow) for both in LOSSES],
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


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_is_bit_for_bit_the_run_that_it_would_be(tmp_path, name):
    """Weights, and the random numbers that are drawn next."""
    runs = []
    for schedule in (Wants, WantsNone):
        trainer = tapped(tmp_path, schedule, **SETTINGS[name])
        methods = {"training_step", "compute_loss", "_generate_and_score_completions"}
        before = {key: value for key, value in vars(trainer).items() if key in methods}
        trainer.train()
        assert before == {key: value for key, value in vars(trainer).items() if key in methods}
        linear = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)]
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in linear)
        runs.append((weights(trainer), torch.rand(1), trainer.learnalign.schedule))
    (ours, random, schedule), (plain, other, unwilling) = runs
    assert_same_weights(ours, plain)
    assert random == other and schedule.gradients and not unwilling.gradients


def test_gradients_come_before_the_rewards_of_the_next_chunk(tmp_path):
    """With the numbers and rows of the draws; dead groups with zeros."""
    trainer = tapped(tmp_path)
    trainer.train()
    events = trainer.learnalign.schedule.events
    assert len(events) == 5
    for rewarded, gradients in zip(events[::2], events[1::2], strict=False):
        assert [(one.number, one.row) for one in gradients] == rewarded
        live = [len({*fixed_reward([""] * 4, [row] * 4)}) > 1 for _, row in rewarded]
        assert [bool(one.sketch.any()) for one in gradients] == live and 0 < sum(live) < 8


class ByRow(Oracle):
    """By chunk and row of the dataset, told by the prompt; and how many rollouts it has there."""

    def _take(self, rows, inputs):
        prompts = [self.trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in inputs["prompt_ids"]]
        texts, known = [prompt.replace(" ", "") for prompt in prompts], self.trainer.train_dataset["prompt"][:]
        vars(self).setdefault("counts", []).append(Counter(known.index(text) for text in texts))
        super()._take([4 * known.index(text) for text in texts], inputs)


@pytest.mark.parametrize("settings", [{"max_refills": 3}, {"replay_share": 0.25}])
def test_gradients_of_batches_from_several_generations(tmp_path, settings):
    """Groups that take the places of dead ones have their own, and replayed groups none that is given."""
    trainer = make_trainer(tmp_path, reward=fixed_reward, per_device_train_batch_size=32, max_steps=4)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(online(**settings), schedule=Wants)))
    oracle = ByRow(trainer)
    trainer.train()
    given = [event for event in trainer.learnalign.schedule.events if isinstance(event[0], Gradient)]
    compared, moved = 0, 0
    for part, exact, counts in zip(given, oracle.chunks, oracle.counts, strict=False):
        moved += max(one.number for one in part) - min(one.number for one in part) > 7
        assert len({one.number for one in part}) == len(part)
        for row in {one.row for one in part}:
            own = [torch.from_numpy(one.sketch).double() for one in part if one.row == row]
            if 4 * len(own) == counts[row]:  # else it is replayed as well
                torch.testing.assert_close(sum(own), sketched(trainer, exact[row]), rtol=1e-3, atol=1e-6)
                compared += len(own)
    replays = "replay_share" in settings
    assert [len(part) for part in given] == ([8, 6, 6] if replays else [8] * 3)
    assert compared > 12 if replays else (compared, moved > 0) == (24, True)


def saved(path, schedule=Wants, **changes):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "num_train_epochs": 2}
    return tapped(path, schedule, **(settings | changes))


def sketches(gradients):
    return {number: (one.row, one.sketch.tolist()) for number, one in gradients.items()}


def test_a_resumed_run_gives_the_same_gradients(tmp_path):
    """Those of the chunk before the checkpoint come from it, bit for bit."""
    trainer = saved(tmp_path)
    trainer.train()
    whole = sketches(trainer.learnalign.schedule.gradients)
    assert set(whole) == set(range(40))
    again = saved(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(weights(again), weights(trainer))
    assert sketches(again.learnalign.schedule.gradients) == {n: whole[n] for n in range(16, 40)}


def test_a_checkpoint_inside_a_chunk_holds_the_groups_that_have_come_whole(tmp_path):
    """The chunk is generated again in a resumed run, and all its groups come; none comes of rows of both."""
    settings = {"per_device_train_batch_size": 8, "steps_per_generation": 4, "num_generations": 2}
    trainer = saved(tmp_path, **settings)
    trainer.train()
    whole = sketches(trainer.learnalign.schedule.gradients)
    resumed = saved(tmp_path, **settings, max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    first, groups, again = resumed.learnalign.schedule.events[:3]
    assert [number for number, _ in groups] == [one.number for one in again] == list(range(16))
    assert 0 < len(first) < 16 and sketches({one.number: one for one in first}).items() <= whole.items()
    assert all(again[one.number].sketch.any() or not one.sketch.any() for one in first)


@pytest.mark.parametrize("fault", ["length", "rows", "sums", "came"])
def test_damaged_sums_are_refused(tmp_path, fault):
    trainer = saved(tmp_path, max_steps=2)
    trainer.train()
    stream = trainer.learnalign._callback.sampler.stream
    state = stream.state_dict()
    sums = state["gradients"]
    match fault:
        case "length":
            sums["sums"] = sums["sums"][:, :7]
        case "rows":
            sums["rows"] = sums["rows"] + 24
        case "sums":
            sums["sums"] = sums["sums"][:5]
        case "came":
            del sums["came"]
    with pytest.raises(ValueError, match="length 7, but this run makes them 512" if fault == "length" else "damaged"):
        stream.load_state_dict(state)
        trainer.learnalign._callback._tap.begin(0)


OBSTACLES = {
    "whole model": ({"peft": False}, "the whole model is trained"),
    "DoRA": ({"peft": lora(use_dora=True)}, "no weights of linear layers: .*lora_magnitude_vector"),
    "saved modules": ({"peft": lora(modules_to_save=["embed_tokens"])}, "embed_tokens"),
    "target parameters": ({"peft": lora(target_parameters=["q_proj.weight"], target_modules=[])}, "target_parameters"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_where_they_cannot_be_had_the_schedule_is_told_once(tmp_path, name):
    changes, reason = OBSTACLES[name]
    trainer = tapped(tmp_path, max_steps=2, **changes)
    trainer.train()
    schedule = trainer.learnalign.schedule
    assert len(schedule.reasons) == 1 and re.search(reason, schedule.reasons[0]), schedule.reasons
    assert not schedule.gradients and len(schedule.events) == 2 and trainer.state.global_step == 2


def test_a_compiled_layer_is_an_obstacle(tmp_path):
    trainer = tapped(tmp_path)
    host = find_host(trainer)
    assert host.gradients_obstacle() is None
    trainer.model_wrapped = torch.compile(trainer.model)  # as `accelerate launch --dynamo_backend` does
    assert "compiled" in host.gradients_obstacle()
    trainer.model_wrapped = trainer.model
    trainer.model.base_model.model.model.layers[0].mlp.compile()
    assert "compiled" in host.gradients_obstacle()


def test_a_layer_too_large_for_a_gradient_of_each_group_is_an_obstacle(tmp_path, monkeypatch):
    """The head of a model, as `modules_to_save` trains it: a gigabyte for each group."""
    model = make_model(tie_word_embeddings=False)
    size = model.lm_head.weight.numel()
    host = find_host(tapped(tmp_path, model=model, peft=lora(modules_to_save=["lm_head"])))
    monkeypatch.setattr(gradient_tap, "_MOST", size)
    assert host.gradients_obstacle() is None
    monkeypatch.setattr(gradient_tap, "_MOST", size - 1)
    assert re.search("fill the memory: .*lm_head.modules_to_save", host.gradients_obstacle())


def test_a_weight_used_without_its_layer_ends_them(tmp_path):
    """Seen in the first backward; said when the next chunk is generated, and nothing was given before."""
    trainer = tapped(tmp_path)
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("q_proj.lora_A.default"))

    def around(*args, **kwargs):
        return torch.nn.functional.linear(args[0], layer.weight)

    layer.__class__ = type("Fused", (type(layer),), {"__call__": lambda self, x: around(x)})
    trainer.train()
    schedule = trainer.learnalign.schedule
    assert len(schedule.reasons) == 1 and "q_proj.lora_A.default" in schedule.reasons[0]
    assert not schedule.gradients and len(schedule.events) == 3


def test_layers_whose_tokens_are_mixed_end_them(tmp_path):
    runs = []
    for schedule in (Wants, WantsNone):
        trainer = tapped(tmp_path, schedule)
        mlp = trainer.model.base_model.model.model.layers[0].mlp
        mlp.forward = lambda x, forward=mlp.forward: forward(x.flatten(0, 1)[None]).view_as(x)
        trainer.train()
        runs.append((weights(trainer), trainer.learnalign.schedule.reasons))
    (ours, (reason,)), (plain, _) = runs
    assert "cannot be assigned to prompts" in reason
    assert_same_weights(ours, plain)


@pytest.mark.slow
def test_evaluations_and_selections_leave_no_trace(tmp_path):
    """A selection takes gradients of the same layers, and generates as well."""

    class Selects(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                select_prompts(trainer, config(score="learnalign", num_prompts=4))

    settings = {"steps_per_generation": 2, "per_device_train_batch_size": 16, "max_steps": 5}
    trainer = tapped(tmp_path, **settings)
    trainer.train()
    expected = sketches(trainer.learnalign.schedule.gradients)
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = tapped(tmp_path, eval_dataset=make_dataset(4), **settings)
    trainer.add_callback(Selects())
    with random_numbers_kept_by_evaluations(trainer):
        trainer.train()
    assert len(expected) == 16 and sketches(trainer.learnalign.schedule.gradients) == expected


@contextmanager
def random_numbers_kept_by_evaluations(trainer):
    """As an evaluation generates as well, which draws some."""

    def evaluate(*args, evaluate=trainer.evaluate, **kwargs):
        state = random_state()
        found = evaluate(*args, **kwargs)
        set_random_state(state)
        return found

    trainer.evaluate = evaluate
    yield


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_more_memory_in_bfloat16(tmp_path, checkpointing):
    """A LoRA in float32 whose input is cast twice: what autograd keeps is in bfloat16, and nothing else is kept."""

    def peak(schedule):
        model = make_model(hidden_size=64, intermediate_size=176, num_hidden_layers=2).to(torch.bfloat16)
        kwargs = {"use_reentrant": False} if checkpointing else None
        settings = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": kwargs}
        trainer = tapped(tmp_path, schedule, model=model, bf16=True, max_steps=1, **settings)
        step, found = trainer.compute_loss, []

        def measured(*args, **kwargs):
            loss = None

            def whole():
                nonlocal loss
                loss = step(*args, **kwargs)
                loss.backward(retain_graph=False)

            found.append(peak_bytes(whole))
            for p in trainer.model.parameters():
                p.grad = None
            return step(*args, **kwargs)

        class Begins(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                nonlocal step
                step, trainer.compute_loss = trainer.compute_loss, measured

        trainer.add_callback(Begins())
        trainer.train()
        assert {parameter.dtype for parameter in weights(trainer).values()} == {torch.float32}
        return found[0]

    assert peak(Wants) <= 1.05 * peak(WantsNone)


@pytest.mark.slow
def test_little_more_work(tmp_path):
    """Products of matrices in a whole step, with its generation, where every group is live."""

    def count(schedule):
        model = make_model(hidden_size=64, intermediate_size=176, num_hidden_layers=1)
        trainer = tapped(tmp_path, schedule, model=model, max_steps=1)
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        return counter.get_total_flops()

    assert count(WantsNone) < count(Wants) <= 1.03 * count(WantsNone)
