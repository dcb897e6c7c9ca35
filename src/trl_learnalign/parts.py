"""How many rollouts a process generates at once: never more than in training."""

from dataclasses import replace

import numpy as np
from datasets import Dataset
from trl import GRPOTrainer

from . import rollouts
from .peers import Peers
from .projection import stable_hash
from .rollouts import Group


def rollouts_at_once(trainer: GRPOTrainer, num_rollouts: int) -> int:
    """Rollouts of a prompt that a process generates at once: all, unless training generates fewer per process."""
    return min(num_rollouts, trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation)


def generate_in_parts(
    trainer: GRPOTrainer, dataset: Dataset, indices: list[int], seed: int, gradients: bool, peers: Peers
) -> list[Group]:
    """
    [`generate_groups`], of a group larger than what training generates at once part after part, each with its own seed.
    Before each further part the processes meet, as one on which a part failed does not join the collectives of the next.
    """
    size = trainer.num_generations
    at_once = rollouts_at_once(trainer, size)
    parts = []
    try:
        for start in range(0, size, at_once):
            if start:
                peers.wait()
            trainer.num_generations = min(at_once, size - start)
            part_seed = stable_hash(seed, "part", start) if start else seed
            parts.append(rollouts.generate_groups(trainer, dataset, indices, part_seed, gradients))
    finally:
        trainer.num_generations = size
    return [_joined(groups) for groups in zip(*parts, strict=True)]


def _joined(parts: list[Group]) -> Group:
    """One group of the parts of a prompt."""
    if len(parts) == 1:
        return parts[0]
    names = ("prompt_ids", "completion_ids", "loss_masks", "completions")
    columns = {name: [entry for part in parts for entry in getattr(part, name)] for name in names}
    columns["prompt_ids"] = rollouts.shared(columns["prompt_ids"])
    return replace(parts[0], **columns, rewards=np.concatenate([part.rewards for part in parts]))
