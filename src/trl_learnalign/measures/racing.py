"""The rule of a race: few rollouts for all prompts, and more for those that may be among the best."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..data.columns import needs_measures
from ..host import Host


if TYPE_CHECKING:
    from ..config import LearnAlignConfig

LEAST_CHANCE = 0.1  # of ending among the best, below which a prompt gets no more rollouts
_FEWEST = 4  # rollouts of a prompt, or there are no rounds

Prior = tuple[float, float]


def check_race(host: Host, config: "LearnAlignConfig") -> None:
    """Raise a `ValueError` for a race of too few rollouts, or to a condition that only its end could decide."""
    each = config.num_rollouts or host.group_size
    if each < _FEWEST:
        raise ValueError(
            f"`rollouts` is 'racing', but each prompt has only {each} rollouts, which leaves nothing to save. Set "
            f"`num_rollouts` to at least {_FEWEST}, or leave `rollouts` out."
        )
    if needs_measures(host.dataset, config):
        raise ValueError(
            f"`rollouts` is 'racing', but `where` ({config.where!r}) names what is measured: a race goes on with the "
            "best prompts, of which the condition may then leave few. Name only columns of the dataset, or leave "
            "`rollouts` out."
        )


def rounds_of(num_rollouts: int) -> list[int]:
    """
    Return how many rollouts a prompt has after each round: 2, the geometric mean of 2 and all, all. No round is of a
    single rollout.
    """
    middle = round(math.sqrt(2 * num_rollouts))
    return [2, *[middle] * (4 <= middle <= num_rollouts - 2), num_rollouts]


def fit_prior(successes: np.ndarray, tries: np.ndarray) -> Prior:
    """
    Fit a Beta distribution of success rates by moments, as if three more prompts had none, one and two successes of
    two. With m the mean rate and w = mean of k (n - k) / (n (n - 1)), which estimates E[p (1 - p)], a + b = r / (1 -
    r) for r = w / (m (1 - m)), and a = m (a + b).

    Args:
        successes (`np.ndarray` of shape `(n,)`): k of each prompt.
        tries (`np.ndarray` of shape `(n,)`): of how many rollouts.
    """
    k, n = np.append(successes, (0, 1, 2)).astype(float), np.append(tries, (2, 2, 2)).astype(float)
    mean, within = k.sum() / n.sum(), (k * (n - k)).sum() / (n * (n - 1)).sum()
    share = min(within / (mean * (1 - mean)), 0.999)
    both = share / (1 - share)
    return mean * both, (1 - mean) * both


def expected_learnability(successes: np.ndarray, tries: np.ndarray, prior: Prior) -> np.ndarray:
    """
    Return E[p (1 - p)] = A B / ((A + B) (A + B + 1)) with A = a + k and B = b + n - k, in [0, .25]; 0 where all
    rollouts came out the same, which have no gradient.
    """
    a, b = prior[0] + successes, prior[1] + (tries - successes)
    return np.where((successes > 0) & (successes < tries), a * b / ((a + b) * (a + b + 1)), 0.0)


def contenders(successes: np.ndarray, tries: np.ndarray, left: int, num_prompts: int, prior: Prior) -> np.ndarray:
    """
    Tell which prompts go on: those whose chance of ending among the best is at least `LEAST_CHANCE`. A prompt's
    further successes follow the beta-binomial distribution. The cut is the expected learnability that, by these
    chances, `num_prompts` prompts will reach; if fewer will be learnable, any that is above 0.

    Args:
        successes (`np.ndarray` of shape `(n,)`): k of each prompt.
        tries (`np.ndarray` of shape `(n,)`): of how many rollouts; a prompt without any does not go on.
        left (`int`): rollouts that a prompt gets by the end if it goes on.
        num_prompts (`int`): how many will be chosen.
        prior (`tuple[float, float]`): a and b, see [`fit_prior`].

    Returns:
        `np.ndarray` of shape `(n,)`: bool.
    """
    states, places, counts = np.unique(np.stack([successes, tries]), axis=1, return_inverse=True, return_counts=True)
    k, n = states[0][:, None], states[1][:, None]
    more = np.arange(left + 1)
    a, b = prior[0] + k, prior[1] + n - k
    before = more[:-1]  # P(j + 1) / P(j) = (left - j) (a + j) / ((j + 1) (b + left - j - 1))
    ratios = np.log((left - before) / (before + 1)) + np.log(a + before) - np.log(b + left - before - 1)
    logs = np.concatenate([np.zeros((len(a), 1)), np.cumsum(ratios, axis=1)], axis=1)
    chances = np.exp(logs - logs.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    values = expected_learnability(k + more, n + left, prior)
    order = np.argsort(-values, axis=None)
    reached = np.cumsum((chances * (counts * (states[1] > 0))[:, None]).ravel()[order])
    cut = values.ravel()[order[min(int(np.searchsorted(reached, num_prompts)), len(order) - 1)]]
    cut = max(float(cut), float(values[values > 0].min()))
    ends = np.where(values >= cut, chances, 0.0).sum(1)
    return ((ends >= LEAST_CHANCE) & (states[1] > 0))[places.reshape(-1)]
