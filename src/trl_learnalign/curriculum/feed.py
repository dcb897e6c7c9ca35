"""A curriculum in the process that generates, and a replica in the one that trains, which checkpoints hold."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any, Protocol

import numpy as np

from .events import Draw, Group


AHEAD = 8  # draws that are chosen at once, and handed out one by one

CHOSE, FINISHED, TICKED, REMEMBERED = "chose", "finished", "ticked", "remembered"
# What a feed tells of, in order: the kind, and what is needed to do the same
Event = tuple[str, Any]


class Drawn(Protocol):
    """A curriculum, as far as a feed needs it."""

    def choose(self, n: int) -> list[Draw]: ...
    def observe(self, groups: Sequence[Group]) -> None: ...
    def tick(self, steps: int) -> None: ...
    def asks_for(self, rows: Sequence[int]) -> list[int]: ...
    def remember(self, completions: dict[int, str]) -> None: ...


class Feed:
    """
    Hands out draws one by one, learns from finished groups, and tells of both.

    Args:
        curriculum ([`OnlineCurriculum`]): as it is now.
        pending (`Iterable[Draw]`): draws of a run that is resumed, whose groups are to be generated again, first.
        send (`Callable`): is called with each event; [`Replica.apply`] does the same elsewhere.
        ahead (`int`, *optional*, defaults to 8): draws that are chosen at once.
    """

    def __init__(self, curriculum: Drawn, pending: Iterable[Draw], send: Callable[[Event], None], ahead: int = AHEAD):
        self.curriculum, self.ahead, self._send = curriculum, ahead, send
        self._ready = deque(pending)
        self._steps = 0

    def next(self) -> Draw:
        """Return the next prompt to generate for."""
        if not self._ready:
            draws = self.curriculum.choose(self.ahead)
            self._send((CHOSE, [(draw.number, draw.row) for draw in draws]))
            self._ready.extend(draws)
        return self._ready.popleft()

    def finished(self, group: Group, samples: int, completion: str | None = None) -> None:
        """
        Learn from a group.

        Args:
            group ([`Group`]): with its rewards.
            samples (`int`): rows that training will get of it; 0 for a group that is dropped.
            completion (`str`, *optional*): of one of its rollouts, which is kept if the curriculum asks for it.
        """
        self.curriculum.observe([group])
        self._send((FINISHED, (group, samples)))
        if completion is not None and self.curriculum.asks_for([group.row]):
            self.curriculum.remember({group.row: completion})
            self._send((REMEMBERED, {group.row: completion}))

    def tick(self, steps: int) -> None:
        """Note that so many optimizer steps were taken since the feed was made."""
        if steps > self._steps:
            self.curriculum.tick(steps - self._steps)
            self._send((TICKED, steps - self._steps))
            self._steps = steps


class Ledger:
    """
    Keeps what became of each draw: a draw is done when training has got all rows of its group, or they were dropped.
    Several threads may tell of it.

    Attributes:
        pending (`dict[int, int]`): rows of the draws that are not done, by number, in order. These are generated again
            by a resumed run.
        done (`int`): draws that are done.
    """

    def __init__(self) -> None:
        self.pending: dict[int, int] = {}
        self.done = 0
        self._left: dict[int, int] = {}  # of finished groups: rows that are still to come
        self._early: dict[int, int] = {}  # of groups that are not known to be finished: rows that came
        self._turn = Lock()

    def chose(self, draws: Iterable[tuple[int, int]]) -> None:
        """Note draws, as numbers and rows."""
        with self._turn:
            self.pending.update(draws)

    def finished(self, number: int, samples: int) -> None:
        """Note that a group has made so many rows."""
        with self._turn:
            if number in self.pending:
                self._left[number] = samples - self._early.pop(number, 0)
                self._settle(number)

    def came(self, number: int, samples: int = 1) -> None:
        """Note that so many rows of a group were trained on, or dropped."""
        with self._turn:
            if number in self._left:
                self._left[number] -= samples
                self._settle(number)
            else:
                self._early[number] = self._early.get(number, 0) + samples

    def _settle(self, number):
        if self._left[number] <= 0:
            del self._left[number], self.pending[number]
            self.done += 1

    @property
    def is_behind(self) -> bool:
        """True if rows came of groups that are not known to be finished: events of them are still under way."""
        return bool(self._early)

    def draws(self) -> list[Draw]:
        """Return the draws that are not done."""
        return [Draw(number, row) for number, row in self.pending.items()]

    def state_dict(self) -> dict:
        """Return what a resumed run needs: what is half done begins again."""
        with self._turn:
            numbers, rows, done = [*self.pending], [*self.pending.values()], self.done
        return {"numbers": np.array(numbers, np.int64), "rows": np.array(rows, np.int64), "done": done}

    def load_state_dict(self, state: dict) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            `ValueError`: it is damaged.
        """
        numbers, rows = state["numbers"], state["rows"]
        if numbers.shape != rows.shape or numbers.ndim != 1 or (np.diff(numbers) <= 0).any():
            raise ValueError(f"draws that are not done have the shapes {numbers.shape} and {rows.shape}")
        self._left, self._early = {}, {}
        self.pending, self.done = dict(zip(numbers.tolist(), rows.tolist(), strict=True)), int(state["done"])


class Replica:
    """
    Does in one process what a [`Feed`] did in another.

    Args:
        curriculum: in the same state as the feed's was when the feed was made; or what wraps one.
        ledger ([`Ledger`]): is told of draws and finished groups.
    """

    def __init__(self, curriculum: Drawn, ledger: Ledger):
        self.curriculum, self.ledger = curriculum, ledger

    def apply(self, event: Event) -> None:
        """
        Do the same.

        Raises:
            `RuntimeError`: other prompts were chosen than those that the event tells of.
        """
        kind, content = event
        if kind == CHOSE:
            chosen = [(draw.number, draw.row) for draw in self.curriculum.choose(len(content))]
            if chosen != content:
                raise RuntimeError(
                    f"The rollout worker chose the prompts {content[:4]} (draws and rows), where the trainer chooses "
                    f"{chosen[:4]}. They may run other versions of this package or of NumPy, or round differently. "
                    "Resume from the last checkpoint on equal machines."
                )
            self.ledger.chose(content)
        elif kind == FINISHED:
            group, samples = content
            self.curriculum.observe([group])
            self.ledger.finished(group.number, samples)
        elif kind == TICKED:
            self.curriculum.tick(content)
        else:
            self.curriculum.remember(content)
