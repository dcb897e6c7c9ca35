"""Suspects among the prompts: those whose answer may be wrong, and those whose rewards may be noise."""

from collections.abc import Sequence

import numpy as np

from .judge import Judge
from .kinds import Kinds
from .memory import PromptMemory
from .progress import Progress
from .settings import OnlineSettings


class FindsSuspects:
    """
    The part of a curriculum that names suspects, and keeps a completion of each.

    Attributes:
        completions (`dict[int, str]`): by row.
    """

    settings: OnlineSettings
    memory: PromptMemory
    judge: Judge
    kinds: Kinds
    progress: Progress | None
    completions: dict[int, str]

    def suspects(self) -> tuple[np.ndarray, np.ndarray]:
        """Return suspects as [`PromptMemory.suspects`]; none before the prediction was tried."""
        rows, chances = self.memory.suspects()
        return (rows, chances) if self.judge.tried else (rows[:0], chances[:0])

    def num_suspects(self) -> int:
        """Count the suspects; none before the prediction was tried."""
        return self.memory.num_suspects() if self.judge.tried else 0

    def may_stay(self) -> np.ndarray:
        """
        Tell of which kinds success may not rise, of shape `(K,)`, bool: not of those whose latest groups, chosen ones
        too, succeeded more often than predicted, where that is watched. Uniform draws alone are few.
        """
        return np.ones(len(self.kinds), bool) if self.progress is None else self.progress.is_idle()

    def is_noise(self, rows: np.ndarray) -> np.ndarray:
        """
        Tell whether the rewards of these rows may be noise, bool: they were visited often and are near one half, and
        the success of their kind does not rise, nor has it a clear alignment. Of graded rewards none.
        """
        if self.settings.graded:
            return np.zeros(len(rows), bool)
        kinds = self.kinds.labels[rows]
        return self.memory.is_even(rows) & (kinds >= 0) & (self.kinds.is_noise() & self.may_stay())[kinds]

    def noise(self) -> np.ndarray:
        """Return the rows of the pool whose rewards may be noise, the most visited first; at most `most_suspects`."""
        rows = np.flatnonzero(self.memory.visits >= self.settings.noise_visits)
        rows = rows[self.is_noise(rows)]
        return rows[np.lexsort((rows, -self.memory.visits[rows]))][: self.settings.most_suspects]

    def asks_for(self, rows: Sequence[int]) -> list[int]:
        """Return the suspects among these rows whose completion [`~FindsSuspects.remember`] should be given."""
        kept, most = len(self.completions), self.settings.most_suspects
        if kept >= 2 * most:
            return []
        places = np.array(rows, dtype=np.int64)
        # Noise leaves room for wrong answers
        suspicious = self._is_suspect(places) if kept < most else self.memory.is_suspect(places)
        return [row for row, so in zip(rows, suspicious, strict=True) if so and row not in self.completions]

    def remember(self, completions: dict[int, str]) -> None:
        """Keep completions of suspects, by row. Those of prompts that are no suspects any more make room."""
        known = self.completions | completions
        suspects = self._is_suspect(np.array([*known], dtype=np.int64))
        self.completions = {row: text for (row, text), so in zip(known.items(), suspects, strict=True) if so}

    def _is_suspect(self, rows):
        return self.memory.is_suspect(rows) | self.is_noise(rows)
