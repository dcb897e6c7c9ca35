"""What an online schedule remembers of each prompt: its own rewards, and when it may come again."""

import numpy as np

from .predictor import HALF_LIFE, all_fail


COOLDOWN = 0.1, 2, 25  # chunks until a prompt may come again: this share of those of the pool, at least, at most
LONGEST_REST = 6  # doublings of the cooldown of a mastered or never-solved prompt
SUSPICION = 0.1  # probability of failing so often, below which a prompt is a suspect
MOST_SUSPECTS = 1000
RETIRED_AFTER = 2  # visits in a row with all rollouts right, or none


class PromptMemory:
    """
    26 bytes a prompt. All arrays have the shape `(N,)`, by row of the dataset.

    Args:
        size (`int`): N.
        chunks_of_pool (`float`): chunks that the pool makes.

    Attributes:
        successes, failures (`np.ndarray`): of the prompt's own rollouts, faded to the time of the last visit, float32.
        last (`np.ndarray`): chunk of the last visit, -1 for none, int32.
        visits (`np.ndarray`): their number, int32.
        ready (`np.ndarray`): the chunk from which on the prompt may come again, int32.
        solved, failed (`np.ndarray`): visits in a row, up to the last, in which all rollouts succeeded, or none did,
            uint8. Graded rewards that are all equal count as a success from half of their range on.
        surprise (`np.ndarray`): -log of the probability, as was predicted, that all rollouts so far would fail; minus
            infinity of a prompt that was solved once, float32.
    """

    NAMES = "successes", "failures", "last", "visits", "ready", "solved", "failed", "surprise"

    def __init__(self, size: int, chunks_of_pool: float):
        self.successes = np.zeros(size, np.float32)
        self.failures = np.zeros(size, np.float32)
        self.last = np.full(size, -1, np.int32)
        self.visits = np.zeros(size, np.int32)
        self.ready = np.zeros(size, np.int32)
        self.solved = np.zeros(size, np.uint8)
        self.failed = np.zeros(size, np.uint8)
        self.surprise = np.zeros(size, np.float32)
        share, least, most = COOLDOWN
        self.cooldown = int(np.clip(share * chunks_of_pool, least, most))

    def evidence(self, rows: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Successes and failures of these rows, faded to a chunk, of shape `(n,)` each."""
        faded = 0.5 ** ((chunk - self.last[rows]) / HALF_LIFE)
        return faded * self.successes[rows], faded * self.failures[rows]

    def rest(self, rows: np.ndarray, chunk: int) -> None:
        """These rows are drawn for a chunk: none of them comes again for a while."""
        self.ready[rows] = chunk + self.cooldown

    def suspect(
        self, rows: np.ndarray, a: np.ndarray, b: np.ndarray, successes: np.ndarray, trials: np.ndarray
    ) -> None:
        """
        Adds to the surprise of rows that failed in all rollouts, though success ~ Beta(a, b) was predicted. A prompt
        that was solved once is no suspect any more.
        """
        failed = (trials > 0) & (successes <= 0)
        self.surprise[rows[failed]] -= np.log(all_fail(a, b, trials)[failed]).astype(np.float32)
        self.surprise[rows[successes > 0]] = -np.inf

    def update(
        self, rows: np.ndarray, chunk: int, successes: np.ndarray, trials: np.ndarray, equal: np.ndarray
    ) -> None:
        """
        These rows had `successes` of `trials` in a chunk; `equal` where all rewards were equal. A row may be
        there twice, where a pool is smaller than a chunk; one without a trial is left out.
        """
        known = trials > 0
        rows, successes, trials, equal = rows[known], successes[known], trials[known], equal[known]
        for places in _distinct(rows):
            self._update(rows[places], chunk, successes[places], trials[places], equal[places])

    def _update(self, rows, chunk, successes, trials, equal):
        before = self.evidence(rows, chunk)
        self.successes[rows] = before[0] + successes
        self.failures[rows] = before[1] + trials - successes
        self.last[rows] = chunk
        self.visits[rows] += 1
        good = 2 * successes >= trials
        for streak, now in ((self.solved, good), (self.failed, ~good)):
            streak[rows] = np.where(equal & now, np.minimum(streak[rows], 254) + 1, 0)
        doublings = np.minimum(np.maximum(self.solved[rows], self.failed[rows]), LONGEST_REST).astype(np.int32)
        self.ready[rows] = chunk + self.cooldown * 2**doublings

    def is_suspect(self, rows: np.ndarray) -> np.ndarray:
        """Whether so many failures of these rows were improbable."""
        return self.surprise[rows] > -np.log(SUSPICION)

    def num_suspects(self) -> int:
        """Number of all of them."""
        return int(np.count_nonzero(self.surprise > -np.log(SUSPICION)))

    def suspects(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows that were never solved though so many failures were predicted with a probability below `SUSPICION`, and
        that probability of each. At most `MOST_SUSPECTS`, most suspicious first.
        """
        rows = np.flatnonzero(self.surprise > -np.log(SUSPICION))
        rows = rows[np.lexsort((rows, -self.surprise[rows]))][:MOST_SUSPECTS]
        return rows, np.exp(-self.surprise[rows].astype(np.float64))

    def counts(self) -> dict[str, int]:
        """How many prompts were visited, and were solved by all, or by no, rollouts of their last visits."""
        return {
            "visited": np.count_nonzero(self.visits),
            "retired": np.count_nonzero(self.solved >= RETIRED_AFTER),
            "parked": np.count_nonzero(self.failed >= RETIRED_AFTER),
        }

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restores what `state_dict` returned. Raises a `ValueError` if it is of another number of prompts."""
        for name in self.NAMES:
            now = getattr(self, name)
            if state[name].shape != now.shape or state[name].dtype != now.dtype:
                raise ValueError(f"{name} is of {len(state[name])} prompts, the dataset has {len(now)}")
            setattr(self, name, state[name].copy())


def _distinct(rows):
    """Places of the rows, so that no row is twice in one part."""
    left = np.arange(len(rows))
    while len(left):
        first = np.unique(rows[left], return_index=True)[1]
        yield left[first]
        left = np.delete(left, first)
