"""Random prompts, then those of a selection; again and again if wanted."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.order import RandomOrder
from ..host.rewards import check_success_reward
from ..run.layout import Layout
from . import staged_plan as plan
from .base import Describes, Prepares, Run, Schedule, Selects
from .reviews import Reviews


@dataclass(frozen=True)
class Version:
    """From chunk `start_chunk` on the stream visits `indices`, or goes on with random prompts if they are empty."""

    start_chunk: int
    indices: tuple[int, ...]


class StagedSchedule(Schedule, Selects, Describes, Prepares):
    """
    Random prompts during the warm-up, then those of a selection, in `prompt_order`; a new selection after every
    `reselect_every` passes. The row of a draw is a pure function of the layout, the log of versions and its number:

        chunk     0    1    2    3    4    5    6    7    8
        version   0    0    0    1    1    1    1    2    2
        log       (0, random)    (3, selection 1)    (7, selection 2)

    Within a version, prompts are visited pass by pass; a chunk may contain the end of one pass and the beginning of
    the next. So no prompt is dropped, and two prompts of a version are visited equally often, or one of them once
    more; but with `review_every` see [`~trl_learnalign.schedules.reviews.Reviews`].

    Args:
        run ([`Run`]): the run that begins.
    """

    layout: Layout
    work: plan.Work  # of a selection

    def __init__(self, run: Run):
        super().__init__(run)
        self.config = run.config
        self.log = [Version(0, ())]
        self.drawn = 0  # draws so far
        self._orders: dict[int, tuple[RandomOrder, np.ndarray]] = {}
        every = self.config.review_every
        self.reviews = None if every is None else Reviews(run.pool_size, every)

    def fit(self, host) -> Layout:
        """Count what selections will look at. An epoch has `num_prompts` prompts, after the warm-up."""
        self.host, self.work = host, plan.work_of(self.run.dataset, self.config)
        if self.reviews is not None:
            check_success_reward(host.reward_names, self.config.success_reward, self.config.learnability)
        prompts = min(self.config.num_prompts, self.run.pool_size)
        self.layout = Layout(**host.layout(), num_prompts=prompts, warmup_prompts=self.config.warmup_prompts)
        return self.layout

    # Draws ------------------------------------------------------------------------------------------------------

    def choose(self, n: int) -> list[int]:
        """Return the next n rows."""
        first, self.drawn = self.drawn, self.drawn + n
        return [self._draw(number) for number in range(first, self.drawn)]

    def _draw(self, number):
        place, order, indices, _ = self._source(number)
        if place == 0 or self.reviews is None:
            return self.row(number)
        return self.reviews.draw(place, order, indices)

    def row(self, number: int) -> int:
        """Return the dataset row of a draw, counted from 0, where all passes have all prompts."""
        _, order, indices, offset = self._source(number)
        return int(indices[order[offset]])

    def _source(self, number):
        """Return the version that a draw is of (0: random prompts), its order and rows, and the place in the order."""
        chunk = number // self.layout.chunk_prompts
        place = bisect_right(self.log, chunk, key=lambda version: version.start_chunk) - 1
        version = self.log[place]
        if not version.indices:  # random prompts: the order of version 0, as if nothing had been selected
            place, version = 0, self.log[0]
        if place not in self._orders:
            indices = self._indices(place)
            shuffled = self.layout.shuffle and (place == 0 or self.config.prompt_order == "shuffle")
            seed = self.layout.seed + place * 1_000_003
            self._orders[place] = RandomOrder(len(indices), seed, shuffled), indices
        return place, *self._orders[place], number - version.start_chunk * self.layout.chunk_prompts

    def _indices(self, place):
        """Return the rows of a version before they are shuffled: by row, or by rank, or folded."""
        if not place:
            return np.arange(self.layout.pool_size)
        ranked = np.array(self.log[place].indices, dtype=np.int64)
        match self.config.prompt_order:
            case "ranked":
                return ranked
            case "folding":
                rising = ranked[::-1]  # as DELT's code sorts
                return np.concatenate([rising[first :: self.config.fold] for first in range(self.config.fold)])
            case _:
                return np.sort(ranked)

    # Reviews ----------------------------------------------------------------------------------------------------

    def observe(self, groups):
        """Learn which prompts were solved, for reviews."""
        if self.reviews is None or not groups:
            return
        deciding = self.host.deciding(torch.from_numpy(np.stack([group.rewards for group in groups])), self.config)
        rows = [group.row for group in groups]
        self.reviews.observe(rows, deciding, self.config.success_threshold, self._selected())

    def metrics(self):
        """Return the shares that are solved and forgotten, where there are reviews."""
        reviewed = self.reviews is not None and self.in_use_from is not None
        return self.reviews.metrics(self._selected()) if reviewed else {}

    def _selected(self):
        return np.array(self.log[-1].indices, np.int64)

    # Selections -------------------------------------------------------------------------------------------------

    def accept(self, start: int, indices: Sequence[int]) -> None:
        """Add a version to the log: from chunk `start` on, train on `indices` (empty: random prompts)."""
        last = self.log[-1].start_chunk
        if start < last:
            raise ValueError(f"A selection cannot take effect at chunk {start}, before the last one, at {last}.")
        self.log.append(Version(start, tuple(indices)))

    def due(self, step: int, max_steps: int, drawn: int) -> bool:
        """Tell whether the warm-up has ended, or the last selection was visited `reselect_every` times."""
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
        Check that the warm-up leaves something to train on.

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
    def stage(self) -> int:
        """Selections so far."""
        return len(self.log) - 1

    @property
    def in_use_from(self) -> int | None:
        """The chunk from which on the last selection is trained on."""
        return self.log[-1].start_chunk if self.log[-1].indices else None

    # What is said -----------------------------------------------------------------------------------------------

    def plan(self, step: int, max_steps: int, due: bool) -> list[str]:
        """Return three lines: the warm-up, the selection, and the training on it."""
        return plan.plan_lines(self.layout, self.config, self.work, max_steps, step, self.log, due)

    def warning(self, max_steps: int) -> str | None:
        """Return a warning if the warm-up takes much of the run."""
        return plan.warmup_warning(self.layout, max_steps)

    def estimate(self, step: int, since: int, seconds: float) -> str | None:
        """Return a line about how long the selection may take."""
        if self.config.ranking().at_random:
            return None
        return plan.estimate_line(self.layout, self.config, self.work, step, since, seconds)

    def report(self, host, directory: Path) -> Path | None:
        """Write the report about the selections so far, as every selection does when it is made."""
        if not self.stage or not host.accelerator.is_main_process:
            return None
        from ..report.selection_page import write_report  # with matplotlib

        passes = None if self.reviews is None else self.reviews.passes
        return write_report(directory, host.trainer.state.global_step, passes)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """
        Return the number of draws and the log: where each version starts, how many prompts it has, and all of their
        rows in a row.
        """
        return {
            "drawn": self.drawn,
            "starts": [version.start_chunk for version in self.log],
            "lengths": [len(version.indices) for version in self.log],
            "indices": np.array([index for version in self.log for index in version.indices], dtype=np.int64),
        } | ({} if self.reviews is None else {"reviews": self.reviews.state_dict()})

    def load_state_dict(self, state: dict) -> None:
        """
        Restore the log.

        Raises:
            `ValueError`: the state is damaged, or names rows that the dataset does not have.
        """
        drawn, log = _read(state)
        starts = [version.start_chunk for version in log]
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"The sampler state in the checkpoint is damaged: versions start at {starts[:10]}.")
        highest = max((index for version in log for index in version.indices), default=0)
        if highest >= self.layout.pool_size:
            raise ValueError(
                f"The sampler state in the checkpoint names row {highest}, but the training dataset has "
                f"{self.layout.pool_size} rows."
            )
        if self.reviews is not None and "reviews" in state:  # not those of a run that had none before its selection
            self.reviews.load_state_dict(state["reviews"])
        self.drawn, self.log = drawn, log
        self._orders = {}


def _read(state) -> tuple[int, list[Version]]:
    """Return the number of draws and the log of a state."""
    try:
        drawn, starts, lengths, indices = (state[name] for name in ("drawn", "starts", "lengths", "indices"))
        ends = np.cumsum([0, *lengths]).tolist()
        log = [
            Version(start, tuple(indices[first:last].tolist()))
            for start, first, last in zip(starts, ends[:-1], ends[1:], strict=True)
        ]
        if ends[-1] != len(indices):
            raise ValueError(f"{len(indices)} rows for {ends[-1]}")
        numbers = [drawn, *(number for version in log for number in (version.start_chunk, *version.indices))]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a start or a row is not an integer")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"The sampler state in the checkpoint is damaged: {error!r}.") from error
    return drawn, log
