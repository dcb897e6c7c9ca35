"""Memory of each prompt: its own rewards, and when it may come again."""

import math

import numpy as np

from .batch import Batch
from .predictor import all_fail
from .settings import OnlineSettings


class PromptMemory:
    """
    Remembers each prompt's own rewards, visits and rest, in 35 bytes. All arrays have the shape `(N,)`, by row of the
    dataset.

    Args:
        size (`int`): N.
        pool_size (`int`): prompts that may be drawn.
        settings ([`OnlineSettings`]): rests, suspicion, half-life.

    Attributes:
        successes, failures (`np.ndarray`): of the prompt's own rollouts, faded to `faded_to`, float32.
        recent (`np.ndarray`): visits, faded alike, float32.
        faded_to (`np.ndarray`): half-lives of the policy until the latest visit, float32.
        last (`np.ndarray`): draw of the latest visit, -1 for none, int32.
        visits (`np.ndarray`): their number, int32.
        ready (`np.ndarray`): the draw from which on the prompt may come again, int32.
        solved, failed (`np.ndarray`): rollouts of the visits in a row, up to the last, in which all succeeded, or none
            did, uint8. A visit counts for `doubling` at most. Graded rewards that are all equal count as a success
            from half of their range on.
        unscored (`np.ndarray`): visits in a row, up to the last, without an outcome, int8; -1 after one with an
            outcome.
        surprise (`np.ndarray`): -log of the probability, as was predicted, that all rollouts so far would fail; minus
            infinity of a prompt that was solved once, float32.
    """

    NAMES = (
        *("successes", "failures", "recent", "faded_to", "last", "visits", "ready", "solved", "failed", "unscored"),
        "surprise",
    )

    def __init__(self, size: int, pool_size: int, settings: OnlineSettings):
        self.settings = settings
        self.successes = np.zeros(size, np.float32)
        self.failures = np.zeros(size, np.float32)
        self.recent = np.zeros(size, np.float32)
        self.faded_to = np.zeros(size, np.float32)
        self.last = np.full(size, -1, np.int32)
        self.visits = np.zeros(size, np.int32)
        self.ready = np.zeros(size, np.int32)
        self.solved = np.zeros(size, np.uint8)
        self.failed = np.zeros(size, np.uint8)
        self.unscored = np.zeros(size, np.int8)
        self.surprise = np.zeros(size, np.float32)
        least = min(settings.least_cooldown, pool_size // 4)  # of a tiny pool some must be free
        self.cooldown = int(np.clip(settings.cooldown_share * pool_size, least, settings.most_cooldown))

    def evidence(self, rows: np.ndarray, clock: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return successes, failures and visits of these rows, faded to `clock`, of shape `(n,)` each."""
        faded = 0.5 ** (clock - self.faded_to[rows])
        return faded * self.successes[rows], faded * self.failures[rows], faded * self.recent[rows]

    def rest(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Let rows that are drawn rest: none of them comes again for a while."""
        self.ready[rows] = numbers + self.cooldown

    def observe(self, batch: Batch, weight: float = 1.0) -> None:
        """
        Learn the outcomes of groups. A row may be there twice, where a pool is small. A group without an outcome was a
        visit, and its prompt rests.

        Args:
            batch ([`Batch`]): the groups.
            weight (`float`): evidence of a rollout.
        """
        for places in _distinct(batch.drawn.rows):
            self._observe(batch[places], weight)

    def _observe(self, batch, weight):
        settings, drawn, rows = self.settings, batch.drawn, batch.drawn.rows
        successes, trials, scored = batch.successes, batch.trials, batch.scored
        # A group that comes late fades itself, and what is younger stays
        clock = np.maximum(drawn.clock, self.faded_to[rows])
        before, faded = self.evidence(rows, clock), 0.5 ** (clock - drawn.clock)
        self.successes[rows] = before[0] + faded * weight * successes
        self.failures[rows] = before[1] + faded * weight * (trials - successes)
        self.recent[rows] = before[2] + faded * trials / batch.sizes
        self.faded_to[rows] = clock
        self.last[rows] = np.maximum(self.last[rows], drawn.numbers)
        self.visits[rows] += 1
        good, equal = 2 * successes >= trials, batch.equal
        more = np.minimum(trials, settings.doubling).astype(int)
        for streak, now in ((self.solved, good), (self.failed, ~good)):
            longer = np.where(equal & now, np.minimum(streak[rows] + more, 255), 0)
            streak[rows] = np.where(scored, longer, streak[rows])  # nothing is known of one that was not scored
        self.unscored[rows] = np.where(scored, -1, np.minimum(np.maximum(self.unscored[rows], 0), 126) + 1)
        doublings = np.minimum(np.maximum(self.doublings(rows), self.unscored[rows]), settings.longest_rest)
        rests = self.cooldown * 2 ** np.maximum(doublings, 0).astype(np.int64)
        # The prompt may have been drawn again since, and rests from then on
        self.ready[rows] = np.maximum(self.ready[rows], drawn.numbers + rests)
        if not settings.graded:
            self._suspect(rows, drawn.a, drawn.b, successes, trials)

    def _suspect(self, rows, a, b, successes, trials):
        """Add to the surprise of rows whose rollouts all failed, though success ~ Beta(a, b) was predicted."""
        failed = (trials > 0) & (successes <= 0)
        self.surprise[rows[failed]] -= np.log(all_fail(a[failed], b[failed], trials[failed])).astype(np.float32)
        self.surprise[rows[successes > 0]] = -np.inf  # solved once, so the answer is right

    def doublings(self, rows: np.ndarray) -> np.ndarray:
        """Return how often the rest of these rows is doubled as all rollouts in a row succeeded, or none did."""
        return np.maximum(self.solved[rows], self.failed[rows]) // self.settings.doubling

    def is_retired(self, rows: "np.ndarray | slice" = slice(None)) -> np.ndarray:
        """Tell whether all rollouts of the last visits of these rows succeeded, bool."""
        return self.solved[rows] >= self.settings.retired_after * self.settings.doubling

    def is_parked(self, rows: "np.ndarray | slice" = slice(None)) -> np.ndarray:
        """Tell whether no rollout of the last visits of these rows succeeded, bool."""
        return self.failed[rows] >= self.settings.retired_after * self.settings.doubling

    def is_suspect(self, rows: "np.ndarray | slice" = slice(None)) -> np.ndarray:
        """Tell whether so many failures of these rows were improbable, bool."""
        return self.surprise[rows] > -math.log(self.settings.suspicion)

    def is_even(self, rows: np.ndarray) -> np.ndarray:
        """Tell whether these rows were visited often, and about half of their rollouts of late succeeded, bool."""
        settings, successes, failures = self.settings, self.successes[rows], self.failures[rows]
        trials = successes + failures
        even = np.abs(successes - trials / 2) <= settings.noise_width * trials
        return even & (trials > 0) & (self.visits[rows] >= settings.noise_visits)

    def num_suspects(self) -> int:
        """Count the suspects."""
        return int(np.count_nonzero(self.is_suspect()))

    def suspects(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Return rows that were never solved though so many failures were predicted with a probability below `suspicion`,
        and that probability of each. At most `most_suspects`, most suspicious first.
        """
        rows = np.flatnonzero(self.is_suspect())
        rows = rows[np.lexsort((rows, -self.surprise[rows]))][: self.settings.most_suspects]
        return rows, np.exp(-self.surprise[rows].astype(np.float64))

    def counts(self) -> dict[str, int]:
        """
        Count prompts: visited, retired (all rollouts of the last visits succeeded), parked (none did), unscored (no
        outcome at the last visit).
        """
        return {
            "visited": int(np.count_nonzero(self.visits)),
            "retired": int(np.count_nonzero(self.is_retired())),
            "parked": int(np.count_nonzero(self.is_parked())),
            "unscored": int(np.count_nonzero(self.unscored > 0)),
        }

    def solved_by(self) -> tuple[int, int]:
        """Count the prompts that all, and that none, of their rollouts so far solved."""
        tried = self.successes + self.failures > 0
        by_all, by_none = tried & (self.failures <= 0), tried & (self.successes <= 0)
        return int(np.count_nonzero(by_all)), int(np.count_nonzero(by_none))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays."""
        return {name: getattr(self, name) for name in self.NAMES}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state_dict` returned. Raises a `ValueError` if it is of another number of prompts."""
        for name in self.NAMES:
            now = getattr(self, name)
            if state[name].shape != now.shape or state[name].dtype != now.dtype:
                raise ValueError(f"{name} is of {len(state[name])} prompts, the dataset has {len(now)}")
            setattr(self, name, state[name].copy())


def _distinct(rows):
    """Yield places of the rows, so that no row is twice in one part."""
    left = np.arange(len(rows))
    while len(left):
        first = np.unique(rows[left], return_index=True)[1]
        yield left[first]
        left = np.delete(left, first)
