"""Kinds of prompts whose success does not rise get no more than a part of their share in the pool."""

import numpy as np

from .batch import Batch
from .settings import OnlineSettings


_MOST = 128  # groups of a kind that are kept
_SURE = 1.5  # standard errors that the rise of a kind must exceed
_PRIOR = 0.25  # squared deviation that is added to those of a mean: equal values are not certain


class Progress:
    """
    Watches, for each of K kinds, whether its latest groups succeed more often than was predicted from the features,
    before. The prediction learns from groups that are older, and so stays behind a kind that rises; of what cannot be
    learnt it is right on average.

    Args:
        labels (`np.ndarray` of shape `(N,)`): the kind of each prompt, -1 for none.
        shares (`np.ndarray` of shape `(K,)`): of the pool.
        settings ([`OnlineSettings`]): of the curriculum.
        groups (`float`, *optional*): of the whole run.
    """

    NAMES = ("gains", "number")

    def __init__(self, labels: np.ndarray, shares: np.ndarray, settings: OnlineSettings, groups: float | None = None):
        self.labels, self.shares, self.settings = labels, shares, settings
        wanted = _MOST / 2 if groups is None else settings.idle_window * groups
        self.window = int(np.clip(wanted, min(settings.least_idle_window, _MOST), _MOST))
        self.gains = np.zeros((len(shares), _MOST), np.float32)
        self.number = np.zeros(len(shares), np.int64)  # groups so far

    def observe(self, batch: Batch) -> None:
        """Note by how much each group succeeded more often than predicted."""
        drawn = batch.drawn
        kinds = self.labels[drawn.rows]
        for place in np.flatnonzero(batch.scored & drawn.learnt & (kinds >= 0)).tolist():
            kind = kinds[place]
            self.gains[kind, self.number[kind] % _MOST] = batch.rates[place] - drawn.prior[place]
            self.number[kind] += 1

    def is_idle(self) -> np.ndarray:
        """Tell of which kinds enough groups came and the latest did not succeed more often than predicted, bool."""
        ages = (self.number[:, None] - 1 - np.arange(_MOST)) % _MOST
        gains = np.where(ages < self.window, self.gains, 0.0).astype(np.float64)
        mean = gains.sum(1) / self.window
        variance = (np.maximum((gains**2).sum(1) - self.window * mean**2, 0) + _PRIOR) / self.window
        return (self.number >= self.window) & (mean <= _SURE * np.sqrt(variance / self.window))

    def factors(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """
        Return what to multiply weights of draws by, so that prompts of idle kinds get `idle_share` times their share
        in the pool at most.

        Args:
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            weights (`np.ndarray` of shape `(n,)`): prompts are drawn in proportion to these.
        """
        kinds = self.labels[rows]
        sums = np.bincount(kinds[kinds >= 0], weights[kinds >= 0], minlength=len(self.shares))
        most = np.where(self.is_idle(), self.settings.idle_share * self.shares, np.inf)
        found = np.append(capped(sums, most), 1.0)  # the last is that of no kind
        return found[kinds]

    def state_dict(self) -> dict:
        """Return what was seen, and the window, which a longer run would have another of."""
        return {name: getattr(self, name) for name in self.NAMES} | {"window": self.window}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises a `ValueError` if it is of other kinds."""
        for name in self.NAMES:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(f"{name} has the shape {state[name].shape}")
            setattr(self, name, state[name].copy())
        self.window = int(state["window"])


def capped(sums: np.ndarray, most: np.ndarray) -> np.ndarray:
    """
    Return factors of at most 1 for sums of weights, so that none has more than its part `most` of the whole; where all
    have one they share the whole in proportion to these.

    Args:
        sums (`np.ndarray` of shape `(K,)`): not negative.
        most (`np.ndarray` of shape `(K,)`): infinite where there is no bound.
    """
    held, bound = np.zeros(len(sums), bool), np.isfinite(most)
    most, total = np.where(bound, most, 0.0), sums.sum()
    for _ in range(len(sums)):
        more = bound & ~held & (sums > most * total * (1 + 1e-9))
        if not more.any():
            break
        held |= more
        free, part = sums[~held].sum(), most[held].sum()
        total = free / (1 - part) if part < 1 and free > 0 else 0.0
    if total <= 0:  # all are bound
        total = 1.0
    wanted = np.where(held, most * total, sums)
    return np.divide(wanted, sums, out=np.ones(len(sums)), where=sums > 0)
