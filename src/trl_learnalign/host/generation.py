"""Rollouts from a trainer, whose state does not change."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, set_seed

from ..data.reading import read_rows
from ..gradients.modes import turn_dropout_off
from ..ground.hashing import stable_hash
from ..ground.randomness import random_state, set_random_state
from .groups import RolloutGroup, shared
from .names import RolloutTrainer
from .rewards import guarded


if TYPE_CHECKING:
    from .roles import Generates

_IMAGES = {"pixel_values", "num_images"}  # what TRL's batches hold where any rollout has one
SELECTING: WeakSet[Trainer] = WeakSet()  # trainers that generate for something else than training


class NoLogps:
    """Replaces the log-probabilities of a generation that are not needed."""

    def __call__(self, *args, **kwargs):
        return None, None, None

    def penalties(self, output: dict) -> torch.Tensor:
        """Return the penalty of each row of a batch that TRL generated, see [`RolloutGroup`]."""
        return torch.zeros(len(output["completion_ids"]))


def is_colocated(trainer: RolloutTrainer) -> bool:
    """Tell if vLLM runs inside the processes that train."""
    return getattr(trainer.args, "use_vllm", False) and trainer.args.vllm_mode == "colocate"


@contextmanager
def replaced(trainer: object, **values) -> Iterator[None]:
    """Give attributes of a trainer or a model, methods included, other values while the context is open."""
    # The instance's own attributes, if any, are put back: `del` alone would lose a user's patch
    own = {name: vars(trainer)[name] for name in values if name in vars(trainer)}
    vars(trainer).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(trainer).pop(name, None)
        vars(trainer).update(own)


@contextmanager
def left_as_found(host: "Generates", num_rollouts: int | None) -> Iterator[None]:
    """
    Let the trainer generate `num_rollouts` completions for a prompt, or none, and undo on exit all that a generation
    changes: metrics, logs, counters, random states. Modes of the model are not put back.
    """
    trainer, values = host.trainer, {}
    if num_rollouts is not None:
        values = {name: copy.deepcopy(getattr(trainer, name)) for name in host.books}
        values["num_generations"] = num_rollouts
        if getattr(trainer, "vllm_importance_sampling_correction", None) is not None:  # GRPOTrainer alone has one
            values["vllm_importance_sampling_correction"] = False
    tokens_seen, randomness = trainer.state.num_input_tokens_seen, random_state()
    outermost = trainer not in SELECTING
    SELECTING.add(trainer)
    try:
        with replaced(trainer, **values):
            yield
    finally:
        if outermost:
            SELECTING.discard(trainer)
        trainer.state.num_input_tokens_seen = tokens_seen
        set_random_state(randomness)


def generate_groups(
    host: "Generates", dataset: Dataset, indices: list[int], seed: int, gradients: bool
) -> list[RolloutGroup]:
    """
    Roll out this process's prompts through the trainer's own generation and reward functions. To be called inside
    [`Host.left_as_found`], by all processes at once, each with its own `indices`, equally many.

    Args:
        host ([`Host`]): `group_size` rollouts a prompt.
        dataset (`Dataset`): the training dataset with the columns that the trainer would see.
        indices (`list[int]`): rows of `dataset`.
        seed (`int`): of the generation; the same seed and indices give the same rollouts on any process. Processes
            that share a vLLM (see [`Host.sharing`]) must pass the same; there the rollouts depend on the indices of
            all of these processes.
        gradients (`bool`): whether gradients will be taken of the rollouts.
    """
    # Before every batch: continuous batching leaves all modules in train mode, and so may a user's own rollout
    # function
    trainer = host.trainer
    turn_dropout_off(trainer.model)
    set_seed(seed % 2**32)
    size = host.group_size
    inputs = copy.deepcopy(read_rows(dataset, [index for index in indices for _ in range(size)]))
    seen: dict[str, Any] = {}
    calculate_rewards, logps = trainer._calculate_rewards, host.stand_in(gradients)

    def record(inputs, prompts, completions, completion_ids_list):
        # Reward functions that draw random numbers: the prompts' own, not those that the completions were sampled with
        set_seed(stable_hash("rewards", seed, indices) % 2**32)
        rewards = calculate_rewards(inputs, prompts, completions, completion_ids_list)
        seen.update(completions=completions, completion_ids=completion_ids_list, rewards=rewards)
        return rewards

    methods = {"_calculate_rewards": record} | ({host.logps_method: logps} if host.logps_method else {})
    with (
        guarded(trainer.reward_funcs, trainer.reward_func_names) as reward_funcs,
        replaced(trainer, reward_funcs=reward_funcs, **methods),
        host.halving(host),
    ):
        output = getattr(trainer, host.generation_method)(inputs)
    start = trainer.accelerator.process_index * len(inputs)
    rewards = seen["rewards"][start : start + len(inputs)].float().cpu()
    rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan).numpy()
    penalties = logps.penalties(output).to("cpu", torch.float32).numpy()
    loss_mask = mask_of_loss(output).to("cpu", torch.int8).numpy()
    prompt_ids, prompt_mask = (
        output["prompt_ids"].to("cpu", torch.int32).numpy(),
        output["prompt_mask"].cpu().bool().numpy(),
    )
    groups = []
    for i, index in enumerate(indices):
        rows = range(i * size, (i + 1) * size)
        completion_ids = [np.asarray(seen["completion_ids"][row], dtype=np.int32) for row in rows]
        groups.append(
            RolloutGroup(
                row=index,
                prompt_ids=shared([prompt_ids[row][prompt_mask[row]] for row in rows]),
                completion_ids=completion_ids,
                loss_masks=[loss_mask[row, : len(ids)].copy() for row, ids in zip(rows, completion_ids, strict=True)],
                completions=[_plain(seen["completions"][row]) for row in rows],
                rewards=rewards[rows.start : rows.stop],
                penalties=penalties[rows.start : rows.stop],
                has_images=not _IMAGES.isdisjoint(output),
            )
        )
    return groups


def mask_of_loss(output: dict) -> torch.Tensor:
    """Return which tokens of the completions of a batch are in the loss, `(rows, T)`."""
    return output["completion_mask"] * output.get("tool_mask", 1)


def _plain(completion):
    """Make a completion of values that JSON can hold: messages may have images, as answers of tools."""
    return json.loads(json.dumps(completion, default=lambda value: f"[{type(value).__name__}]"))
