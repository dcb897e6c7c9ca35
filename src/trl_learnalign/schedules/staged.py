"""Random prompts, then those of a selection; again and again if wanted."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..curriculum.order import RandomOrder
from . import staged_plan as plan
from .base import Schedule


@dataclass(frozen=True)
class Version:
    """From chunk `start_chunk` on the stream visits `indices`, or goes on with random prompts if they are empty."""

    start_chunk: int
    indices: tuple[int, ...]


class StagedSchedule(Schedule):
    """
    Random prompts during the warm-up, then those of a selection, in `prompt_order`; a new selection after every
    `reselect_every` passes. `prompts(i)` is a pure function of the layout, the log of versions and i:

        chunk     0    1    2    3    4    5    6    7    8
        version   0    0    0    1    1    1    1    2    2
        log       (0, random)    (3, selection 1)    (7, selection 2)

    Within a version, prompts are visited pass by pass; a chunk may contain the end of one pass and the beginning of
    the next. So no prompt is dropped, and two prompts of a version are visited equally often, or one of them once
    more.
    """

    selects = True

    def __init__(self, config):
        super().__init__(config)
        self.log: list[Version] = []
        self.work: plan.Work | None = None  # of a selection
        self._orders: dict[int, tuple[RandomOrder, np.ndarray]] = {}

    def prompts_per_epoch(self, pool_size, chunk_prompts):
        """See [`Schedule`]."""
        return min(self.config.num_prompts, pool_size), self.config.warmup_prompts

    def check(self, host):
        """See [`Schedule`]."""
        self.work = plan.work_of(host.dataset, self.config)

    def start(self):
        """Forgets all selections."""
        self.log = [Version(0, ())]
        self._orders = {}

    def accept(self, start: int, indices: Sequence[int]) -> None:
        """Adds a version to the log: from chunk `start` on, train on `indices` (empty: random prompts)."""
        last = self.log[-1].start_chunk
        if start < last:
            raise ValueError(f"A selection cannot take effect at chunk {start}, before the last one, at {last}.")
        self.log.append(Version(start, tuple(indices)))

    def due(self, step: int, max_steps: int, drawn: int) -> bool:
        """See [`Schedule`]."""
        layout, last = self.layout, self.log[-1]
        if len(self.log) == 1:
            target = layout.warmup_chunks
        elif self.config.reselect_every is not None and step:
            prompts = self.config.reselect_every * (len(last.indices) or layout.num_prompts)
            target = last.start_chunk + max(1, math.ceil(prompts / layout.chunk_prompts))
        else:
            return False
        used = drawn * layout.repeats < layout.batches_trained(max_steps)
        return used and layout.chunks_trained(step) >= target

    def check_length(self, max_steps: int) -> None:
        """
        Raises:
            `ValueError`: nothing would be left for the selection.
        """
        layout = self.layout
        if layout.warmup_prompts and layout.warmup_end * layout.repeats >= layout.batches_trained(max_steps):
            prompts = layout.batches_trained(max_steps) / layout.repeats * layout.chunk_prompts
            raise ValueError(
                f"The warm-up of {layout.warmup_prompts} prompts takes {layout.warmup_end * layout.chunk_prompts} "
                f"with what the dataloader reads ahead, but the whole run of {max_steps} steps holds {prompts:.0f}: "
                "nothing would be left for the selection. Lower `warmup_prompts` or raise `max_steps` (or "
                "`num_train_epochs`)."
            )

    @property
    def stage(self):
        """See [`Schedule`]."""
        return len(self.log) - 1

    @property
    def in_use_from(self):
        """See [`Schedule`]."""
        return self.log[-1].start_chunk if self.log[-1].indices else None

    def plan(self, step, max_steps, due):
        """See [`Schedule`]."""
        return plan.plan_lines(self.layout, self.config, self.work, max_steps, step, self.log, due)

    def warning(self, max_steps):
        """See [`Schedule`]."""
        return plan.warmup_warning(self.layout, max_steps)

    def estimate(self, step, since, seconds):
        """See [`Schedule`]."""
        if self.config.ranking().at_random:
            return None
        return plan.estimate_line(self.layout, self.config, self.work, step, since, seconds)

    def prompts(self, chunk: int) -> list[int]:
        """See [`Schedule`]."""
        number = bisect_right(self.log, chunk, key=lambda version: version.start_chunk) - 1
        version = self.log[number]
        if not version.indices:  # random prompts: the order of version 0, as if nothing had been selected
            number, version = 0, self.log[0]
        if number not in self._orders:
            indices = self._indices(number)
            shuffled = self.layout.shuffle and (number == 0 or self.config.prompt_order == "shuffle")
            seed = self.layout.seed + number * 1_000_003
            self._orders[number] = RandomOrder(len(indices), seed, shuffled), indices
        order, indices = self._orders[number]
        first = (chunk - version.start_chunk) * self.layout.chunk_prompts
        return [int(indices[order[first + i]]) for i in range(self.layout.chunk_prompts)]

    def _indices(self, number):
        """Of a version, before they are shuffled: by row, or by rank, or folded."""
        if not number:
            return np.arange(self.layout.pool_size)
        ranked = np.array(self.log[number].indices, dtype=np.int64)
        match self.config.prompt_order:
            case "ranked":
                return ranked
            case "folding":
                return np.concatenate([ranked[first :: self.config.fold] for first in range(self.config.fold)])
            case _:
                return np.sort(ranked)

    def state_dict(self) -> dict:
        """The log: where each version starts, how many prompts it has, and all of their rows in a row."""
        return {
            "starts": [version.start_chunk for version in self.log],
            "lengths": [len(version.indices) for version in self.log],
            "indices": np.array([index for version in self.log for index in version.indices], dtype=np.int64),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Restores the log.

        Raises:
            `ValueError`: the state is damaged, or names rows that the dataset does not have.
        """
        log = _log_of_0_1(state) if isinstance(state, dict) and "log" in state else _log(state)
        starts = [version.start_chunk for version in log]
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"The sampler state in the checkpoint is damaged: versions start at {starts[:10]}.")
        highest = max((index for version in log for index in version.indices), default=0)
        if highest >= self.layout.pool_size:
            raise ValueError(
                f"The sampler state in the checkpoint names row {highest}, but the training dataset has "
                f"{self.layout.pool_size} rows."
            )
        self.log = log
        self._orders = {}


def _log(state) -> list[Version]:
    try:
        starts, lengths, indices = state["starts"], state["lengths"], state["indices"]
        ends = np.cumsum([0, *lengths]).tolist()
        log = [
            Version(start, tuple(indices[first:last].tolist()))
            for start, first, last in zip(starts, ends[:-1], ends[1:], strict=True)
        ]
        if ends[-1] != len(indices):
            raise ValueError(f"{len(indices)} rows for {ends[-1]}")
        _check(log)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The sampler state in the checkpoint is damaged: {error!r}.") from error
    return log


def _log_of_0_1(state) -> list[Version]:
    """Version 0.1 wrote the rows of each version into a list."""
    try:
        log = [Version(entry["start_chunk"], tuple(entry["indices"])) for entry in state["log"]]
        _check(log)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The sampler state in the checkpoint is damaged: {error!r}.") from error
    return log


def _check(log):
    numbers = [number for version in log for number in (version.start_chunk, *version.indices)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a start or a row is not an integer")
