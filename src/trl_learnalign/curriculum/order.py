"""Uniform draws: the rows of a pool in random order, pass by pass."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Order(Protocol):
    """Positions of a pool in random order, pass by pass: `order[i]` is the position that the i-th draw takes."""

    def __getitem__(self, position: int) -> int: ...


class Permutations:
    """
    Random permutations of the positions 0 to `size - 1`, one after the other.

    Args:
        size (`int`): number of positions.
        seed (`int`): seed of the permutations.
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self._size)
        if number not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, number]))
            self._orders = {number: generator.permutation(self._size).astype(np.int32)}
        return int(self._orders[number][place])


class UniformDraws:
    """
    Rows of a pool in random order, pass by pass.

    Args:
        pool (`np.ndarray` of shape `(n,)`): rows of the dataset.
        order ([`Order`]): random positions of the pool.
    """

    def __init__(self, pool: np.ndarray, order: Order):
        self.pool = pool
        self.position = 0
        self.postponed: list[int] = []  # rows that were in flight when their turn came
        self._order = order

    def take(self, number: int, flying: np.ndarray | None = None) -> list[int]:
        """
        Return the next rows. Rows of `flying`, which are in flight, come later, so that each row comes as often as the
        others; where too few rows of the pool are not in flight none waits.
        """
        waiting = set() if flying is None else set(flying.tolist())
        waiting = waiting if len(self.pool) - len(waiting) >= number else set()
        rows = [row for row in self.postponed if row not in waiting][:number]
        self.postponed = [row for row in self.postponed if row not in rows]
        while len(rows) < number:
            row = int(self.pool[self._order[self.position]])
            self.position += 1
            if row not in waiting and (flying is None or row not in rows or len(self.pool) < number):
                rows.append(row)
            elif row not in self.postponed:
                self.postponed.append(row)
        return rows

    def state_dict(self) -> dict:
        """Return the place in the order, and the rows that were passed over."""
        return {"position": self.position, "postponed": np.array(self.postponed, dtype=np.int64)}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.position, self.postponed = int(state["position"]), state["postponed"].tolist()


def rounded(number: float, generator: np.random.Generator) -> int:
    """Round at random, so that the mean is `number`."""
    return math.floor(number + generator.random())


def rows_of(name: str, rows: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """Return row numbers as int32. Raises a `ValueError` where they are not those of `size` prompts."""
    found = np.asarray(rows)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= size:
        raise ValueError(
            f"`{name}` must be row numbers from 0 to {size - 1}, at least one, as there are features of {size} "
            "prompts. Leave it out for all rows."
        )
    return found.astype(np.int32)
