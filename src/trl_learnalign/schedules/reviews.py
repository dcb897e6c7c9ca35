"""Passes over a selection that leave out what was solved, and reviews of all of it (LFR, arXiv 2409.06131)."""

import numpy as np
import torch

from ..curriculum.rewards import is_success
from ..data.order import RandomOrder


class Reviews:
    """
    Goes through a selection pass by pass. Each `every`-th pass, from the first on, has all of its prompts; the others
    leave out those that all rollouts of their last visit solved. Arrays of shape `(pool_size,)` are by dataset row.

    Args:
        pool_size (`int`): rows of the dataset.
        every (`int`): passes from one review to the next.

    Attributes:
        at (`np.ndarray` of shape `(2,)`): selection of the last draw, and the place in its endless order after it.
        solved (`np.ndarray` of shape `(pool_size,)`, bool): all rollouts of the last visit succeeded.
        ever (`np.ndarray` of shape `(pool_size,)`, bool): those of some visit did.
        passes (`np.ndarray` of shape `(n, 5)`): of each pass the selection, its number, the prompts drawn, and how
            many of the selection were solved, and forgotten (solved before, and not at the last visit), at its end.
    """

    def __init__(self, pool_size: int, every: int):
        self.every = every
        self.at, self.passes = np.zeros(2, np.int64), np.zeros((0, 5), np.int64)
        self.solved, self.ever = np.zeros(pool_size, bool), np.zeros(pool_size, bool)

    def draw(self, stage: int, order: RandomOrder, indices: np.ndarray) -> int:
        """Return the next row of selection `stage`, whose rows are `indices[order[0]]`, `indices[order[1]]`, ..."""
        if stage != self.at[0]:
            self.at[:] = stage, 0
        while True:
            position = int(self.at[1])
            number, row = position // len(indices), int(indices[order[position]])
            if position % len(indices) == 0:
                self.passes = np.concatenate([self.passes, [[stage, number, 0, 0, 0]]])
                self._count(indices)
            self.at[1] += 1
            if number % self.every == 0 or not self.solved[row]:
                self.passes[-1, 2] += 1
                return row

    def observe(self, rows: list[int], rewards: torch.Tensor, threshold: float, indices: np.ndarray) -> None:
        """
        Learn which prompts were solved.

        Args:
            rows (`list[int]`): of n groups.
            rewards (`torch.Tensor` of shape `(n, G)`): that decide success; NaN where there was none. A group without
                any changes nothing.
            threshold (`float`): of a success.
            indices (`np.ndarray`): rows of the selection.
        """
        known = ~rewards.isnan().numpy()
        solved = (is_success(rewards.numpy(), threshold) | ~known).all(1)
        for row, one in zip(np.array(rows)[known.any(1)], solved[known.any(1)], strict=True):
            self.solved[row] = one
            self.ever[row] |= one
        self._count(indices)

    def _count(self, indices):
        if len(self.passes):
            solved = self.solved[indices]
            self.passes[-1, 3:] = solved.sum(), (self.ever[indices] & ~solved).sum()

    def metrics(self, indices: np.ndarray) -> dict[str, float]:
        """Return the share of a selection that is solved, and the share that is forgotten of what ever was solved."""
        solved, ever = self.solved[indices], self.ever[indices]
        forgotten = {"forgotten": (ever & ~solved).sum() / ever.sum()} if ever.any() else {}
        return {"solved": solved.mean()} | forgotten

    def state_dict(self) -> dict:
        """Return the arrays, flags as the rows that have them."""
        flags = {"solved": np.flatnonzero(self.solved), "ever": np.flatnonzero(self.ever)}
        return flags | {"at": self.at, "passes": self.passes}

    def load_state_dict(self, state: dict) -> None:
        """Restore what [`~Reviews.state_dict`] returned. Raises a `ValueError` if it is not of such a run."""
        try:
            self.at, self.passes = state["at"].copy(), state["passes"].copy()
            fits = self.at.shape == (2,) and self.passes.ndim == 2 and self.passes.shape[1] == 5
            for name, flags in (("solved", self.solved), ("ever", self.ever)):
                flags[:] = False
                flags[state[name]] = True
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"The reviews in the checkpoint are damaged: {error!r}. Resume from another.") from error
        if not fits:
            raise ValueError("The reviews in the checkpoint are damaged: other shapes. Resume from another.")
