"""
What test_distributed.py starts on one or more processes: a task, an output directory; a JSON file per rank comes out.
Further pairs are run one after another by the same processes, since starting them takes longer than most tasks.
"""

import json
import os
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from test_gradient_taps import Oracle, saved, sketched
from test_judging import by_word, unfitted
from tiny import (
    EAGER,
    Seen,
    config,
    digit_reward,
    drawn,
    fixed_reward,
    make_dataset,
    make_model,
    make_trainer,
    online,
    planned,
    weights,
)
from torch.distributed import fsdp
from transformers import TrainerCallback
from trl import RLOOTrainer

from trl_learnalign import LearnAlignSampler, select_prompts
from trl_learnalign.curriculum.states import split
from trl_learnalign.ground.peers import Peers
from trl_learnalign.host import find_host, objective
from trl_learnalign.host.weights import weights_digest
from trl_learnalign.measures import ask, demonstration, hidden_states, likelihood
from trl_learnalign.report.selecting import select_at_stage
from trl_learnalign.schedules import StagedSchedule, checkpoint


def allow_sharding_on_cpu():
    """Accelerate takes FSDP and DeepSpeed for GPUs only. All the rest of their paths runs on CPUs as well."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        kind = None
        if fsdp_plugin is not None:
            self.fsdp_plugin, kind = fsdp_plugin, DistributedType.FSDP
            if isinstance(fsdp_plugin.cpu_offload, fsdp.CPUOffloadPolicy):  # memory can be pinned for a GPU only
                fsdp_plugin.cpu_offload = fsdp.CPUOffloadPolicy(pin_memory=False)
        elif deepspeed_plugin is not None:
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            # Or ZeRO-3 keeps small parameters whole, and here all are small
            deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            self.deepspeed_plugins, kind = deepspeed_plugin, DistributedType.DEEPSPEED
        if kind is not None:
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = kind

    AcceleratorState.__init__ = init
    # FSDP1 finds that "cpu" is not "cpu:0"
    fsdp._init_utils._get_compute_device = lambda *args: torch.device("cpu")


class Digests(TrainerCallback):
    """The digest of the weights when training begins and after every step."""

    def __init__(self, trainer):
        self.trainer, self.by_step = trainer, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.by_step[state.global_step] = weights_digest(self.trainer)

    on_train_begin = on_step_end


class HiddenStates(TrainerCallback):
    """
    The features of the prompts when training begins, and the forwards that they took; the likelihoods of answers, the
    opinion of a judge, and the worth of worked examples, all of which are made to help.
    """

    def __init__(self, trainer, path):
        self.trainer, self.path, self.found = trainer, path, {}

    def on_train_begin(self, args, state, control, **kwargs):
        forwards = []
        host = find_host(self.trainer)
        with Peers(self.trainer.accelerator) as peers:
            backbone = host.model.get_base_model().get_decoder()
            hook = backbone.register_forward_pre_hook(
                lambda module, args, kwargs: forwards.append(kwargs["input_ids"].dim()), with_kwargs=True
            )
            values = hidden_states.hidden_states(host, Path(self.path), peers).values
            hook.remove()
            if host.accelerator.is_main_process:
                unfitted().save_pretrained(Path(self.path, "judge"))
                by_word().save_pretrained(Path(self.path, "judge"))
            peers.wait()
        by_confidence = config(score="confidence", answer_column="row")
        likelihoods = select_at_stage(self.trainer, by_confidence, 0).scores["answer_likelihood"].to_pylist()
        judged = config(score="ask", judge_model=str(Path(self.path, "judge")))
        helpful = config(score="demonstration", answer_column="row")
        others = [select_at_stage(self.trainer, one, 0).scores["score"].to_pylist() for one in (judged, helpful)]
        compared = 0 if host.is_sharded else 2  # once whole and once half
        self.found = {
            "features": values.tolist(),
            "likelihoods": [likelihoods, *others],
            "forwards": len(forwards) - compared,
            "dimensions": sorted(set(forwards)),
        }


def train(path, seen, **changes):
    choice = config(**changes.pop("config", {}))
    trainer = make_trainer(path, choice, reward=seen, dataset=make_dataset(23), num_train_epochs=3, **changes)
    trainer.add_callback(Digests(trainer))
    return trainer


@contextmanager
def failure(task, rank):
    """A fault on rank 1 alone, until the next task."""
    original, limits = objective.policy_objective, resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        fail(task, original, limits)
    try:
        yield
    finally:
        objective.policy_objective = original
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail(task, original, limits):
    match task:
        case "loss is not a number":
            objective.policy_objective = lambda *args: original(*args) * float("nan")
        case "memory is full":

            def small(trainer, rows):
                if len(rows) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return original(trainer, rows)

            objective.policy_objective = small
        case "disk is full":  # no file may grow beyond 8 kB: rollouts fit, sketches do not
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))


def run_online(task, path, seen, **kwargs):
    """The trainer, and what it and its schedule have to say, after a run whose rewards depend on the prompts alone."""
    rank = int(os.environ.get("RANK", 0))
    if task in ("online alone", "resume online doubled"):
        kwargs["per_device_train_batch_size"] = 16
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1} | kwargs
    settings |= {"save_strategy": "no"} if task == "online draws otherwise" else {}
    seen.reward = fixed_reward
    if task == "online reward returns texts" and rank == 1:
        seen.reward = lambda completions, row, **kwargs: ["1.0"] * len(row)
    aligned = task.endswith("online aligned")  # else nothing depends on gradients, whose last digits may differ
    refills = {}
    if task.endswith("online refilled"):  # three groups of four, the second of which is on both
        settings["per_device_train_batch_size"] = 6
        refills = {"max_refills": 9, "replay_share": 0.34, "replay_groups": 4}
    choice = online(
        **refills,
        prompt_features=aligned or task == "online with hidden states",
        score="learnalign" if aligned else "learnability",
    )
    eager = replace(EAGER, gradient_groups=4, gradient_dim=256, begin_trust=-9.0, least_trust=-9.0, tried_gradients=4)
    trainer = make_trainer(path, choice, reward=seen, dataset=make_dataset(23), settings=eager, **settings)
    schedule, result = trainer.learnalign.schedule, {"chunks": drawn(trainer)}

    class Fault(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 3:
                memory = schedule.curriculum.memory
                if task == "online differs":
                    memory.visits[0] += 1
                elif task == "online draws otherwise":  # and no checkpoint is saved that would find it out
                    memory.ready[:] = 0
                    memory.failures[:] = np.arange(23)
                elif task == "online asks otherwise":  # by a number that no checkpoint compares
                    memory.surprise[:] = 3

    def full(*args, original=checkpoint.write_arrays):
        if task == "online cannot write" and rank == 0 and trainer.state.global_step == 3:
            raise OSError("no space left")
        return original(*args)

    if refills:
        result["trained"] = trained = []
        prepare = trainer._prepare_inputs

        def prepares(inputs):
            batch = prepare(inputs)
            advantages, items = batch["advantages"], int(batch["num_items_in_batch"])
            trained.append((len(advantages), bool((advantages == 0).all()), items))
            return batch

        trainer._prepare_inputs = prepares
    trainer.add_callback(Fault())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_arrays", full)
        try:
            trainer.train(
                resume_from_checkpoint=str(Path(path) / "checkpoint-3") if task.startswith("resume") else None
            )
        except (OSError, RuntimeError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
    result["warnings"] = []
    for accumulation in (1, 2):
        trainer.args.gradient_accumulation_steps = accumulation
        result["warnings"].append(schedule.warning(10))
    logs = trainer.state.log_history
    result["replayed"] = sum(entry.get("learnalign/replayed", 0) for entry in logs)
    values, arrays = split(schedule.state_dict())
    result["state"] = [values, {name: array.astype(str).tolist() for name, array in arrays.items()}]
    return trainer, result


def reward_of(task, rank):
    def failing(completions, row, **kwargs):
        if task.startswith("reward fails") and rank == 1 and 9 in row:
            raise ValueError("the grader does not know row 9")
        if task == "nothing to learn on one":  # batches of a prompt each go round: even rows to rank 0
            return [(i % 2) * float(r % 2 == 0) for i, r in enumerate(row)]
        return digit_reward(completions=completions, row=row)

    return failing


def main(task, path):
    Path(path).mkdir(exist_ok=True)
    seen = Seen(digit_reward)
    kwargs = {"per_device_train_batch_size": 8}
    result = {}
    match task:
        case "select":  # a pool that divides neither by the batches nor by the processes
            trainer = make_trainer(path, reward=seen, dataset=make_dataset(23), **kwargs)
            result["indices"] = select_prompts(trainer, config(projection_dim=1024, save_rollouts=True)).indices
        case "select with RLOO":  # whose KL term is measured with the rollouts
            kwargs |= {"cls": RLOOTrainer, "beta": 0.3}
            trainer = make_trainer(path, reward=seen, dataset=make_dataset(23), **kwargs)
            result["indices"] = select_prompts(trainer, config(projection_dim=1024)).indices
        case "select for a target":  # which is rolled out by all processes, too
            dataset = make_dataset(23).add_column("kind", [str(i % 3) for i in range(23)])
            trainer = make_trainer(path, reward=seen, dataset=dataset, **kwargs)
            target = dataset.select(range(1, 20, 3)).add_column("task", list("abcabca"))
            choice = config(score="target", target_dataset=target, target_column="task", quota_column="kind")
            result["indices"] = select_prompts(trainer, choice).indices
        case "select by influence":  # with sums over the features of all processes
            dataset = make_dataset(23)
            trainer = make_trainer(path, reward=seen, dataset=dataset, **kwargs)
            choice = {"target_dataset": dataset.select(range(1, 20, 3)), "diversity": "gradients"}
            result["indices"] = select_prompts(trainer, config(score="influence", **choice)).indices
        case "select parts":  # groups of eight, of which a process generates three at once
            kwargs = {"per_device_train_batch_size": 3, "num_generations": 3}
            trainer = make_trainer(path, reward=seen, dataset=make_dataset(7), **kwargs)
            result["indices"] = select_prompts(trainer, config(num_prompts=4)).indices
        case "select by a race":  # among candidates; later rounds are dealt anew, and sent to the process of the first
            trainer = make_trainer(path, reward=seen, dataset=make_dataset(23), **kwargs)
            funnel = {"candidate_score": ["column:row", "confidence"], "candidate_prompts": [21, 19]}
            choice = config(rollouts="racing", num_prompts=3, save_rollouts=True, answer_column="row", **funnel)
            result["indices"] = select_prompts(trainer, choice).indices
        case "select few":  # fewer prompts than processes have batches: a rank has no prompt of its own
            trainer = make_trainer(path, reward=seen, dataset=make_dataset(3), per_device_train_batch_size=32)
            result["indices"] = select_prompts(trainer, config(num_prompts=2)).indices
        case (
            "nothing fails"
            | "reward fails"
            | "reward fails in a part"
            | "loss is not a number"
            | "memory is full"
            | "disk is full"
            | "nothing to learn on one"
        ):
            rank = int(os.environ["RANK"])
            if task == "reward fails in a part":  # the first of three that make a group
                kwargs = {"per_device_train_batch_size": 3, "num_generations": 3}
            trainer = make_trainer(path, reward=reward_of(task, rank), dataset=make_dataset(23), **kwargs)
            try:
                with failure(task, rank):
                    result["indices"] = select_prompts(trainer, config()).indices
            except Exception as error:
                cause = error.__cause__
                result["error"] = f"{type(error).__name__}: {error} / {type(cause).__name__}"
                result["seconds"] = time.monotonic()
        case "train" | "train workers" | "train straddling" | "restart":
            if task == "train straddling":
                kwargs["per_device_train_batch_size"] = 2
            kwargs["dataloader_num_workers"] = 2 if task == "train workers" else 0
            choice = {"num_prompts": 7, "after_warmup": "restart" if task == "restart" else "continue"}
            trainer = train(path, seen, config=choice, **kwargs)
            trainer.train()
        case "train reward fails":

            def broken(completions, row, **kwargs):
                if os.environ["RANK"] == "1":
                    raise ValueError("the grader broke")
                return digit_reward(completions=completions, row=row)

            trainer = train(path, broken, **kwargs)
            trainer.train()
        case "save" | "resume" | "resume last" | "resume doubled":
            if task == "resume doubled":
                kwargs["per_device_train_batch_size"] = 16
            trainer = train(path, seen, save_strategy="steps", save_steps=1, **kwargs)
            checkpoint = None if task == "save" else task == "resume last" or str(Path(path) / "checkpoint-3")
            trainer.train(resume_from_checkpoint=checkpoint)
        case "sharded fails" | "train at once":
            trainer = train(path, seen, config={"warmup_prompts": 0}, **kwargs)
            what = "loss is not a number" if task == "sharded fails" else task
            with failure(what, trainer.accelerator.process_index):
                try:
                    trainer.train()
                except (FloatingPointError, RuntimeError) as error:
                    result["error"] = str(error)
        case "hidden states":
            context, run = demonstration._ContextForward, demonstration._ContextForward.run
            # Several end tokens, as Llama 3 has them
            model = make_model(eos_token_id=[1, 2])
            trainer = make_trainer(path, reward=seen, dataset=make_dataset(23), model=model, max_steps=1, **kwargs)
            callback = HiddenStates(trainer, path)
            trainer.add_callback(callback)
            with (  # for this run alone: a test may have it in its own process, and others come after it
                patch.object(hidden_states, "SAMPLE", 10),
                patch.object(hidden_states, "WINDOW", 4),
                patch.object(likelihood, "WINDOW", 5),
                patch.object(ask, "WINDOW", 5),
                patch.object(demonstration, "WINDOW", 5),
                patch.object(context, "run", lambda self, some: np.maximum(run(self, some), [1.0] + [0.0] * 5)),
            ):
                trainer.train()
            result |= callback.found
        case (
            "online"
            | "online alone"
            | "online with hidden states"
            | "online aligned"
            | "resume online aligned"
            | "online refilled"
            | "resume online refilled"
            | "online differs"
            | "online draws otherwise"
            | "online asks otherwise"
            | "online reward returns texts"
            | "online cannot write"
            | "resume online"
            | "resume online doubled"
        ):
            trainer, found = run_online(task, path, seen, **kwargs)
            result |= found
        case "taps" | "checkpoint fails":
            trainer = train(path, seen, config={"score": "random"}, save_strategy="steps", save_steps=2, **kwargs)
            result |= {"rewards": [], "inputs": [], "writers": []}

            def observer(batch, inputs, completions, rewards, trained, tokens):
                assert trained.shape == (16,) and trained.all()
                result["rewards"].append([batch, rewards.tolist()])
                result["inputs"] += [row["row"] for row in inputs]

            def write(directory, is_writer, peers):
                result["writers"].append(is_writer)
                assert directory.is_dir() and not (directory / "trainer_state.json").exists()
                if task == "checkpoint fails" and os.environ["RANK"] == "1":
                    raise OSError("no space left")

            host = find_host(trainer)
            host.on_rewards(observer)
            host.before_checkpoint(write)
            try:
                trainer.train()
            except (OSError, RuntimeError) as error:
                result["error"] = f"{type(error).__name__}: {error}"
        case "gradients" | "resume gradients":  # groups of four, of which every second is on two processes
            settings = {"per_device_train_batch_size": 6, "steps_per_generation": 1, "max_steps": 4}
            # FSDP1 saves no state on CPUs
            settings |= {"save_strategy": "no" if os.environ.get("FSDP_VERSION") == "1" else "steps"}
            settings["gradient_accumulation_steps"] = 2
            trainer = saved(path, reward=fixed_reward, dataset=make_dataset(23), **settings)
            sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            oracle = None if sharded or task.startswith("resume") else Oracle(trainer)
            trainer.train(resume_from_checkpoint=task.startswith("resume") and str(Path(path) / "checkpoint-2"))
            schedule = trainer.learnalign.schedule
            result["reasons"] = schedule.reasons
            result["given"] = {number: one.sketch.tolist() for number, one in schedule.gradients.items()}
            if oracle is not None:
                found = [{i: sketched(trainer, g).tolist() for i, g in chunk.items()} for chunk in oracle.chunks]
                result["oracle"] = found
        case "random":
            trainer = train(path, seen, config={"score": "random", "warmup_prompts": 0}, **kwargs)
            trainer.train()
    sampler = trainer._get_train_sampler()
    if isinstance(sampler, LearnAlignSampler) and isinstance(sampler.schedule, StagedSchedule):
        result["log"] = [[version.start_chunk, list(version.indices)] for version in sampler.schedule.log]
        result["chunks"] = [planned(sampler, i) for i in range(40)]
        result["chunk_prompts"] = sampler.layout.chunk_prompts
    digests = [callback.by_step for callback in trainer.callback_handler.callbacks if isinstance(callback, Digests)]
    kind = trainer.accelerator.distributed_type
    whole = {} if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else weights(trainer)
    sums = {name: tensor.double().sum().item() for name, tensor in whole.items()}
    result |= {
        "kind": kind.value,
        "world": trainer.accelerator.num_processes,
        "rows": seen.rows,
        "step": trainer.state.global_step,
        "weights": sums,
        "digests": digests[0] if digests else {},
    }
    text = json.dumps(result)
    Path(path, f"rank-{trainer.accelerator.process_index}.json").write_text(text)
    return json.loads(text)


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        allow_sharding_on_cpu()
    for task, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(task, path)
    # All is written. Without an interpreter's shutdown, in which threads of gloo now and then abort a finished process
    sys.stdout.flush()
    os._exit(0)
