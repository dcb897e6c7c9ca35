"""Choices among ranked prompts: quotas, the best ones or a random draw."""

from collections.abc import Sequence

import numpy as np
import torch


def choose(
    ranking: "Sequence[int] | np.ndarray",
    eligible: np.ndarray,
    num: int,
    groups: np.ndarray | None = None,
    quota: str = "proportional",
) -> np.ndarray:
    """
    Choose prompts by their ranking.

    Args:
        ranking (`Sequence[int]` or `np.ndarray`): all n positions, best first.
        eligible (`np.ndarray` of shape `(n,)`): whether a prompt may be chosen, bool.
        num (`int`): how many at most.
        groups (`np.ndarray` of shape `(n,)`, *optional*): the group of each prompt. Each group gets its quota; what a
            group without enough eligible prompts leaves over goes to the others.
        quota (`str`): `"proportional"` to a group's share of the n prompts, or `"equal"`.

    Returns:
        `np.ndarray` of shape `(chosen,)`: positions of the chosen prompts, best first.
    """
    order = np.asarray(ranking, dtype=np.int64)
    order = order[eligible[order]]
    if groups is None:
        return order[:num]
    names, places = np.unique(groups, return_inverse=True)
    available = np.bincount(places[order], minlength=len(names))
    shares = np.bincount(places, minlength=len(names)) if quota == "proportional" else np.ones(len(names))
    left = apportion(num, shares.astype(float), available)
    chosen = []
    for position in order.tolist():
        group = places[position]
        if left[group] > 0:
            left[group] -= 1
            chosen.append(position)
    return np.array(chosen, dtype=np.int64)


def apportion(num: int, shares: np.ndarray, available: np.ndarray) -> np.ndarray:
    """
    Divide `num`, or all that is available, into whole numbers in proportion to `shares`, none above `available`, by
    largest remainders. Ties go to the earlier entry.
    """
    given = np.zeros(len(shares), dtype=np.int64)
    num = min(num, int(available.sum()))
    while (rest := num - int(given.sum())) > 0:
        weights = np.where(given < available, shares, 0.0)
        exact = rest * weights / weights.sum()
        more = np.minimum(np.floor(exact).astype(np.int64), available - given)
        if (more == np.floor(exact)).all():  # nothing is left over by a group without enough
            first = np.argsort(np.where(given + more < available, more - exact, np.inf), kind="stable")
            more[first[: min(rest - more.sum(), int((given + more < available).sum()))]] += 1
        given += more
    return given


def draw_order(scores: np.ndarray, seed: int) -> np.ndarray:
    """
    Order all n positions as a draw without replacement in proportion to their scores would (Efraimidis and Spirakis,
    2006). Positions whose score is not above 0 cannot be drawn: they come last, the best first, ties in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_min(1e-300).log().numpy()
    positive = scores > 0
    keys = np.where(positive, noise / np.where(positive, scores, 1.0), -np.inf)
    return np.lexsort((noise, -np.where(positive, 0.0, scores), -keys))
