"""Shares of kinds of prompts in what is drawn: none that is alive falls to nothing."""

import numpy as np


ALIVE = 0.1  # mean predicted success from which on a kind is alive


def raised(logs: np.ndarray, success: np.ndarray, kinds: np.ndarray, sizes: np.ndarray, part: float) -> np.ndarray:
    """
    Raise the weights by which prompts are drawn, where a kind would get less than a part of its share of the pool:
    what is mastered, or does not rise, is lost where it is no longer drawn. The others are drawn less in proportion.
    A kind that is hardly ever solved is left as it is.

    Args:
        logs (`np.ndarray` of shape `(n,)`): logarithms of the weights, -inf for prompts that are not drawn now.
        success (`np.ndarray` of shape `(n,)`): predicted, of each prompt.
        kinds (`np.ndarray` of shape `(n,)`): from 0 to K - 1, or -1 for none.
        sizes (`np.ndarray` of shape `(K,)`): prompts of each kind in the pool.
        part (`float`): of a kind's share of the pool, at least 0 and below 1.

    Returns:
        `np.ndarray` of shape `(n,)`: logarithms of the new weights, whose sum is another.
    """
    if not part or not np.isfinite(logs).any():
        return logs
    number, places = len(sizes) + 1, kinds + 1  # the first is of no kind
    weights = np.exp(logs - logs.max())
    sums = np.bincount(places, weights, number)
    counts = np.bincount(places, weights > 0, number)
    means = np.bincount(places, success * (weights > 0), number) / np.maximum(counts, 1)
    least = np.append(0.0, part * sizes / max(1, sizes.sum())) * ((means >= ALIVE) & (sums > 0))
    low = np.zeros(number, bool)
    while True:  # raising one takes from the others, and may bring the next below its part
        scale = (1 - least[low].sum()) / max(sums[~low].sum(), 1e-300)
        more = ~low & (scale * sums < least)
        if not more.any():
            break
        low |= more
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(low, np.log(least) - np.log(sums), np.log(scale))
    return logs + factors[places]
