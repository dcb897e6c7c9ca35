"""How many rollouts a process generates at once: never more than in training."""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from ..ground.hashing import stable_hash
from ..ground.peers import Peers
from ..host import Host
from ..host.groups import Group, shared


def prompts_per_batch(host: Host, num_rollouts: int) -> int:
    """
    Prompts that a process generates for at once: as many rollouts as it does in training, whole groups, at least one.
    """
    return max(1, host.rows_at_once // num_rollouts)


def rollouts_at_once(host: Host, num_rollouts: int) -> int:
    """Rollouts of a prompt that a process generates at once: all, unless training generates fewer per process."""
    return min(num_rollouts, host.rows_at_once)


def generate_in_parts(
    host: Host, dataset: Dataset, indices: list[int], seed: int, gradients: bool, peers: Peers
) -> list[Group]:
    """
    [`Host.generate`], of a group larger than what training generates at once part after part, each with its own seed.
    Before each further part the processes wait for each other, as one on which a part failed does not join the
    collectives of the next.
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
    return [_joined(groups) for groups in zip(*parts, strict=True)]


def _joined(parts: list[Group]) -> Group:
    """One group of the parts of a prompt."""
    if len(parts) == 1:
        return parts[0]
    names = ("prompt_ids", "completion_ids", "loss_masks", "completions")
    columns = {name: [entry for part in parts for entry in getattr(part, name)] for name in names}
    columns["prompt_ids"] = shared(columns["prompt_ids"])
    columns |= {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("rewards", "penalties")}
    return replace(parts[0], **columns)
