"""Kinds of prompts by what became of their groups: a gradient as expected or none, and success that rises or not."""

import numpy as np

from .batch import Batch
from .kinds import moments
from .predictor import expected_deviation
from .settings import OnlineSettings


_MOST = 128  # groups of a kind that are kept
_SURE = 1.5  # standard errors that the rise of a kind must exceed
_ENOUGH = 0.5  # of the deviation that was expected
_AS_EXPECTED = 1.0  # deviation, as of two groups or more, that is added as if it had come as expected


class Progress:
    """
    Watches the latest groups of each of K kinds.

    - **Realised.** How much their rewards deviate, over half of what was expected of success rates. The rollouts of a
      question that is answered by yes or no, for ever the same until the policy changes its mind, are all right or all
      wrong: success is one half over the prompts, and no group has a gradient.
    - **Rise.** Whether they succeed more often than was predicted from the features, before. The slow prediction
      learns from groups that are older, and so stays behind a kind that is learnt; of what cannot be learnt it is
      right.

    Args:
        labels (`np.ndarray` of shape `(N,)`): the kind of each prompt, -1 for none.
        number (`int`): K.
        group_size (`int`): rollouts of a group.
        settings ([`OnlineSettings`]): of the curriculum.
        groups (`float`, *optional*): of the whole run.
    """

    NAMES = ("gains", "observed", "expected", "number")

    def __init__(
        self, labels: np.ndarray, number: int, group_size: int, settings: OnlineSettings, groups: float | None = None
    ):
        self.labels, self.group_size, self.settings = labels, group_size, settings
        wanted = _MOST / 2 if groups is None else settings.idle_window * groups
        self.window = int(np.clip(wanted, min(settings.least_idle_window, _MOST), _MOST))
        self.gains = np.zeros((number, _MOST), np.float32)
        self.observed = np.zeros((number, _MOST), np.float32)
        self.expected = np.zeros((number, _MOST), np.float32)
        self.number = np.zeros(number, np.int64)  # groups so far

    def observe(self, batch: Batch) -> None:
        """Note what became of groups."""
        drawn = batch.drawn
        kinds, rates = self.labels[drawn.rows], np.nan_to_num(batch.rates)
        expected = expected_deviation(drawn.a, drawn.b, self.group_size)
        observed = np.sqrt(rates * (1 - rates))  # a group without a gradient has no outcome, or equal ones
        for place in np.flatnonzero(batch.scored & drawn.learnt & (kinds >= 0)).tolist():
            kind = kinds[place]
            at = kind, self.number[kind] % _MOST
            self.gains[at] = rates[place] - drawn.slow[place]
            self.observed[at], self.expected[at] = observed[place], expected[place]
            self.number[kind] += 1

    def _latest(self) -> np.ndarray:
        ages = (self.number[:, None] - 1 - np.arange(_MOST)) % _MOST
        return ages < np.minimum(self.number, self.window)[:, None]

    def is_idle(self) -> np.ndarray:
        """Tell of which kinds enough groups came and the latest did not succeed more often than predicted, bool."""
        latest = self._latest()
        gains = np.where(latest, self.gains, 0.0).astype(np.float64)
        mean, error = moments(latest.sum(1), gains.sum(1), (gains**2).sum(1))
        return (self.number >= self.window) & (mean <= _SURE * error)

    def realised(self) -> np.ndarray:
        """
        Return the deviation of the latest groups of each kind over half of what was expected, at most 1: chosen
        prompts are those that more was expected of than they have, and most kinds have somewhat less.
        """
        latest = self._latest()
        observed, expected = (
            np.where(latest, part, 0.0).sum(1, dtype=np.float64) for part in (self.observed, self.expected)
        )
        return np.minimum((observed + _AS_EXPECTED) / (_ENOUGH * expected + _AS_EXPECTED), 1.0)

    def factors(self, rows: np.ndarray) -> np.ndarray:
        """Return what to multiply the utility of prompts by, from their rows in the dataset."""
        own = self.realised() * np.where(self.is_idle(), self.settings.idle_factor, 1.0)
        return np.append(own, 1.0)[self.labels[rows]]  # the last is that of no kind

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
