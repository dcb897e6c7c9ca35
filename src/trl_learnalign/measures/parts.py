"""Generation in parts: a process never generates more rollouts at once than in training."""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from ..ground.hashing import stable_hash
from ..ground.peers import Peers
from ..host import Host
from ..host.groups import RolloutGroup, shared


def prompts_per_batch(host: Host, num_rollouts: int) -> int:
    """
    Return the prompts that a process generates for at once: as many rollouts as it does in training, whole groups, at
    least one.
    """
    return max(1, host.rows_at_once // num_rollouts)


def rollouts_at_once(host: Host, num_rollouts: int) -> int:
    """
    Return the rollouts of a prompt that a process generates at once: all, unless training generates fewer per process.
    """
    return min(num_rollouts, host.rows_at_once)


def generate_in_parts(
    host: Host, dataset: Dataset, indices: list[int], seed: int, gradients: bool, peers: Peers
) -> list[RolloutGroup]:
    """
    Generate as [`Host.generate`] does, but make a group that is larger than what training generates at once part after
    part, each with its own seed. Before each further part the processes wait for each other, as one on which a part
    failed does not join the collectives of the next.
    """
    size = host.group_size
    at_once = rollouts_at_once(host, size)
    parts = []
    for start in range(0, size, at_once):
        if start:
            peers.wait()
        part_seed = stable_hash(seed, "part", start) if start else seed
        with host.groups_of(min(at_once, size - start)):
            parts.append(host.generate(dataset, indices, part_seed, gradients))
    return [joined(list(groups)) for groups in zip(*parts, strict=True)]


def joined(parts: list[RolloutGroup]) -> RolloutGroup:
    """Make one group of the parts of a prompt."""
    if len(parts) == 1:
        return parts[0]

    def joined(name):
        return [entry for part in parts for entry in getattr(part, name)]

    return replace(
        parts[0],
        prompt_ids=shared(joined("prompt_ids")),
        completion_ids=joined("completion_ids"),
        loss_masks=joined("loss_masks"),
        completions=joined("completions"),
        rewards=np.concatenate([part.rewards for part in parts]),
        penalties=np.concatenate([part.penalties for part in parts]),
    )
