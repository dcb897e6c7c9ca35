"""The target of a run: rows whose gradients set the direction, drawn often enough that it stays fresh."""

import math
import zlib

import numpy as np

from .batch import Batch
from .order import Permutations, UniformDraws, rounded
from .settings import OnlineSettings


class Target:
    """
    Rows that the policy should become good at. While prompts are chosen some draws are random rows of the target. They
    come beside the uniform draws of the pool and are none of them, so what these measure stays unbiased.

    Args:
        mask (`np.ndarray` of shape `(N,)`): rows that are the target, bool.
        pool (`np.ndarray` of shape `(n,)`): rows that may be drawn.
        size (`int`): N.
        seed (`int`): of the random order.
        settings ([`OnlineSettings`]): the share of the target, and what fades.

    Attributes:
        rows (`np.ndarray` of shape `(t,)`): those of the pool that are the target.
        counts (`np.ndarray` of shape `(3,)`): groups so far, those of the target, and the live ones of these.

    Raises:
        `ValueError`: the mask has another shape or type, or holds for no row of the pool, or for all.
    """

    def __init__(self, mask: np.ndarray, pool: np.ndarray, size: int, seed: int, settings: OnlineSettings):
        mask = np.asarray(mask)
        if mask.shape != (size,) or mask.dtype != np.bool_:
            raise ValueError(
                f"`target` has the shape {mask.shape} and the type {mask.dtype}, but must be True or False for each "
                f"of {size} prompts. Pass a mask of booleans."
            )
        if not settings.alignment:
            raise ValueError(
                "`target` is given, but with `OnlineSettings(alignment=False)` gradients are not compared with it. "
                "Set `alignment=True`, or leave `target` out."
            )
        self.mask, self.settings = mask, settings
        self.rows = pool[mask[pool]]
        if not 0 < len(self.rows) < len(pool):
            raise ValueError(
                f"`target` holds {len(self.rows)} of the {len(pool)} rows that may be drawn, but must hold some of "
                "them and not all. Mark the rows to become good at, or leave `target` out."
            )
        self._pool_size = len(pool)
        self._order = UniformDraws(self.rows, Permutations(len(self.rows), seed))
        self.counts = np.zeros(3, np.int64)
        self._sums = np.zeros(2)  # of random draws of the target, faded: number, success
        self._latest = math.nan  # share of the groups that were observed last

    @property
    def share(self) -> float:
        """Share of the pool."""
        return len(self.rows) / self._pool_size

    @property
    def share_drawn(self) -> float:
        """Share of the groups so far; NaN before any."""
        return float(self.counts[1] / self.counts[0]) if self.counts[0] else math.nan

    @property
    def success(self) -> float:
        """Mean success of some 200 random draws of late; NaN before any."""
        return float(self._sums[1] / self._sums[0]) if self._sums[0] else math.nan

    @property
    def is_dead(self) -> bool:
        """True if several groups of the target were observed, none of which was live: it has no gradient."""
        return bool(self.counts[1] >= self.settings.least_tried and not self.counts[2])

    @property
    def digest(self) -> int:
        """A number that tells these rows from others."""
        return zlib.crc32(self.mask.tobytes())

    def take(self, uniform: float, most: int, waiting: np.ndarray, generator: np.random.Generator) -> list[int]:
        """
        Return random rows of the target, fewer where others are not free.

        Args:
            uniform (`float`): uniform draws of the pool that they come beside, in the mean.
            most (`int`): of these rows.
            waiting (`np.ndarray` of shape `(w,)`): rows that are not free.
            generator (`np.random.Generator`): rounds at random.
        """
        share = self.settings.target_share
        number = rounded(uniform * share / (1 - share), generator)
        waiting = np.intersect1d(waiting, self.rows)
        return self._order.take(min(number, most, len(self.rows) - len(waiting)), waiting)

    def observe(self, batch: Batch) -> None:
        """Count groups."""
        drawn, own = batch.drawn, self.mask[batch.drawn.rows]
        self.counts += [len(drawn), own.sum(), (own & batch.live).sum()]
        self._latest = float(own.mean())
        order = np.argsort(drawn.numbers, kind="stable")
        random = own & (drawn.aimed | drawn.uniform) & batch.scored
        for rate in batch.rates[order[random[order]]].tolist():
            self._sums = self._sums * self.settings.judge_memory + [1, rate]

    def metrics(self) -> dict[str, float]:
        """Return values for a log."""
        return {"target_fraction": self._latest, "target_success": self.success}

    def state_dict(self) -> dict:
        """Return the place in the order, and counts."""
        return {"order": self._order.state_dict(), "counts": self.counts, "sums": self._sums, "latest": self._latest}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises a `ValueError` if it is damaged."""
        if state["counts"].shape != (3,) or state["sums"].shape != (2,):
            raise ValueError(f"counts have the shape {state['counts'].shape}")
        self._order.load_state_dict(state["order"])
        self.counts, self._sums = state["counts"].copy(), state["sums"].copy()
        self._latest = float(state["latest"])
