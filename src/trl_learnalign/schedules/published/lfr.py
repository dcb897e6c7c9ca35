"""LFR (arXiv 2409.06131): learn all, focus on what is hard, review all."""

import numpy as np

from .base import Published, best, rates


class LFR(Published):
    """
    Goes through the whole pool, then through the half of it with the lowest success at the last visit, reviews the
    whole pool, and goes through the lowest 30 %; review and focus then take turns. (Perplexity decides in the paper,
    which is about pretraining.) Logs the share of prompts that were solved by all rollouts of a visit and not of the
    last one: `forgotten`.
    """

    focus = 0.5, 0.3  # the share of the pool, the first time and later

    def begin(self, size):
        self.arrays = {
            "rates": np.full(size, np.nan, np.float32),  # at the last visit
            "solved": np.zeros(size, bool),
            "round": np.full(size, -1, np.int32),  # places that the round goes through, in order
            "place": np.zeros(3, np.int64),  # in the round, its length, its number
        }

    def pick(self, n, random):
        return [self._next(random) for _ in range(n)]

    def _next(self, random):
        position, length, number = self.arrays["place"].tolist()
        if position == length:
            places = self._round(number, random)
            self.arrays["round"][: len(places)] = places
            position, length, number = 0, len(places), number + 1
        self.arrays["place"][:] = position + 1, length, number
        return int(self.arrays["round"][position])

    def _round(self, number, random):
        every = random.permutation(len(self.pool))
        if number % 2 == 0:
            return every
        share, last = self.focus[min(number // 2, 1)], self.arrays["rates"][every]
        # A prompt whose group has not come back yet may be anything
        hard = best(every, -np.nan_to_num(last, nan=0.5), max(int(share * len(every)), 1), random)
        return random.permutation(hard)

    def learn(self, places, successes, advantages):
        known, found = rates(places, successes)
        self.arrays["rates"][known] = found
        self.arrays["solved"][known] |= found == 1

    def metrics(self):
        solved = self.arrays["solved"]
        lost = solved & (self.arrays["rates"] < 1)
        return super().metrics() | ({"forgotten": float(lost.sum() / solved.sum())} if solved.any() else {})
