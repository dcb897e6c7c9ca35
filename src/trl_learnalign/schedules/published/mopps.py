"""MoPPS (arXiv 2507.04632): a draw from each prompt's Beta posterior, and the prompts nearest to one half."""

import numpy as np

from .base import Published, best, candidates, counts


class MoPPS(Published):
    """
    Draws a success rate from the Beta posterior of each of 16 times as many random candidates as are wanted, and
    chooses those nearest to `target`. The posterior begins as Beta(1, 1), and `kept` (lambda) of it is kept at a
    visit: 1 in the authors' runs on MATH, .5 on Countdown.
    """

    candidates, target, kept = 16, 0.5, 1.0

    def begin(self, size):
        self.arrays = {"a": np.ones(size), "b": np.ones(size)}

    def pick(self, n, random):
        places = candidates(len(self.pool), self.candidates * n, random)
        return best(places, self.score(self.arrays["a"][places], self.arrays["b"][places], random), n, random)

    def score(self, a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the number to choose by for posteriors Beta(a, b)."""
        return -np.abs(random.beta(a, b) - self.target)

    def learn(self, places, successes, advantages):
        for name, number in zip("ab", counts(successes), strict=True):
            array = self.arrays[name]
            for place, more in zip(places, number, strict=True):  # a prompt may have come twice
                array[place] = self.kept * array[place] + (1 - self.kept) + more
