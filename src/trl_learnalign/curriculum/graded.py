"""Graded rewards: a common scale for them, and how much they vary within a group."""

import numpy as np


class RewardScale:
    """
    Scales rewards to [0, 1]: the ends are the 1st and the 99th percentile of the latest `RECENT`, so that a single odd
    reward moves nothing.
    """

    RECENT = 8192
    ENDS = 0.01, 0.99

    def __init__(self):
        self._recent = np.zeros(0, np.float32)

    @property
    def recent(self) -> np.ndarray:
        """The latest rewards, of shape `(n,)`, float32."""
        return self._recent

    def learn(self, rewards: np.ndarray) -> None:
        """Note rewards; NaN is none."""
        known = rewards[np.isfinite(rewards)]
        self._recent = np.concatenate([self._recent, known.astype(np.float32)])[-self.RECENT :]

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Learn from these rewards, and return them scaled; NaN stays."""
        self.learn(rewards)
        if not len(self._recent):
            return np.full(rewards.shape, np.nan)
        least, greatest = np.quantile(self._recent.astype(np.float64), self.ENDS)
        if least == greatest:  # nearly all are equal
            least, greatest = float(self._recent.min()), float(self._recent.max())
        return np.clip((rewards - least) / max(greatest - least, 1e-12), 0, 1)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the latest rewards."""
        return {"recent": self._recent}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state_dict` returned."""
        if state["recent"].ndim != 1:
            raise ValueError(f"rewards have the shape {state['recent'].shape}")
        self._recent = state["recent"].copy()


class VarianceCurve:
    """
    The variance of a group's graded rewards as a function of their predicted mean, both of rewards scaled to [0, 1].
    Where few groups were seen it has the shape of m (1 - m), the variance of successes, and the size that groups have
    shown: a reward that gives half a point for the form has no variance at .5.
    """

    BINS = 12
    PRIOR = 4.0  # groups that m (1 - m) counts for
    MEMORY = 0.995  # of a bin, per group in it: the last 200 count

    def __init__(self):
        self._centres = np.linspace(0, 1, self.BINS)
        self._sums = np.zeros((3, self.BINS))  # groups, their variances, their m (1 - m)

    def observe(self, means: np.ndarray, variances: np.ndarray) -> None:
        """Learn that groups with these predicted means had these variances, of shape `(n,)` each."""
        bins = np.rint(means * (self.BINS - 1)).astype(int)
        self._sums *= self.MEMORY ** np.bincount(bins, minlength=self.BINS)
        np.add.at(self._sums[0], bins, 1.0)
        np.add.at(self._sums[1], bins, variances)
        np.add.at(self._sums[2], bins, means * (1 - means))

    @property
    def ratio(self) -> float:
        """Variance within groups over m (1 - m), 1 of successes."""
        few = self.PRIOR / 4  # groups of successes at m = 1/2
        return float((few + self._sums[1].sum()) / (few + self._sums[2].sum()))

    def __call__(self, means: np.ndarray) -> np.ndarray:
        """Return the expected variances of groups with these predicted means."""
        prior = self.ratio * self._centres * (1 - self._centres)
        values = (self.PRIOR * prior + self._sums[1]) / (self.PRIOR + self._sums[0])
        return np.interp(means, self._centres, values)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the sums."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state_dict` returned."""
        if state["sums"].shape != self._sums.shape:
            raise ValueError(f"sums have the shape {state['sums'].shape}")
        self._sums = state["sums"].copy()
