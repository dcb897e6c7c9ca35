"""GRESO (arXiv 2506.02177): prompts whose last visits had no gradient are skipped, more often the more there were."""

import numpy as np

from .base import Published, counts


class GRESO(Published):
    """
    Goes through the pool in random order and skips a prompt with a chance that grows with the number of its last
    visits that were all solved, or all not: 1 - keep^visits, at most 1 - `least`. The two values of `keep` are moved
    by `step` after each batch, so that the shares of such groups come near their `targets`.
    """

    least, step, bounds, first = 0.01, 0.01, (0.05, 0.95), 0.5
    targets = 1 / 12, 1 / 6  # shares of a batch that are always solved, and never

    def begin(self, size):
        self.arrays = {
            "place": np.zeros(1, np.int64),  # in the endless order
            "keep": np.full(2, self.first),
            "streak": np.zeros((2, size), np.int32),
        }

    def pick(self, n, random):
        found, keep, streak = [], self.arrays["keep"], self.arrays["streak"]
        while len(found) < n:
            place = self.order[int(self.arrays["place"][0])]
            self.arrays["place"] += 1
            if random.random() < np.maximum(keep ** streak[:, place], self.least).min():
                found.append(place)
        return found

    def learn(self, places, successes, advantages):
        won, lost = counts(successes)
        for kind, dead in enumerate(((lost == 0) & (won > 0), (won == 0) & (lost > 0))):
            streak = self.arrays["streak"][kind]
            for place, one in zip(places, dead, strict=True):
                streak[place] = streak[place] + 1 if one else 0
            step = self.step if dead.mean() < self.targets[kind] else -self.step
            self.arrays["keep"][kind] = np.clip(self.arrays["keep"][kind] + step, *self.bounds)
