"""prime-rl's pools: prompts drawn in proportion to a weight, by their last success rate."""

import numpy as np

from .base import Published, rates


class Pools(Published):
    """
    Draws in proportion to a weight: `weight` for prompts whose last success rate was at most `hard` or above `easy`, 1
    for all others and for those not seen yet. One group decides.
    """

    hard, easy, weight = 0.25, 0.75, 0.2

    def begin(self, size):
        self.arrays = {"weights": np.ones(size)}

    def pick(self, n, random):
        weights = self.arrays["weights"]
        return random.choice(len(weights), n, replace=n > len(weights), p=weights / weights.sum())

    def learn(self, places, successes, advantages):
        known, found = rates(places, successes)
        normal = (found > self.hard) & (found <= self.easy)
        self.arrays["weights"][known] = np.where(normal, 1.0, self.weight)
