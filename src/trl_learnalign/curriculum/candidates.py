"""The rows that are ranked at a time, where a pool is too large to rank all of it."""

import numpy as np

from .memory import PromptMemory


class Candidates:
    """
    Draws the rows that are ranked for a choice. Of a pool up to `most` rows that is all of it, always. Of a larger one
    up to half of them are those visited before that have rested, a random part where more have, so that what is known
    of a prompt itself counts in a pool of any size; the others are random.

    Args:
        rows (`np.ndarray` of shape `(m,)`): of the dataset, which may be chosen.
        size (`int`): N, rows of the dataset.
        most (`int`): rows that are ranked at a time.
    """

    def __init__(self, rows: np.ndarray, size: int, most: int):
        self.rows, self.most = rows, most
        self._may = None if len(rows) == size else np.isin(np.arange(size), rows)

    def draw(self, memory: PromptMemory, draw: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
        """
        Draw the rows for a choice.

        Args:
            memory ([`PromptMemory`]): which rows were visited, and rest.
            draw (`int`): a row has rested that may come again before this draw.
            generator (`np.random.Generator`): of the choice.

        Returns:
            different rows, of shape `(n,)`, n at most `most`; and how many of them, the first, are random.
        """
        rows, most = self.rows, self.most
        if len(rows) <= most:
            return rows, len(rows)
        known = np.flatnonzero((memory.visits > 0) & (memory.ready < draw))
        if self._may is not None:
            known = known[self._may[known]]
        if len(known) > most // 2:
            known = known[generator.choice(len(known), most // 2, replace=False, shuffle=False)]
        random = rows[generator.choice(len(rows), most - len(known), replace=False, shuffle=False)]
        return np.concatenate([random, known[~np.isin(known, random)]]), len(random)
