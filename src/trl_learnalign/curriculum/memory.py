"""What an online schedule remembers of each prompt: its own rewards, and when it may come again."""

import numpy as np

from .predictor import HALF_LIFE, all_fail


COOLDOWN = 0.1, 2, 25  # chunks until a prompt may come again: this share of those of the pool, at least, at most
LONGEST_REST = 6  # doublings of the cooldown of a mastered, never-solved or never-scored prompt
DOUBLING = (
    8  # rollouts in a row, all right or all wrong, after which a rest is doubled; a visit counts for one at most
)
SUSPICION = 0.1  # probability of failing so often, below which a prompt is a suspect
MOST_SUSPECTS = 1000
RETIRED_AFTER = 2  # doublings after which a prompt is called retired or parked


class PromptMemory:
    """
    27 bytes a prompt. All arrays have the shape `(N,)`, by row of the dataset.

    Args:
        size (`int`): N.
        chunks_of_pool (`float`): chunks that the pool makes.

    Attributes:
        successes, failures (`np.ndarray`): of the prompt's own rollouts, faded to the time of the last visit, float32.
        last (`np.ndarray`): chunk of the last visit, -1 for none, int32.
        visits (`np.ndarray`): their number, int32.
        ready (`np.ndarray`): the chunk from which on the prompt may come again, int32.
        solved, failed (`np.ndarray`): rollouts of the visits in a row, up to the last, in which all succeeded, or none
            did, uint8. A visit counts for `DOUBLING` at most. Graded rewards that are all equal count as a success
            from half of their range on.
        unscored (`np.ndarray`): visits in a row, up to the last, without an outcome, int8; -1 after one with an
            outcome.
        surprise (`np.ndarray`): -log of the probability, as was predicted, that all rollouts so far would fail; minus
            infinity of a prompt that was solved once, float32.
    """

    NAMES = "successes", "failures", "last", "visits", "ready", "solved", "failed", "unscored", "surprise"

    def __init__(self, size: int, chunks_of_pool: float):
        self.successes = np.zeros(size, np.float32)
        self.failures = np.zeros(size, np.float32)
        self.last = np.full(size, -1, np.int32)
        self.visits = np.zeros(size, np.int32)
        self.ready = np.zeros(size, np.int32)
        self.solved = np.zeros(size, np.uint8)
        self.failed = np.zeros(size, np.uint8)
        self.unscored = np.zeros(size, np.int8)
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
        self,
        rows: np.ndarray,
        chunk: int,
        successes: np.ndarray,
        trials: np.ndarray,
        equal: np.ndarray,
        weight: float = 1.0,
    ) -> None:
        """
        These rows had `successes` of `trials` in a chunk; `equal` where all rewards were equal. As evidence a trial
        counts `weight` times. A row may be there twice, where a pool is smaller than a chunk. One without a trial was
        visited, too, and rests.
        """
        for places in _distinct(rows):
            self._update(rows[places], chunk, successes[places], trials[places], equal[places], weight)

    def _update(self, rows, chunk, successes, trials, equal, weight):
        before = self.evidence(rows, chunk)
        self.successes[rows] = before[0] + weight * successes
        self.failures[rows] = before[1] + weight * (trials - successes)
        self.last[rows] = chunk
        self.visits[rows] += 1
        scored, good = trials > 0, 2 * successes >= trials
        more = np.minimum(trials, DOUBLING).astype(int)
        for streak, now in ((self.solved, good), (self.failed, ~good)):
            longer = np.where(equal & now, np.minimum(streak[rows] + more, 255), 0)
            streak[rows] = np.where(scored, longer, streak[rows])  # nothing is known of one that was not scored
        self.unscored[rows] = np.where(scored, -1, np.minimum(np.maximum(self.unscored[rows], 0), 126) + 1)
        doublings = np.maximum(self.doublings(rows), np.maximum(self.unscored[rows], 0))
        self.ready[rows] = chunk + self.cooldown * 2 ** np.minimum(doublings, LONGEST_REST).astype(np.int32)

    def doublings(self, rows: np.ndarray) -> np.ndarray:
        """How often the rest of these rows is doubled as all rollouts in a row succeeded, or none did."""
        return np.maximum(self.solved[rows], self.failed[rows]) // DOUBLING

    def is_retired(self, rows: "np.ndarray | slice" = slice(None)) -> np.ndarray:
        """Whether all rollouts of the last visits of these rows succeeded, bool."""
        return self.solved[rows] >= RETIRED_AFTER * DOUBLING

    def is_parked(self, rows: "np.ndarray | slice" = slice(None)) -> np.ndarray:
        """Whether no rollout of the last visits of these rows succeeded, bool."""
        return self.failed[rows] >= RETIRED_AFTER * DOUBLING

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
        """
        How many prompts were visited, were solved by all, or by no, rollouts of their last visits, and had no outcome
        at their last visit.
        """
        return {
            "visited": np.count_nonzero(self.visits),
            "retired": np.count_nonzero(self.is_retired()),
            "parked": np.count_nonzero(self.is_parked()),
            "unscored": np.count_nonzero(self.unscored > 0),
        }

    def solved_by(self) -> tuple[int, int]:
        """How many prompts were solved by all, and by none, of all their rollouts so far."""
        tried = self.successes + self.failures > 0
        return np.count_nonzero(tried & (self.failures <= 0)), np.count_nonzero(tried & (self.successes <= 0))

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
