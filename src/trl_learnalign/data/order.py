"""The random order in which TRL trains on a dataset."""

import numpy as np
import torch


class RandomOrder:
    """
    Positions of a pool or of a selection in random order, pass by pass, as TRL's `RepeatSampler` draws it from the
    same seed.

    Args:
        size (`int`): number of rows.
        seed (`int`): of the permutations.
        shuffle (`bool`): whether to shuffle at all.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._generator = torch.Generator().manual_seed(seed)
        self._orders: list[np.ndarray] = []

    def __reduce__(self):
        return RandomOrder, (self.size, self.seed, self.shuffle)  # the permutations are drawn again

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.size)
        if not self.shuffle:
            return place
        while len(self._orders) <= number:
            self._orders.append(torch.randperm(self.size, generator=self._generator).numpy().astype(np.int32))
        return int(self._orders[number][place])
