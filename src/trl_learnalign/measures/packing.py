"""Microbatches of the rows that make the prompts' gradients, by length."""

import collections
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..ground.hashing import stable_hash


# Prompts whose rows are sorted by length together
WINDOW = 64

Place = tuple[int, int]  # a prompt, and which of its rows


@dataclass
class Window:
    """
    Prompts whose rows are sorted by length together.

    Attributes:
        indices (`list[int]`): the prompts.
        lengths (`Mapping[int, np.ndarray]`): the lengths of each prompt's rows, of all windows.
        max_tokens (`int`): of a microbatch.
    """

    indices: list[int]
    lengths: Mapping[int, np.ndarray]
    max_tokens: int

    @property
    def name(self) -> int:
        """Stands for the prompts, their rows' lengths and the token budget."""
        return stable_hash(self.max_tokens, [(index, self.lengths[index].tolist()) for index in self.indices])

    def part(self, number: int) -> int:
        """The name of a microbatch."""
        return stable_hash(self.name, number)

    def parts(self) -> list[int]:
        """The names of all microbatches."""
        return [self.part(number) for number in range(len(self.microbatches()))]

    def microbatches(self) -> list[tuple[dict[int, int], list[Place]]]:
        """
        How many rows each prompt has in a microbatch, and these rows, those of a prompt together. Made when they are
        asked for.
        """
        queue = [(index, row) for index in self.indices for row in range(len(self.lengths[index]))]
        queue.sort(key=lambda place: self.lengths[place[0]][place[1]])
        microbatches = []
        while queue:
            # From the long end, where the last row tells the padding
            longest = int(self.lengths[queue[-1][0]][queue[-1][1]])
            count = min(len(queue), max(1, self.max_tokens // longest))
            numbers = collections.Counter(index for index, _ in queue[-count:])
            # Prompts with equally many rows are neighbours: their gradients are computed at once
            batch = sorted(queue[-count:], key=lambda place: (numbers[place[0]], place[0]))
            del queue[-count:]
            microbatches.append(({index: numbers[index] for index, _ in batch}, batch))
        return microbatches


def pack(lengths: Mapping[int, np.ndarray], max_tokens: int, size: int = WINDOW) -> list[Window]:
    """
    Microbatches of rows of nearly equal length, each of at most `max_tokens` tokens with its padding (or of one row).

    Prompts are taken window by window, by length, and the rows of a window are sorted by length: a group is spread
    over microbatches of its window only, so that few groups are under way at a time.

    Args:
        lengths (`Mapping[int, np.ndarray]`): the lengths of the rows of each prompt; prompts without rows are left
            out.
        max_tokens (`int`): number of rows times the length of the longest.
        size (`int`, *optional*): prompts of a window.
    """
    prompts = [index for index in lengths if len(lengths[index])]
    order = sorted(prompts, key=lambda index: (int(lengths[index].sum()), index))
    return [Window(order[start : start + size], lengths, max_tokens) for start in range(0, len(order), size)]
