"""Whether to choose at all: the predictor's skill on uniform draws, and the expected gain of choosing."""

import math

import numpy as np


TRIED = 32  # uniform draws before the predictor is judged
LEAST_SKILL = 0.05
LEAST_HEADROOM = 1.1
PATIENCE = 20  # chunks without headroom before draws are uniform
MEMORY = 0.995  # of the sums over uniform draws, per draw: the last 200 count


class Judge:
    """
    Attributes:
        choosing (`bool`): whether chunks are chosen; else they are drawn uniformly.
        switched (`bool`): whether that was otherwise for the chunk before.
        headroom (`float`): the expected gain (live groups, or variance) of the best prompts, divided by that of random
            ones.
    """

    NUMBERS = "choosing", "without_headroom", "headroom"

    def __init__(self):
        self.choosing = self.switched = False
        self.headroom = 1.0
        self.without_headroom = 0  # chunks in a row
        # Of uniform draws: squared errors of the predictor and of the mean, successes, draws
        self.sums = np.zeros(4)

    @property
    def able(self) -> bool:
        """Whether success was predicted better than by the mean, on enough uniform draws."""
        return bool(self.sums[3] >= TRIED and self.skill > LEAST_SKILL)

    @property
    def skill(self) -> float:
        """Brier skill on uniform draws: 1 - squared errors of the predictor / squared errors of their mean."""
        model, mean, _, _ = self.sums
        return float(1 - model / mean) if mean > 0 else 0.0

    @property
    def pool_success(self) -> float:
        """
        Mean success of the latest uniform draws, which is an unbiased estimate of the pool's; NaN before the first.
        """
        _, _, successes, draws = self.sums
        return float(successes / draws) if draws else math.nan

    def look(self, gain: np.ndarray, best: np.ndarray) -> None:
        """
        Decides about the next chunk.

        Args:
            gain (`np.ndarray` of shape `(n,)`): the expected gain of each of n random candidates.
            best (`np.ndarray`): places of those that would be chosen.
        """
        self.headroom = float(gain[best].mean() / max(gain.mean(), 1e-12)) if len(best) else 1.0
        self.without_headroom = 0 if self.headroom >= LEAST_HEADROOM else self.without_headroom + 1
        before = self.choosing
        if not self.choosing:
            self.choosing = self.able and self.headroom >= LEAST_HEADROOM
        elif not self.able or self.without_headroom >= PATIENCE:
            self.choosing = False
        self.switched = before != self.choosing

    def measure(self, predicted: np.ndarray, observed: np.ndarray, learnt: bool) -> None:
        """
        Counts uniform draws, of shape `(n,)` each; `learnt` if anything had been observed when they were predicted.
        """
        if not len(observed):
            return
        errors = np.array([0.0, 0.0, observed.sum(), len(observed)])
        if learnt:
            mean = self.pool_success if self.sums[3] else 0.5
            errors[:2] = ((predicted - observed) ** 2).sum(), ((mean - observed) ** 2).sum()
        self.sums = self.sums * MEMORY ** len(observed) + errors

    def state_dict(self) -> dict:
        """Sums and numbers."""
        return {"sums": self.sums} | {name: getattr(self, name) for name in self.NUMBERS}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"sums have the shape {state['sums'].shape}")
        self.sums = state["sums"].copy()
        for name in self.NUMBERS:
            setattr(self, name, type(getattr(self, name))(state[name]))
