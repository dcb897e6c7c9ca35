"""Draws in flight, whose groups are not finished yet, and what was expected of each when it was drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from .events import Group


@dataclass
class Flight:
    """
    Draws with what was expected of them. All arrays have the shape `(n,)`.

    Attributes:
        numbers (`np.ndarray`): of the draws, int64.
        rows (`np.ndarray`): of the dataset, int32.
        clock (`np.ndarray`): half-lives of the policy until the draw, float64.
        uniform (`np.ndarray`): draws that were uniform, of the whole pool, bool.
        aimed (`np.ndarray`): random draws of the target, bool.
        choosing (`np.ndarray`): draws that were made while prompts were chosen, bool.
        learnt (`np.ndarray`): draws before which anything had been observed, bool.
        prior (`np.ndarray`): success predicted from the features alone, float64.
        slow (`np.ndarray`): the same, by the slow fit of [`SuccessPredictor`] alone, float64.
        a, b (`np.ndarray`): the Beta distribution of success that was expected, float64.
        relative (`np.ndarray`): expected relative alignment of the gradient, float64; NaN where nothing was expected.
    """

    numbers: np.ndarray
    rows: np.ndarray
    clock: np.ndarray
    uniform: np.ndarray
    aimed: np.ndarray
    choosing: np.ndarray
    learnt: np.ndarray
    prior: np.ndarray
    slow: np.ndarray
    a: np.ndarray
    b: np.ndarray
    relative: np.ndarray

    @classmethod
    def empty(cls) -> "Flight":
        """Return no draws."""
        return cls(**{name: np.zeros(0, kind) for name, kind in _KINDS.items()})

    @property
    def predicted(self) -> np.ndarray:
        """Expected success, of shape `(n,)`."""
        return self.a / (self.a + self.b)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, places: np.ndarray) -> "Flight":
        return Flight(*(getattr(self, one.name)[places] for one in fields(self)))

    def __add__(self, other: "Flight") -> "Flight":
        return Flight(*(np.concatenate([getattr(self, one.name), getattr(other, one.name)]) for one in fields(self)))

    def not_given_up(self, drawn: int, most: int) -> "Flight":
        """Leave out draws after which groups of so many later draws came that their own never will."""
        later = np.arange(len(self))[::-1]  # draws in flight are in their order
        came_since = drawn - 1 - self.numbers - later
        return self[came_since < most] if (came_since >= most).any() else self

    def places(self, groups: Sequence[Group], drawn: int) -> dict[int, int]:
        """
        Return the place among these draws of each group that is to be learnt from, by number.

        Raises:
            `ValueError`: a group names a draw that is none of the first `drawn`, or another row than its draw.
        """
        places = {number: place for place, number in enumerate(self.numbers.tolist())}
        found = {}
        for group in groups:
            if not 0 <= group.number < drawn:
                raise ValueError(
                    f"Group {group.number} was observed, but only {drawn} draws were made, counted from 0. Pass the "
                    "`number` of the draw that asked for the group."
                )
            place = places.get(group.number)
            if place is None:
                continue
            if self.rows[place] != group.row:
                raise ValueError(
                    f"Group {group.number} has row {group.row}, but that draw asked for row {self.rows[place]}, so "
                    "its rewards would count for the wrong prompt. Keep the number and the row of a draw together."
                )
            found[group.number] = place
        return found

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Flight":
        """
        Make the draws that `state_dict` was called on.

        Raises:
            `ValueError`: the arrays have different lengths.
        """
        arrays: dict[str, np.ndarray] = {
            name: np.asarray(state[name]).astype(kind, copy=True) for name, kind in _KINDS.items()
        }
        if len({array.shape for array in arrays.values()}) != 1:
            raise ValueError(f"draws have the shapes {sorted({array.shape for array in arrays.values()})}")
        return cls(**arrays)


_KINDS = {
    "numbers": np.int64,
    "rows": np.int32,
    "clock": np.float64,
    "uniform": np.bool_,
    "aimed": np.bool_,
    "choosing": np.bool_,
    "learnt": np.bool_,
    "prior": np.float64,
    "slow": np.float64,
    "a": np.float64,
    "b": np.float64,
    "relative": np.float64,
}
