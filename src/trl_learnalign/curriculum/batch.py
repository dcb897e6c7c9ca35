"""Finished groups as arrays: what each part of the curriculum learns from, whatever the order of the parts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from .events import Group
from .flight import Flight


TOLERANCE = 0.1  # of outcomes between 0 and 1: a reward model rounds otherwise in another batch


@dataclass(frozen=True)
class Batch:
    """
    Groups of n draws with G rollouts each, the state of their prompts before them included.

    Attributes:
        drawn ([`Flight`]): the draws, and what was expected of them.
        outcomes (`np.ndarray` of shape `(n, G)`): 1 for a success, else 0; graded rewards scaled to [0, 1]. NaN where
            there is none, and in a group that teaches nothing.
        sizes (`np.ndarray` of shape `(n,)`): rollouts of each group; G is the largest of them.
        masked (`np.ndarray` of shape `(n, G)`): rollouts without a token in the loss, and those that a smaller group
            has not, bool.
        live (`np.ndarray` of shape `(n,)`): groups with a gradient, bool.
        dead (`np.ndarray` of shape `(n,)`): groups that teach nothing whatever their rewards, bool: all masked, or
            without a gradient though their outcomes differ.
        visits (`np.ndarray` of shape `(n,)`): visits of the prompt before.
        retired, parked (`np.ndarray` of shape `(n,)`): state of the prompt before, bool.
        inconsistent (`np.ndarray` of shape `(n,)`): rollouts whose completion another one of the group has as well,
            with another outcome; 0 where completions were not compared.
    """

    drawn: Flight
    outcomes: np.ndarray
    sizes: np.ndarray
    masked: np.ndarray
    live: np.ndarray
    dead: np.ndarray
    visits: np.ndarray
    retired: np.ndarray
    parked: np.ndarray
    inconsistent: np.ndarray

    @property
    def trials(self) -> np.ndarray:
        """Rollouts with an outcome, of shape `(n,)`."""
        return np.isfinite(self.outcomes).sum(1)

    @property
    def successes(self) -> np.ndarray:
        """Sum of the outcomes, of shape `(n,)`."""
        return np.nansum(self.outcomes, axis=1)

    @property
    def scored(self) -> np.ndarray:
        """Groups with an outcome, of shape `(n,)`, bool."""
        return self.trials > 0

    @property
    def rates(self) -> np.ndarray:
        """Mean outcome of each group, of shape `(n,)`; NaN without any."""
        return np.divide(self.successes, self.trials, out=np.full(len(self.drawn), np.nan), where=self.scored)

    @property
    def equal(self) -> np.ndarray:
        """Groups whose outcomes are all equal, of shape `(n,)`, bool."""
        return ~varies(self.outcomes)

    def __getitem__(self, places: np.ndarray) -> "Batch":
        return Batch(*(getattr(self, one.name)[places] for one in fields(self)))


def varies(outcomes: np.ndarray) -> np.ndarray:
    """Tell whether the outcomes of each group differ, of shape `(n,)`; NaN of `(n, G)` is none."""
    known = np.isfinite(outcomes)
    return np.where(known, outcomes, -np.inf).max(1) > np.where(known, outcomes, np.inf).min(1)


def stacked(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """
    Stack rewards of shape `(G, F)`, or `(G,)` of one function, to `(n, longest G, F)`, filled up with NaN. Return also
    the size G of each group, of shape `(n,)`.
    """
    rewards = [np.asarray(group.rewards, dtype=np.float64) for group in groups]
    rewards = [one[:, None] if one.ndim == 1 else one for one in rewards]
    for group, one in zip(groups, rewards, strict=True):
        if one.ndim != 2 or 0 in one.shape or one.shape[1] != rewards[0].shape[1]:
            raise ValueError(
                f"The rewards of group {group.number} have the shape {np.shape(group.rewards)}. Pass one row for each "
                "rollout and one column for each reward function, NaN for none."
            )
    sizes = np.array([len(one) for one in rewards])
    filled = [np.pad(one, ((0, sizes.max() - len(one)), (0, 0)), constant_values=np.nan) for one in rewards]
    return np.stack(filled), sizes


def checked_mask(group: Group, size: int) -> np.ndarray:
    """Return `masked` of a group, of shape `(size,)`. Raises a `ValueError` if it has another shape."""
    masked = np.asarray(group.masked)
    if masked.shape != (size,):
        raise ValueError(
            f"`masked` of group {group.number} has the shape {masked.shape}, but the group has {size} rollouts. Pass "
            "one value for each rollout."
        )
    return masked


def count_inconsistent(outcomes: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
    """
    Count, for outcomes of shape `(n, G)`, the rollouts of each group whose completion another rollout of it has as
    well, with an outcome that differs by more than `TOLERANCE`. NaN differs from nothing.

    Returns:
        `np.ndarray` of shape `(n,)`; 0 where completions were not compared.
    """
    found = np.zeros(len(groups))
    for place, group in enumerate(groups):
        if group.alike is not None and len(set(group.alike.tolist())) < len(group.alike):
            own = outcomes[place, : len(group.alike)]
            equal = group.alike[:, None] == group.alike
            found[place] = (equal & (np.abs(own[:, None] - own) > TOLERANCE)).any(1).sum()
    return found


def most_frequent(alike: np.ndarray | None) -> int:
    """Return the place of the first rollout with the most frequent completion: 0 where all differ."""
    if alike is None:
        return 0
    _, firsts, counts = np.unique(alike, return_index=True, return_counts=True)
    return int(firsts[counts == counts.max()].min())
