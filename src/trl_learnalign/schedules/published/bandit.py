"""Bandits over groups of prompts, with the mean absolute advantage as their return: SEC and DUMP."""

import numpy as np

from ..base import Run
from ..prompt_features import kinds_by_column
from .base import Published


class SEC(Published):
    """
    Draws a group of `group_column` for each prompt, in proportion to exp(Q / `temperature`), and a random prompt of
    it. Q moves by the part `rate` to the mean absolute advantage of a batch's rollouts of that group (arXiv
    2505.14970, TD(0) with Boltzmann draws; `temperature` is 1 in their runs on Countdown, .4 on MATH). A group that a
    batch has no prompt of keeps its Q, by the paper; in their code it counts as 0.
    """

    rate, temperature = 0.5, 1.0

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.members: list[np.ndarray] = []  # places by group

    def fit(self, host):
        labels, _ = kinds_by_column(host.dataset, self.run.config)
        assert labels is not None  # the configuration has a group_column
        layout = super().fit(host)
        self.group_of = np.unique(labels[self.pool], return_inverse=True)[1]
        self.members = [np.flatnonzero(self.group_of == group) for group in range(self.group_of.max() + 1)]
        self.begin(len(self.pool))
        return layout

    def begin(self, size):
        self.arrays = {"value": np.zeros(len(self.members))}

    def values(self) -> np.ndarray:
        """Return the number of each group that its chance grows with."""
        return self.arrays["value"]

    def pick(self, n, random):
        values = self.values() / self.temperature
        chances = np.exp(values - values.max())
        drawn = random.choice(len(chances), n, p=chances / chances.sum())
        return [int(random.choice(self.members[group])) for group in drawn]

    def learn(self, places, successes, advantages):
        groups, value = self.group_of[places], self.arrays["value"]
        for group in np.unique(groups):
            value[group] += self.rate * (np.abs(advantages[groups == group]).mean() - value[group])


class DUMP(SEC):
    """
    Draws a group by its upper confidence bound: the mean absolute advantage of its last `window` rollouts plus
    sqrt(2 log(N + 1) / (n + 1)), N rollouts in all and n of the group (arXiv 2504.09710). (Their code also counts
    each validation as a rollout of every group, with the mean reward in the place of an advantage.)
    """

    window, temperature = 300, 0.1

    def begin(self, size):
        groups = len(self.members)
        self.arrays = {
            "last": np.full((groups, self.window), np.nan, np.float32),  # the newest last
            "number": np.zeros(groups, np.int64),
        }

    def values(self):
        last, number = self.arrays["last"], self.arrays["number"]
        seen = np.maximum((~np.isnan(last)).sum(1), 1)
        return np.nansum(last, axis=1) / seen + np.sqrt(2 * np.log(number.sum() + 1) / (number + 1))

    def learn(self, places, successes, advantages):
        for place, group in zip(places, np.abs(advantages), strict=True):
            last = self.arrays["last"][self.group_of[place]]
            last[:] = np.concatenate([last, group])[-self.window :]
            self.arrays["number"][self.group_of[place]] += len(group)
