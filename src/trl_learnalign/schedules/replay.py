"""A bounded buffer of groups that were trained on, with the log-probabilities of the policy that drew them."""

from dataclasses import dataclass

import numpy as np


Row = dict[str, np.ndarray]  # of a rollout, by the key of the trainer's batch: a value, or one for each token


@dataclass(frozen=True)
class Kept:
    """
    A group in the buffer.

    Attributes:
        number (`int`): of its draw.
        chunk (`int`): that it was generated for.
        rows (`list[dict]`): its rollouts.
    """

    number: int
    chunk: int
    rows: list[Row]

    @property
    def weight(self) -> float:
        """Mean absolute advantage of its rollouts."""
        return float(np.mean([np.abs(row["advantages"]).mean() for row in self.rows]))


class ReplayBuffer:
    """
    Keeps the last live groups, and draws among them without replacement in proportion to their mean absolute
    advantage. The oldest leave first, so that the size bounds memory and age (DOTS, arXiv 2506.05316; priority and age
    after arXiv 2606.04560, by groups instead of single rollouts).

    Args:
        size (`int`): most groups.
        seed (`int`): of the draws.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.groups: list[Kept] = []

    def draw(self, n: int, chunk: int) -> list[Kept]:
        """Draw up to `n` groups for a chunk; those of this chunk itself, which is generated again, are left out."""
        found = [group for group in self.groups if group.chunk < chunk]
        chances, n = np.array([group.weight for group in found]), min(n, len(found))
        if not n:
            return []
        random = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, chunk]))
        # The last digits may differ between processes, whose draws must not
        chances = np.maximum(np.round(chances, 6), 1e-6)
        return [found[place] for place in random.choice(len(found), n, replace=False, p=chances / chances.sum())]

    def add(self, groups: list[Kept]) -> None:
        """Add groups; one of a draw that is there already takes its place."""
        kept = {group.number: group for group in (*self.groups, *groups)}
        self.groups = list(kept.values())[-self.size :]

    def state_dict(self) -> dict:
        """Return the groups as arrays: of each key of a row all values in a row, and how many each rollout has."""
        rows = [row for group in self.groups for row in group.rows]
        parts = {name: [np.atleast_1d(row[name]) for row in rows] for name in (rows[0] if rows else ())}
        return {
            "draws": np.array([(group.number, group.chunk) for group in self.groups], np.int64).reshape(-1, 2),
            "values": {name: np.concatenate(values) for name, values in parts.items()},
            "lengths": {name: np.array([len(value) for value in values]) for name, values in parts.items()},
            "single": sorted(name for name in parts if not rows[0][name].ndim),
        }

    def load_state_dict(self, state: dict, group_size: int) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            `ValueError`: the state is damaged.
        """
        try:
            draws, single = state["draws"].tolist(), state["single"]
            rows: list[Row] = [{} for _ in range(len(draws) * group_size)]
            for name, values in state["values"].items():
                lengths = state["lengths"][name]
                if lengths.sum() != len(values):
                    raise ValueError(f"{len(values)} values instead of {lengths.sum()} in {name}")
                for row, value in zip(rows, np.split(values, np.cumsum(lengths)[:-1]), strict=True):
                    row[name] = value[0] if name in single else value
            starts = range(0, len(rows), group_size)
            parts = [rows[first : first + group_size] for first in starts]
            self.groups = [Kept(draw[0], draw[1], part) for draw, part in zip(draws, parts, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"The rollouts for replay in the checkpoint are damaged: {error!r}. Resume from an earlier checkpoint."
            ) from error
