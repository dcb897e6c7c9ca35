"""InSight (arXiv 2603.01907): what a prompt's rollouts are expected to tell of its success rate, weighted."""

import numpy as np
import torch

from .mopps import MoPPS


class InSight(MoPPS):
    """
    Chooses, of 16 times as many random candidates, those with the greatest m (1 - m) exp(-eta (m - mu)^2) I, where m
    is the mean of a prompt's Beta posterior and I the mutual information between its success rate and the rewards of
    its rollouts. `mu` is .3, which the paper found best; we found no value of `eta` in it, and take 1.
    """

    mu, eta = 0.3, 1.0

    def score(self, a, b, random):
        mean = a / (a + b)
        weight = mean * (1 - mean) * np.exp(-self.eta * (mean - self.mu) ** 2)
        return weight * mutual_information(a, b, self.run.group_size)


def mutual_information(a: np.ndarray, b: np.ndarray, group_size: int) -> np.ndarray:
    """
    Return the mutual information between a success rate distributed as Beta(a, b) and the number of successes in a
    group, which tells all that the single rewards tell.

    Args:
        a (`np.ndarray` of shape `(n,)`): and
        b (`np.ndarray` of shape `(n,)`): parameters.
        group_size (`int`): rollouts.

    Returns:
        `np.ndarray` of shape `(n,)`, in nats.
    """
    s = torch.arange(group_size + 1, dtype=torch.float64)
    first, second = (torch.from_numpy(np.asarray(part, np.float64))[:, None] for part in (a, b))
    whole, failures = first + second + group_size, group_size - s
    ways = torch.lgamma(s[-1] + 1) - torch.lgamma(s + 1) - torch.lgamma(failures + 1)
    log_chance = ways + _log_beta(first + s, second + failures) - _log_beta(first, second)  # beta-binomial, (n, G + 1)
    # Given s, the rate is Beta(a + s, b + G - s): the expected logarithm of the binomial chance has a closed form
    total = torch.digamma(whole)
    known = s * (torch.digamma(first + s) - total) + failures * (torch.digamma(second + failures) - total)
    return (log_chance.exp() * (ways + known - log_chance)).sum(1).numpy()


def _log_beta(a, b):
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
