"""The base of published methods: a pool, arrays of numbers as their state, and successes to learn from."""

import numpy as np
import torch

from ...curriculum.rewards import is_success
from ...data.order import RandomOrder
from ...host.rewards import check_success_reward
from ..base import Prepares, Run, Schedule, whole_pool
from ..prompt_features import check_online, eligible_rows


MOST_IN_FLIGHT = 4096  # draws whose groups may still come; older ones are given up


class Published(Schedule, Prepares):
    """
    A method that chooses each prompt by the rewards of training's own groups. A subclass has [`~Published.begin`],
    [`~Published.pick`] and [`~Published.learn`]. Prompts are places in the pool, counted from 0.

    Attributes:
        pool (`np.ndarray` of shape `(n,)`): rows of the dataset that may be trained on.
        arrays (`dict[str, np.ndarray]`): all that the method knows; a checkpoint holds it.
        drawn (`int`): draws so far.
        order (`RandomOrder`): places in the random order that TRL would have.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.arrays: dict[str, np.ndarray] = {}
        self.drawn = 0
        self._flight: dict[int, int] = {}  # place by number of a draw
        self._live = (0, 0)  # live groups of the last observation, and all

    def fit(self, host):
        config = self.run.config
        check_success_reward(host.reward_names, config.success_reward, config.learnability)
        check_online(host.dataset, config)
        self.host, self.pool = host, eligible_rows(host.dataset, config)
        self.order = RandomOrder(len(self.pool), self.run.seed)
        self.begin(len(self.pool))
        return whole_pool(host, len(self.pool))

    # For a method -----------------------------------------------------------------------------------------------

    def begin(self, size: int) -> None:
        """Fill `arrays` for a pool of so many prompts."""
        raise NotImplementedError

    def pick(self, n: int, random: np.random.Generator) -> list[int] | np.ndarray:
        """Return the places of the next n prompts. The generator is that of the first of these draws."""
        raise NotImplementedError

    def learn(self, places: np.ndarray, successes: np.ndarray, advantages: np.ndarray) -> None:
        """
        Learn from groups that were observed for the first time.

        Args:
            places (`np.ndarray` of shape `(n,)`): in the pool.
            successes (`np.ndarray` of shape `(n, G)`): 1 for a success, 0 for a failure, NaN for no deciding reward.
            advantages (`np.ndarray` of shape `(n, G)`): as the trainer computes them.
        """
        raise NotImplementedError

    # The contract -----------------------------------------------------------------------------------------------

    def choose(self, n):
        seed = self.run.seed if self.run.config.selection_seed is None else self.run.config.selection_seed
        places = np.asarray(self.pick(n, np.random.Generator(np.random.Philox(key=[seed, self.drawn]))), np.int64)
        self._flight |= dict(enumerate(places.tolist(), start=self.drawn))
        self.drawn += n
        for number in [number for number in self._flight if number < self.drawn - MOST_IN_FLIGHT]:
            del self._flight[number]
        return self.pool[places]

    def observe(self, groups):
        new = [(self._flight.pop(group.number), group.rewards) for group in groups if group.number in self._flight]
        if not new:
            return
        rewards = torch.from_numpy(np.stack([rewards for _, rewards in new]))
        deciding = self.host.deciding(rewards, self.run.config).numpy()
        successes = np.where(np.isnan(deciding), np.nan, is_success(deciding, self.run.config.success_threshold))
        advantages = self.host.advantages(rewards, torch.zeros(rewards.shape[:2])).numpy()
        self._live = int((np.abs(advantages) > 1e-9).any(1).sum()), len(new)
        self.learn(np.array([place for place, _ in new]), successes, advantages)

    def metrics(self):
        live, groups = self._live
        return {"live_fraction": live / groups} if groups else {}

    def state_dict(self):
        flight = {"numbers": np.array([*self._flight]), "places": np.array([*self._flight.values()])}
        return {"drawn": self.drawn} | flight | {f"array_{name}": part for name, part in self.arrays.items()}

    def load_state_dict(self, state):
        for name, own in self.arrays.items():
            part = state[f"array_{name}"]
            if part.shape != own.shape:
                raise ValueError(f"`{name}` has the shape {part.shape} instead of {own.shape}")
            self.arrays[name] = part.astype(own.dtype)
        self.drawn = int(state["drawn"])
        self._flight = dict(zip(state["numbers"].tolist(), state["places"].tolist(), strict=True))


def counts(successes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count successes and failures of groups, of shape `(n,)` each, from what [`Published.learn`] gets."""
    return np.nansum(successes, axis=1), np.nansum(1 - successes, axis=1)


def rates(places: np.ndarray, successes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the groups with a deciding reward, and their success rates."""
    won, lost = counts(successes)
    known = (won + lost) > 0
    return places[known], won[known] / (won + lost)[known]


def candidates(size: int, wanted: int, random: np.random.Generator) -> np.ndarray:
    """Draw so many different places, or all."""
    return random.choice(size, min(size, wanted), replace=False)


def best(places: np.ndarray, score: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """Return the n places with the greatest scores, ties at random; places again where there are too few."""
    ranked = places[np.lexsort((random.random(len(places)), -score))]
    return np.resize(ranked, n) if len(ranked) < n else ranked[:n]
