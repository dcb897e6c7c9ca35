"""What an online run has seen, in numbers of bounded size: by chunk, by visit, and predicted against observed."""

import numpy as np


COLUMNS = (
    "chunk",
    "live_fraction",  # of all groups of the chunk
    "live_uniform",  # of the uniform draws among them; NaN without any
    "live_chosen",  # of the others; NaN without any
    "uniform_draws",  # their number
    "predicted_success",
    "observed_success",
    "pool_success",
    "skill",
    "headroom",
    "choosing",  # whether prompts were chosen (one in twenty is drawn uniformly all the same); else all were drawn so
    "visited",  # distinct prompts so far
    "retired",
    "parked",
    "unscored",
)
BINS = 10  # of predicted success
VISITS = 20  # later visits count as the last
_SUMS = ("calibration", "by_visit", "revisits")


class History:
    """
    Attributes:
        chunks (`np.ndarray` of shape `(chunks, len(COLUMNS))`): one row per observed chunk, float32.
        calibration (`np.ndarray` of shape `(2, BINS, 3)`): for chosen prompts and for uniform draws, by predicted
            success: groups, sum of predicted and sum of observed success.
        by_visit (`np.ndarray` of shape `(VISITS, 3)`): by number of the visit: groups, sum of success, live groups.
        revisits (`np.ndarray` of shape `(2, 2)`): of prompts solved by all, and by no, rollouts of several visits in
            a row: later visits, and those after which that was no longer so.
    """

    names = COLUMNS

    def __init__(self):
        self._chunks = np.zeros((64, len(COLUMNS)), np.float32)
        self._number = 0
        self.calibration = np.zeros((2, BINS, 3))
        self.by_visit = np.zeros((VISITS, 3))
        self.revisits = np.zeros((2, 2))

    @property
    def groups(self) -> float:
        """Groups with a reward so far."""
        return float(self.by_visit[:, 0].sum())

    @property
    def chunks(self) -> np.ndarray:
        """See the class."""
        return self._chunks[: self._number]

    def add(self, values: dict[str, float]) -> None:
        """Adds the row of a chunk."""
        if self._number == len(self._chunks):
            self._chunks = np.concatenate([self._chunks, np.zeros_like(self._chunks)])
        self._chunks[self._number] = [values[name] for name in COLUMNS]
        self._number += 1

    def count(self, predicted, observed, uniform, live, visits) -> None:
        """Counts the groups of a chunk, all arguments of shape `(n,)`; `visits` before this one."""
        bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
        np.add.at(
            self.calibration, (uniform.astype(int), bins), np.stack([np.ones(len(bins)), predicted, observed], 1)
        )
        places = np.minimum(visits, VISITS - 1)
        np.add.at(self.by_visit, places, np.stack([np.ones(len(places)), observed, live], 1))

    def count_revisits(self, retired, solved, parked, failed) -> None:
        """Counts the groups of a chunk, all arguments of shape `(n,)`: before it, and in it."""
        self.revisits += [
            [before.sum(), (before & ~now).sum()] for before, now in ((retired, solved), (parked, failed))
        ]

    def column(self, name: str) -> np.ndarray:
        """One of `COLUMNS`, of shape `(chunks,)`."""
        return self.chunks[:, COLUMNS.index(name)]

    def latest(self) -> dict[str, float]:
        """The last row, by name; empty before the first chunk."""
        return dict(zip(COLUMNS, self.chunks[-1].tolist(), strict=True)) if self._number else {}

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays."""
        return {"chunks": self.chunks, **{name: getattr(self, name) for name in _SUMS}}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restores what `state_dict` returned."""
        for name in _SUMS:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(f"{name} has the shape {state[name].shape}")
            setattr(self, name, state[name].copy())
        if state["chunks"].shape[1:] != (len(COLUMNS),):
            raise ValueError(f"chunks have the shape {state['chunks'].shape}")
        self._number = len(state["chunks"])
        self._chunks = np.concatenate([state["chunks"], np.zeros((64, len(COLUMNS)), np.float32)])
