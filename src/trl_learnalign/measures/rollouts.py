"""Rollouts of a pool, in rounds of all processes; they stay on the disk and are read back prompt by prompt."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from ..ground.disk import write_atomically
from ..ground.hashing import stable_hash
from ..ground.progress import progress_bar
from ..ground.store import Log
from ..host import Host
from ..host.checks import check_vllm
from ..host.groups import RolloutGroup, deal
from ..host.rewards import check_success_reward
from .base import Context, Finding, Measure
from .parts import generate_in_parts, prompts_per_batch, rollouts_at_once
from .pool import Pool
from .records import decode, encode


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


# By default a pool is cut into at least so many batches, so that as many processes have work
LEAST_BATCHES = 64
MOST_FOLD = 64  # and a batch is at most so many times training's

_FITTING = 1 << 63  # and the rank of a process: the name of the record of how many rollouts fit into its memory


class RolledOut(Finding):
    """
    The rollouts of some prompts.

    Attributes:
        own ([`Rollouts`]): of this process.
        pool ([`Pool`]): what those of all processes found out.
        seconds (`float`): what they took.
    """

    def __init__(self, own: "Rollouts", pool: Pool, seconds: float = 0.0):
        super().__init__(pool.table())
        self.own, self.pool, self.seconds = own, pool, seconds

    @property
    def learnable(self) -> list[int]:
        """Rows with V > 0."""
        return self.pool.rows[self.pool.learnability > 0].tolist()


class RolloutMeasure(Measure):
    """`num_rollouts` completions of every prompt, with their rewards."""

    name = "rollouts"
    columns = ("success_rate", "learnability", "reward_mean", "reward_std", "completion_length_mean")
    price = "rollouts"

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """Raise a `ValueError` for an unknown or missing reward name, and for vLLM that mixes completions up."""
        check_success_reward(host.reward_names, config.success_reward, config.learnability)
        check_vllm(host)

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return what generation and rewards depend on."""
        return {**made_from(context, len(rows)), **super().key(context, rows)}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Roll out every prompt."""
        started = time.perf_counter()
        at_once = prompts_at_once(context.host, context.config, context.num_rollouts, len(rows))
        own = roll_out(context, context.dataset, rows, log, at_once)
        seconds = context.clock("rollouts", started)
        pool = gather_rewards(context, own)
        context.note(pool.provenance())
        return RolledOut(own, pool, seconds)

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """Return success rates from 0 to 1, and lengths up to `longest` tokens."""
        places = np.arange(len(table))
        rates = (7 * places + 1) % (num_rollouts + 1) / num_rollouts
        columns = {
            "success_rate": rates,
            "learnability": rates * (1 - rates),
            "reward_mean": rates,
            "reward_std": np.sqrt(rates * (1 - rates)),
            "completion_length_mean": 1 + (13 * places) % max(longest, 1) * 1.0,
        }
        return Finding(pd.DataFrame(columns, index=table.index))


def made_from(context: Context, pool: int) -> dict:
    """Return what the rollouts of a selection from `pool` prompts depend on, see [`Measure.key`]."""
    host, found = context.host, context.identity
    parts = {f"reward function `{name}`": part for name, part in found["rewards"]}
    parts |= {f"environment `{name}`": part for name, part in found["environments"].items()}
    parts |= {f"the trainer's {name}": part for name, part in found["own code"].items()}
    parts |= {"order of the reward functions": [name for name, _ in found["rewards"]]}
    parts |= {"`rollout_func`": found["rollout_func"]}
    parts |= {f"`{name}`": part for name, part in found["generation"].items()}
    return parts | {
        "seed": context.seed,
        "step": context.step,
        "`num_rollouts`": context.num_rollouts,
        "prompts at once (`rollout_batch_prompts`)": prompts_at_once(host, context.config, context.num_rollouts, pool),
        "rollouts at once": rollouts_at_once(host, context.num_rollouts),
        "penalties": host.has_penalties and "gradients" in context.prices,
    }


def gather_rewards(context: Context, own: "Rollouts") -> Pool:
    """Return what the rollouts of all processes found out, on every process."""
    columns = own.rows, own.rewards, own.penalties, own.lengths, own.trained
    gathered = zip(*context.peers.gather(columns), strict=True)
    rows, rewards, penalties, lengths, trained = (torch.from_numpy(np.concatenate(parts)) for parts in gathered)
    return Pool.of_rewards(rows, rewards, penalties, lengths, trained, context.config, context.host)


def prompts_at_once(host: Host, config, num_rollouts: int, pool: int) -> int:
    """
    Return the prompts of a batch, which one process generates for at once: `rollout_batch_prompts`, or training's
    batch, doubled while the pool of `pool` prompts has `LEAST_BATCHES` of them and at most `MOST_FOLD` times. The
    number does not depend on that of the processes, since the rollouts depend on it. A reward model scores all
    rollouts of a batch at once, and cannot do so in halves, nor can sharded weights generate in halves: there the
    batch is training's.
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
    The groups of this process. Rewards, lengths and counts of all of them are in memory; the tokens are read from the
    log.

    Attributes:
        rows (`np.ndarray` of shape `(n,)`): dataset rows, in the order of the batches.
        rewards (`np.ndarray` of shape `(n, G, F)`): float32, NaN where a reward function gave none.
        penalties (`np.ndarray` of shape `(n, G)`): float32, see [`RolloutGroup`].
        lengths, prompt_lengths, trained (`np.ndarray` of shape `(n, G)`): tokens of completions and of prompts, and
            how many tokens of the completion count in the loss; int32.
        found (`bool`): whether some had been finished before the run began.
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
        self._place: dict[int, int] = {}

    def add(self, groups: list[RolloutGroup]) -> None:
        """Note groups whose records are in the log."""
        values = (
            np.array([group.row for group in groups], np.int64),
            np.stack([group.rewards for group in groups]),
            np.stack([group.penalties for group in groups]),
            np.array([[len(ids) for ids in group.completion_ids] for group in groups], np.int32),
            np.array([[len(ids) for ids in group.prompt_ids] for group in groups], np.int32),
            np.array([[mask.sum() for mask in group.loss_masks] for group in groups], np.int32),
        )
        self._batches.append(values)

    def close(self) -> None:
        """Note that all groups are there."""
        columns = [np.concatenate(parts) for parts in zip(*self._batches, strict=True)]
        self.rows, self.rewards, self.penalties, self.lengths, self.prompt_lengths, self.trained = columns
        self._place = {row: place for place, row in enumerate(self.rows.tolist())}
        self._batches = []

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def place(self, row: int) -> int:
        """Return where a dataset row is in the arrays."""
        return self._place[row]

    def group(self, row: int, completions: bool = False) -> RolloutGroup:
        """
        Read the rollouts of a dataset row from the disk; without the completions' text or messages unless they are
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

    def __iter__(self) -> Iterator[RolloutGroup]:
        return (self.group(row) for row in self.rows.tolist())


def roll_out(
    context: Context, dataset: Dataset, rows: Sequence[int], log: Log, size: int, phase: str = "rollouts"
) -> Rollouts:
    """
    Roll out rows of a dataset, and return this process's groups. The batches do not depend on the number of processes,
    and each has its own seed; batch b goes to process b % world. All processes generate in the same rounds, as rewards
    are gathered. A finished batch is written at once, and nothing but its rewards and lengths stays in memory.

    Args:
        context ([`Context`]): inside [`Host.left_as_found`]. All processes must call this.
        dataset (`Dataset`): with the columns that the trainer would see.
        rows (`Sequence[int]`): of the dataset.
        log ([`Log`]): keeps finished batches.
        size (`int`): prompts of a batch.
        phase (`str`, *optional*): for the progress bar; part of the seed.

    Raises:
        `ValueError`: a rollout has an image, and the score needs gradients.
    """
    host, peers = context.host, context.peers
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    world, rank = host.accelerator.num_processes, host.accelerator.process_index
    gradients = "gradients" in context.prices
    if (rows_that_fit := log.read(_FITTING + rank)) is not None:
        # Or the rollouts would be others than without the interruption
        host.halving.rows = int.from_bytes(rows_that_fit, "big")
    found = Rollouts(log, context.num_rollouts, len(host.reward_names))
    with progress_bar(host, phase, len(rows), "prompts") as bar:
        for first in range(0, len(batches), world):
            # Rewards are gathered, so every process must bring equally many prompts; the last batch is filled up even
            # on one process, so that its rollouts do not depend on the number of processes
            batch, seed_of, mine = deal(batches, first, rank, host.sharing)
            done = _finished(log, batch) if mine else None
            found.found |= done is not None
            if not all(peers.gather(done is not None or not mine)):
                padded = batch + [batch[0]] * (min(size, len(rows)) - len(batch))
                seed = stable_hash(context.seed, phase, context.step, seed_of[0])
                fresh = generate_in_parts(host, dataset, padded, seed, gradients, peers)
                if done is None and mine:
                    done = fresh[: len(batch)]
                    records = [(group.row, encode(group)) for group in done]
                    if host.halving.rows < math.inf:
                        records.append((_FITTING + rank, int(host.halving.rows).to_bytes(8, "big")))
                    log.append(records)
            if done is not None:
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


def _finished(log, batch) -> list[RolloutGroup] | None:
    """Return the groups of a batch, if all are in the log."""
    groups = []
    for row in batch:
        payload = log.read(row)
        if payload is None:
            return None
        groups.append(decode(payload))
    return groups


ROLLOUTS_SCHEMA = pa.schema(  # of kept rollouts, a row each
    [
        ("index", pa.int64()),
        ("completion_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("rewards", pa.list_(pa.float32())),
        ("advantage", pa.float64()),
    ]
)
_SHARD_PROMPTS = 64  # of which the rollouts are in memory at once


def save_shard(path: Path, own: Rollouts, pool: Pool) -> None:
    """
    Write this process's rollouts to a parquet file, a row each, by dataset row.

    Args:
        path (`Path`): of the file.
        own ([`Rollouts`]): this process's.
        pool ([`Pool`]): has the advantages, by dataset row; none for prompts that could not be scored.
    """
    place = {row: i for i, row in enumerate(pool.rows.tolist())}
    rows = sorted(own.rows.tolist())

    def write(temporary):
        with pq.ParquetWriter(temporary, ROLLOUTS_SCHEMA, write_page_checksum=True) as writer:
            for start in range(0, len(rows), _SHARD_PROMPTS):
                groups = [own.group(row, completions=True) for row in rows[start : start + _SHARD_PROMPTS]]
                advantages = [pool.advantages[place[group.row]] if group.row in place else None for group in groups]
                lines = [line for pair in zip(groups, advantages, strict=True) for line in _lines(*pair)]
                writer.write_table(pa.Table.from_pylist(lines, schema=ROLLOUTS_SCHEMA))

    write_atomically(path, write)


def _lines(group, advantages):
    for g, ids in enumerate(group.completion_ids):
        completion = group.completions[g]
        yield {
            "index": group.row,
            "completion_ids": ids,
            "completion": completion if isinstance(completion, str) else json.dumps(completion),
            "rewards": group.rewards[g],
            "advantage": None if advantages is None else float(advantages[g]),
        }
