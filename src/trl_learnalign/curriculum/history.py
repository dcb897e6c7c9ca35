"""The history of a curriculum in numbers of bounded size: over time, by visit, and predicted against observed."""

import math

import numpy as np

from .batch import Batch


COLUMNS = (
    "groups",  # observed so far
    "step",  # optimizer steps so far
    "live_fraction",  # of all groups since the row before
    "live_uniform",  # of the uniform draws among them; NaN without any
    "live_chosen",  # of the chosen ones; NaN without any
    "uniform_draws",  # their number
    "predicted_success",
    "observed_success",
    "pool_success",
    "skill",
    "headroom",
    "choosing",  # share of the groups that were drawn while prompts were chosen (one in twenty of them uniformly)
    "visited",  # distinct prompts so far
    "retired",
    "parked",
    "unscored",
)
BINS = 10  # of predicted success
VISITS = 20  # later visits count as the last
_SUMS = ("calibration", "by_visit", "revisits", "_open")


class History:
    """
    Counts groups.

    Args:
        row_groups (`int`): groups that a row holds at least.

    Attributes:
        rows (`np.ndarray` of shape `(rows, len(COLUMNS))`): float32.
        calibration (`np.ndarray` of shape `(2, BINS, 3)`): for chosen prompts and for uniform draws, by predicted
            success: groups, sum of predicted and sum of observed success.
        by_visit (`np.ndarray` of shape `(VISITS, 3)`): by number of the visit: groups, sum of success, live groups.
        revisits (`np.ndarray` of shape `(2, 2)`): of prompts solved by all, and by no, rollouts of several visits in
            a row: later visits, and those after which that was no longer so.
    """

    names = COLUMNS

    def __init__(self, row_groups: int):
        self._row_groups = row_groups
        self._rows = np.zeros((64, len(COLUMNS)), np.float32)
        self._number = 0
        self._open = np.zeros(10)  # sums over the groups since the last row, see `_shares`
        self.observed = 0  # groups, with and without a reward
        self.calibration = np.zeros((2, BINS, 3))
        self.by_visit = np.zeros((VISITS, 3))
        self.revisits = np.zeros((2, 2))

    @property
    def groups(self) -> float:
        """Groups with a reward so far."""
        return float(self.by_visit[:, 0].sum())

    @property
    def rows(self) -> np.ndarray:
        """Complete rows, and the one that is being filled."""
        return self._rows[: self._number]

    def observe(self, batch: Batch) -> dict[str, float]:
        """Count groups, and return what is known of them: the columns that are shares and means."""
        drawn, scored = batch.drawn, batch.scored
        self._calibrate(batch[scored])
        rates = batch.rates
        sums = np.array(
            [
                len(drawn),
                batch.live.sum(),
                drawn.uniform.sum(),
                (batch.live & drawn.uniform).sum(),
                drawn.predicted.sum(),
                rates[scored].sum(),
                scored.sum(),
                drawn.choosing.sum(),
                drawn.aimed.sum(),
                (batch.live & drawn.aimed).sum(),
            ]
        )
        self.observed += len(drawn)
        self._open += sums
        return _shares(sums)

    def _calibrate(self, batch):
        drawn, rates = batch.drawn, batch.rates
        bins = np.minimum((drawn.predicted * BINS).astype(int), BINS - 1)
        values = np.stack([np.ones(len(bins)), drawn.predicted, rates], 1)
        known = ~drawn.aimed  # random draws of a target are neither
        np.add.at(self.calibration, (drawn.uniform[known].astype(int), bins[known]), values[known])
        places = np.minimum(batch.visits, VISITS - 1)
        np.add.at(self.by_visit, places, np.stack([np.ones(len(places)), rates, batch.live], 1))
        good, equal = rates >= 0.5, batch.equal
        for revisits, before, now in (
            (self.revisits[0], batch.retired, equal & good),
            (self.revisits[1], batch.parked, equal & ~good),
        ):
            revisits += [before.sum(), (before & ~now).sum()]

    def record(self, values: dict[str, float]) -> None:
        """Fill the row of the latest groups with `values`, the other columns; begin a new one if it is full."""
        if not self._open[0]:
            return
        if self._number == 0 or self._full:
            self._grow()
        values = values | _shares(self._open) | {"groups": self.observed}
        self._rows[self._number - 1] = [values[name] for name in COLUMNS]
        self._full = bool(self._open[0] >= self._row_groups)
        if self._full:
            self._open = np.zeros(10)

    _full = True

    def _grow(self):
        if self._number == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._number += 1

    @property
    def choosing_share(self) -> float:
        """Share of the groups that were drawn while prompts were chosen; 0 before the first."""
        sizes = np.diff(self.column("groups"), prepend=0)
        return float(np.average(self.column("choosing"), weights=sizes)) if len(sizes) else 0.0

    def column(self, name: str) -> np.ndarray:
        """Return one of `COLUMNS`, of shape `(rows,)`."""
        return self.rows[:, COLUMNS.index(name)]

    def state_dict(self) -> dict:
        """Return the arrays."""
        arrays = {name.strip("_"): getattr(self, name) for name in _SUMS}
        return {"rows": self.rows, "observed": self.observed, "full": self._full, **arrays}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        for name in _SUMS:
            found = state[name.strip("_")]
            if found.shape != getattr(self, name).shape:
                raise ValueError(f"{name.strip('_')} has the shape {found.shape}")
            setattr(self, name, found.copy())
        if state["rows"].shape[1:] != (len(COLUMNS),):
            raise ValueError(f"rows have the shape {state['rows'].shape}")
        self.observed, self._full = int(state["observed"]), bool(state["full"])
        self._number = len(state["rows"])
        self._rows = np.concatenate([state["rows"], np.zeros((64, len(COLUMNS)), np.float32)])


def _shares(sums) -> dict[str, float]:
    """Divide sums over groups by their numbers."""
    groups, live, uniform, live_uniform, predicted, observed, scored, choosing, aimed, live_aimed = sums.tolist()
    chosen = groups - uniform - aimed
    return {
        "live_fraction": live / groups,
        "live_uniform": live_uniform / uniform if uniform else math.nan,
        "live_chosen": (live - live_uniform - live_aimed) / chosen if chosen else math.nan,
        "uniform_draws": uniform,
        "predicted_success": predicted / groups,
        "observed_success": observed / scored if scored else math.nan,
        "choosing": choosing / groups,
    }
