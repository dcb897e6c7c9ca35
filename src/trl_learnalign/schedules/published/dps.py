"""DPS (arXiv 2603.10887): each prompt is never, sometimes or always solved, and goes from one to the other."""

import numpy as np

from .base import Published, best, candidates, counts


SOMETIMES = 1  # of three states


class DPS(Published):
    """
    Chooses, of 32 times as many random candidates, those most probably solved by some rollouts and not by others. The
    state of a prompt (never, sometimes, always solved) is a hidden Markov chain with transition chances of its own:
    the mean of Dirichlet distributions, of whose counts `kept` (lambda) is kept at every update, as the authors' code
    has it on MATH. An update is a batch of prompts that was trained on; the states of all other prompts go on.
    """

    candidates, prior, kept = 32, 1.0, 0.7

    def begin(self, size):
        self.arrays = {
            "counts": np.full((size, 3, 3), self.prior, np.float32),  # to, from
            "state": np.full((size, 3), 1 / 3, np.float32),  # chances now
            "before": np.full((size, 3), 1 / 3, np.float32),  # at the update before
        }

    def pick(self, n, random):
        places = candidates(len(self.pool), self.candidates * n, random)
        return best(places, self.arrays["state"][places, SOMETIMES], n, random)

    def learn(self, places, successes, advantages):
        won, lost = counts(successes)
        known = (won + lost) > 0
        seen = np.where(won == 0, 0, np.where(lost == 0, 2, SOMETIMES))[known]
        places, last = np.unique(places[known][::-1], return_index=True)  # of two groups the later one
        state, transitions, before = (self.arrays[name] for name in ("state", "counts", "before"))
        now = state.copy()  # of those that were not observed, as predicted
        now[places] = np.eye(3, dtype=np.float32)[seen[::-1][last]]
        moved = now[places][:, :, None] * before[places][:, None, :] * _chances(transitions[places])
        transitions *= self.kept
        transitions += (1 - self.kept) * self.prior
        transitions[places] += moved / np.maximum(moved.sum((1, 2), keepdims=True), 1e-12)
        self.arrays["before"] = now
        following = (_chances(transitions) @ now[:, :, None])[:, :, 0]
        self.arrays["state"] = following / following.sum(1, keepdims=True)


def _chances(counts):
    return counts / counts.sum(1, keepdims=True)
