"""Batches of rows of nearly equal length, for gradients and for forwards over prompts."""

import collections
import math
from collections.abc import Mapping, Sequence
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
        """Return a number that stands for the prompts, their rows' lengths and the token budget."""
        return stable_hash(self.max_tokens, [(index, self.lengths[index].tolist()) for index in self.indices])

    def part(self, number: int) -> int:
        """Return the name of a microbatch."""
        return stable_hash(self.name, number)

    def parts(self) -> list[int]:
        """Return the names of all microbatches."""
        return [self.part(number) for number in range(len(self.microbatches()))]

    def microbatches(self) -> list[tuple[dict[int, int], list[Place]]]:
        """
        Return how many rows each prompt has in a microbatch, and these rows, those of a prompt together. Made when
        they are asked for.
        """
        # The last of equally long rows comes first
        queue = [(index, row) for index in self.indices for row in range(len(self.lengths[index]))][::-1]
        microbatches = []
        for places in fill([int(self.lengths[index][row]) for index, row in queue], self.max_tokens):
            chosen = [queue[place] for place in reversed(places)]
            numbers = collections.Counter(index for index, _ in chosen)
            # Prompts with equally many rows are neighbours: their gradients are computed at once
            batch = sorted(chosen, key=lambda place: (numbers[place[0]], place[0]))
            microbatches.append(({index: numbers[index] for index, _ in batch}, batch))
        return microbatches


def fill(lengths: Sequence[int], max_tokens: int, padding: float = math.inf) -> list[list[int]]:
    """
    Return the places of rows in batches of at most `max_tokens` tokens with their padding, longest first; a longer
    row has a batch for itself.

    Args:
        lengths (`Sequence[int]`): tokens of each row.
        max_tokens (`int`): number of rows of a batch times the length of the longest.
        padding (`float`, *optional*): most tokens of a batch with its padding, over those without.
    """
    batches: list[list[int]] = []
    longest = held = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = max(1, lengths[place])
        padded = longest * (len(batches[-1]) + 1) if batches else 0
        if not batches or padded > max_tokens or padded > padding * (held + length):
            batches.append([])
            longest, held = length, 0
        batches[-1].append(place)
        held += length
    return batches


def pack(lengths: Mapping[int, np.ndarray], max_tokens: int, size: int = WINDOW) -> list[Window]:
    """
    Return microbatches of rows of nearly equal length, each of at most `max_tokens` tokens with its padding (or of one
    row).

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
