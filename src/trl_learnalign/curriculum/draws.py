"""Chunks that were drawn, and uniform draws in a random order."""

from dataclasses import dataclass

import numpy as np

from .order import RandomOrder


@dataclass
class Drawn:
    """
    A chunk of n prompts, and what was expected of it when it was drawn.

    Attributes:
        rows (`np.ndarray` of shape `(n,)`): of the dataset, int32.
        uniform (`np.ndarray` of shape `(n,)`): which of them were drawn uniformly, bool.
        predicted (`np.ndarray` of shape `(n,)`): success, float64.
        learnt (`bool`): whether anything had been observed.
        choosing (`bool`): whether prompts were chosen; else all were drawn uniformly.
    """

    rows: np.ndarray
    uniform: np.ndarray
    predicted: np.ndarray
    learnt: bool
    choosing: bool


NAMES = "rows", "uniform", "predicted", "learnt", "choosing"


def stacked(drawn: dict[int, Drawn]) -> dict[str, np.ndarray]:
    """Chunks by their number, as arrays for a checkpoint."""
    chunks = sorted(drawn.items())
    columns = {name: [getattr(one, name) for _, one in chunks] for name in NAMES}
    arrays = {name: np.stack(values) if values else np.zeros((0, 0)) for name, values in columns.items()}
    return {"chunks": np.array([chunk for chunk, _ in chunks], dtype=np.int64)} | arrays


def unstacked(arrays: dict[str, np.ndarray]) -> dict[int, Drawn]:
    """What was [`stacked`]."""
    parts = zip(arrays["chunks"].tolist(), *(arrays[name] for name in NAMES), strict=True)
    return {chunk: Drawn(*part) for chunk, *part in parts}


def in_flight(drawn: dict[int, Drawn], observed: int) -> np.ndarray:
    """
    Rows that were drawn and not yet observed, as a dataloader reads ahead; one that was drawn twice is there twice.

    Args:
        drawn (`dict[int, Drawn]`): by chunk.
        observed (`int`): chunks before this one were observed.
    """
    ahead = [one.rows for chunk, one in drawn.items() if chunk >= observed]
    return np.concatenate(ahead) if ahead else np.zeros(0, np.int32)


class UniformDraws:
    """
    Rows of a pool in random order, pass by pass, as TRL draws them from the same seed.

    Args:
        pool (`np.ndarray` of shape `(n,)`): rows of the dataset.
        seed (`int`): of the order.
    """

    def __init__(self, pool: np.ndarray, seed: int):
        self.pool = pool
        self.position = 0
        self.postponed: list[int] = []
        self._order = RandomOrder(len(pool), seed)

    def take(self, number: int, flying: np.ndarray | None = None) -> list[int]:
        """
        The next rows. Those of `flying`, which are in flight, come later, so that each comes as often as the others;
        where too few of the pool are not in flight none waits.
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
        """The place in the order, and the rows that were passed over."""
        return {"position": self.position, "postponed": np.array(self.postponed, dtype=np.int64)}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.position, self.postponed = int(state["position"]), state["postponed"].tolist()
