"""Rollouts of a pool, in rounds of all processes; they stay on the disk and are read back prompt by prompt."""

import json
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..ground.disk import write_atomically
from ..ground.hashing import stable_hash
from ..ground.progress import progress_bar
from ..ground.store import Log
from ..host import Host
from ..host.groups import Group, deal
from .parts import generate_in_parts, prompts_per_batch
from .records import decode, encode


# By default a pool is cut into at least so many batches, so that as many processes have work
LEAST_BATCHES = 64
MOST_FOLD = 64  # and a batch is at most so many times training's

_FITTING = 1 << 63  # and the rank of a process: the name of the record of how many rollouts fit into its memory


def prompts_at_once(host: Host, config, num_rollouts: int, pool: int) -> int:
    """
    Prompts of a batch, which one process generates for at once: `rollout_batch_prompts`, or training's batch, doubled
    while the pool of `pool` prompts has `LEAST_BATCHES` of them and at most `MOST_FOLD` times. It does not depend on
    the number of processes, since the rollouts depend on it. A reward model scores all rollouts of a batch at once,
    and cannot do so in halves, nor can sharded weights generate in halves: there it is training's.
    """
    if config.rollout_batch_prompts is not None:
        return config.rollout_batch_prompts
    size = least = prompts_per_batch(host, num_rollouts)
    at_once = host.has_reward_model or host.is_sharded
    while not at_once and size < MOST_FOLD * least and 2 * size * LEAST_BATCHES <= pool:
        size *= 2
    return size


class Rollouts:
    """
    This process's groups. What is known of all is in memory: `rewards` (n, G, F) and `lengths` (n, G) of the
    completions, and of each rollout the tokens of its prompt and those that the policy is trained on. The tokens
    themselves are read from the log.

    Attributes:
        rows (`np.ndarray` of shape `(n,)`): dataset rows, in the order of the batches.
        rewards (`np.ndarray` of shape `(n, G, F)`): float32, NaN where a reward function gave none.
        penalties (`np.ndarray` of shape `(n, G)`): float32, see [`Group`].
        lengths, prompt_lengths, trained (`np.ndarray` of shape `(n, G)`): tokens of completions and of prompts, and
            how many tokens of the completion count in the loss; int32.
        found (`bool`): whether some had been finished before.
    """

    def __init__(self, log: Log, num_rollouts: int, num_rewards: int):
        self.log = log
        self.found = False
        self._batches = [
            (
                np.empty(0, np.int64),
                np.empty((0, num_rollouts, num_rewards), np.float32),
                np.empty((0, num_rollouts), np.float32),
                *(np.empty((0, num_rollouts), np.int32) for _ in range(3)),
            )
        ]
        self._place = {}

    def add(self, groups: list[Group]) -> None:
        """Notes groups whose records are in the log."""
        values = (
            np.array([group.index for group in groups], np.int64),
            np.stack([group.rewards for group in groups]),
            np.stack([group.penalties for group in groups]),
            np.array([[len(ids) for ids in group.completion_ids] for group in groups], np.int32),
            np.array([[len(ids) for ids in group.prompt_ids] for group in groups], np.int32),
            np.array([[mask.sum() for mask in group.loss_masks] for group in groups], np.int32),
        )
        self._batches.append(values)

    def close(self) -> None:
        """All groups are there."""
        columns = [np.concatenate(parts) for parts in zip(*self._batches, strict=True)]
        self.rows, self.rewards, self.penalties, self.lengths, self.prompt_lengths, self.trained = columns
        self._place = {row: place for place, row in enumerate(self.rows.tolist())}
        self._batches = None

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def place(self, row: int) -> int:
        """Where a dataset row is in the arrays."""
        return self._place[row]

    def group(self, row: int, completions: bool = False) -> Group:
        """
        The rollouts of a dataset row, read from the disk; without the completions' text or messages unless they are
        asked for.

        Raises:
            `RuntimeError`: they are not there any more, or damaged.
        """
        payload = self.log.read(row)
        if payload is None:
            raise RuntimeError(
                f"The rollouts of prompt {row} could not be read back from '{self.log.path}'. Check the disk and run "
                "again: the rollouts that are still there are reused."
            )
        return decode(payload, completions)

    def __iter__(self) -> Iterator[Group]:
        return (self.group(row) for row in self.rows.tolist())


def roll_out(run, dataset: Dataset, rows: list[int], log: Log, phase: str = "rollouts") -> Rollouts:
    """
    This process's groups of these rows of a dataset. The batches do not depend on the number of processes, and each
    has its own seed; batch b goes to process b % world. All processes generate in the same rounds, as rewards are
    gathered. A finished batch is written at once, and nothing but its rewards and lengths stays in memory.

    Args:
        run ([`SelectionRun`]): inside [`Host.left_as_found`]. All processes must call this.
        dataset (`Dataset`): with the columns that the trainer would see.
        rows (`list[int]`): of the dataset.
        log ([`Log`]): keeps finished batches.
        phase (`str`, *optional*): for the progress bar; part of the seed.

    Raises:
        `ValueError`: a rollout has an image, and the score needs gradients.
    """
    host, peers = run.host, run.peers
    size = run.prompts_at_once
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    world, rank = run.accelerator.num_processes, run.accelerator.process_index
    gradients = "gradients" in run.config.measures
    if (rows_that_fit := log.read(_FITTING + rank)) is not None:
        # Or the rollouts would be others than without the interruption
        host.halving.rows = int.from_bytes(rows_that_fit, "big")
    found = Rollouts(log, run.num_rollouts, len(host.reward_names))
    with progress_bar(host, phase, len(rows), "prompts") as bar:
        for first in range(0, len(batches), world):
            # Rewards are gathered, so every process must bring equally many prompts; the last batch is filled up even
            # on one process, so that its rollouts do not depend on the number of processes
            batch, seed_of, mine = deal(batches, first, rank, host.sharing)
            done = _finished(log, batch) if mine else None
            if mine and done is not None:
                found.found = True
            if not all(peers.gather(done is not None or not mine)):
                padded = batch + [batch[0]] * (min(size, len(rows)) - len(batch))
                seed = stable_hash(run.seed, phase, run.step, seed_of[0])
                fresh = generate_in_parts(host, dataset, padded, seed, gradients, peers)
                if done is None and mine:
                    done = fresh[: len(batch)]
                    records = [(group.index, encode(group)) for group in done]
                    if host.halving.rows < math.inf:
                        records.append((_FITTING + rank, int(host.halving.rows).to_bytes(8, "big")))
                    log.append(records)
            if mine:
                if gradients and any(group.has_images for group in done):
                    raise ValueError(_IMAGES)
                found.add(done)
            bar.update(sum(len(batch) for batch in batches[first : first + world]))
    log.close()
    found.close()
    return found


_IMAGES = (
    "The rollouts have images (from an environment or a tool), and gradients of multimodal prompts are not supported. "
    "Use `score='learnability'`, which takes no gradients."
)


def _finished(log, batch):
    """The groups of a batch, if all are in the log."""
    groups = []
    for row in batch:
        payload = log.read(row)
        if payload is None:
            return None
        groups.append(decode(payload))
    return groups


_SHARD_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("completion_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("rewards", pa.list_(pa.float32())),
        ("advantage", pa.float64()),
    ]
)
_SHARD_PROMPTS = 64  # of which the rollouts are in memory at once


def save_shard(path, own: Rollouts, pool) -> None:
    """
    Writes this process's rollouts to a parquet file, a row each, by dataset row.

    Args:
        path (`Path`): of the file.
        own ([`Rollouts`]): this process's.
        pool ([`Pool`]): has the advantages, by dataset row; none for prompts that could not be scored.
    """
    place = {index: i for i, index in enumerate(pool.indices.tolist())}
    rows = sorted(own.rows.tolist())

    def write(temporary):
        with pq.ParquetWriter(temporary, _SHARD_SCHEMA, write_page_checksum=True) as writer:
            for start in range(0, len(rows), _SHARD_PROMPTS):
                groups = [own.group(row, completions=True) for row in rows[start : start + _SHARD_PROMPTS]]
                advantages = [
                    pool.advantages[place[group.index]] if group.index in place else None for group in groups
                ]
                lines = [line for pair in zip(groups, advantages, strict=True) for line in _lines(*pair)]
                writer.write_table(pa.Table.from_pylist(lines, schema=_SHARD_SCHEMA))

    write_atomically(path, write)


def _lines(group, advantages):
    for g, ids in enumerate(group.completion_ids):
        completion = group.completions[g]
        yield {
            "index": group.index,
            "completion_ids": ids,
            "completion": completion if isinstance(completion, str) else json.dumps(completion),
            "rewards": group.rewards[g],
            "advantage": None if advantages is None else float(advantages[g]),
        }
