"""Rollouts from a trainer, whose state does not change."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
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
from .rewards import guarded


_IMAGES = {"pixel_values", "num_images"}  # what TRL's batches hold where any rollout has one
_PATCHED = ("_calculate_rewards", "_get_per_token_logps_and_entropies")
_CORRECTION = "vllm_importance_sampling_correction"
SELECTING: WeakSet[Trainer] = WeakSet()  # trainers that generate for something else than training


class NoLogps:
    """Replaces the log-probabilities of a generation that are not needed."""

    def __call__(self, *args, **kwargs):
        return None, None, None

    def penalties(self, output: dict) -> torch.Tensor:
        """Of each row of a batch that TRL generated, see [`RolloutGroup`]."""
        return torch.zeros(len(output["completion_ids"]))


def is_colocated(trainer: Trainer) -> bool:
    """Whether vLLM runs inside the processes that train."""
    return trainer.use_vllm and trainer.vllm_mode == "colocate"


@contextmanager
def left_as_found(trainer: Trainer, num_rollouts: int) -> Iterator[None]:
    """
    Lets the trainer generate `num_rollouts` completions a prompt, and undoes on exit all that a generation changes but
    for modes: metrics, logs, counters, random states.
    """
    numbers = trainer.num_generations, trainer.state.num_input_tokens_seen
    books = {name: getattr(trainer, name) for name in ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")}
    correction = getattr(trainer, _CORRECTION, None)  # RLOOTrainer has none
    randomness = random_state()
    for name, book in books.items():
        setattr(trainer, name, copy.deepcopy(book))
    trainer.num_generations = num_rollouts
    outermost = trainer not in SELECTING
    SELECTING.add(trainer)
    if correction is not None:
        setattr(trainer, _CORRECTION, False)
    try:
        yield
    finally:
        if outermost:
            SELECTING.discard(trainer)
        for name, book in books.items():
            setattr(trainer, name, book)
        trainer.num_generations, trainer.state.num_input_tokens_seen = numbers
        if correction is not None:
            setattr(trainer, _CORRECTION, correction)
        set_random_state(randomness)


def generate_groups(host, dataset: Dataset, indices: list[int], seed: int, gradients: bool) -> list[RolloutGroup]:
    """
    Rolls out this process's prompts through the trainer's own generation and reward functions. To be called inside
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
    seen = {}
    calculate_rewards, logps = trainer._calculate_rewards, host.stand_in(gradients)

    def record(inputs, prompts, completions, completion_ids_list):
        # Reward functions that draw random numbers: the prompts' own, not those that the completions were sampled with
        set_seed(stable_hash("rewards", seed, indices) % 2**32)
        rewards = calculate_rewards(inputs, prompts, completions, completion_ids_list)
        seen.update(completions=completions, completion_ids=completion_ids_list, rewards=rewards)
        return rewards

    # The instance's own attributes, if any, are put back: `del` alone would lose a user's patch
    own = {name: vars(trainer)[name] for name in _PATCHED if name in vars(trainer)}
    trainer._calculate_rewards = record
    trainer._get_per_token_logps_and_entropies = logps
    reward_funcs = trainer.reward_funcs
    try:
        with guarded(reward_funcs, trainer.reward_func_names) as trainer.reward_funcs, host.halving(host):
            output = trainer._generate_and_score_completions(inputs)
    finally:
        trainer.reward_funcs = reward_funcs
        for name in _PATCHED:
            delattr(trainer, name)
        vars(trainer).update(own)
    start = trainer.accelerator.process_index * len(inputs)
    rewards = seen["rewards"][start : start + len(inputs)].float().cpu()
    rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan).numpy()
    penalties = logps.penalties(output).to("cpu", torch.float32).numpy()
    loss_mask = output["completion_mask"]
    if "tool_mask" in output:
        loss_mask = loss_mask * output["tool_mask"]
    loss_mask = loss_mask.to("cpu", torch.int8).numpy()
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


def _plain(completion):
    """A completion that can be written as JSON: messages may hold images, as answers of tools."""
    return json.loads(json.dumps(completion, default=lambda value: f"[{type(value).__name__}]"))
