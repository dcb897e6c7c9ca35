"""Whether to choose at all: the predictor's skill on uniform draws, and the expected gain of choosing."""

import math

import numpy as np


UNIFORM = 0.05  # of a chunk: uniform draws from the whole pool, which measure the pool and the predictor
TRIED = 64  # uniform draws before the predictor is judged
BEGIN_SKILL, LEAST_SKILL = 0.1, 0.05  # to begin with choosing, and to go on
LEAST_HEADROOM = 1.1
PATIENCE = 20  # chunks without skill or headroom before draws are uniform again
MEMORY = 0.995  # of the sums over uniform draws, per draw: the last 200 count


class Judge:
    """
    Attributes:
        choosing (`bool`): whether chunks are chosen; else they are drawn uniformly.
        switched (`bool`): whether that was otherwise for the chunk before.
        headroom (`float`): what prompts are ranked on (the expected variance of their rewards), of the best ones
            divided by that of random ones.
        predicted (`float`): mean success that is predicted of random prompts.
    """

    NUMBERS = "choosing", "in_vain", "headroom", "predicted"

    def __init__(self):
        self.choosing = self.switched = False
        self.headroom, self.predicted = 1.0, 0.5
        self.in_vain = 0  # chunks in a row without skill or headroom
        # Of uniform draws: squared errors of the predictor and of the mean, successes, draws; of those that were drawn
        # after anything was learnt: successes less predicted ones, draws
        self.sums = np.zeros(6)

    @property
    def tried(self) -> bool:
        """Whether there were enough uniform draws to judge by."""
        return bool(self.sums[3] >= TRIED)

    def chunks_to_try(self, draws: int) -> int:
        """How many chunks of so many uniform draws are to be observed until the prediction is `tried`."""
        count, chunks = self.sums[3], 0
        while count < TRIED:
            count, chunks = count * MEMORY**draws + draws, chunks + 1
        return chunks

    @property
    def skilled(self) -> bool:
        """Whether the prediction is clearly better than the mean."""
        return self.skill > BEGIN_SKILL

    @property
    def able(self) -> bool:
        """Whether success was predicted better than by the mean, on enough uniform draws."""
        wanted = LEAST_SKILL if self.choosing else BEGIN_SKILL
        return self.tried and self.skill > wanted

    @property
    def skill(self) -> float:
        """Brier skill on uniform draws: 1 - squared errors of the predictor / squared errors of their mean."""
        model, mean, *_ = self.sums
        return float(1 - model / mean) if mean > 0 else 0.0

    @property
    def pool_success(self) -> float:
        """
        Of the whole pool: the mean prediction, corrected by its mean error on the latest uniform draws, which is
        unbiased as long as the policy and the predictor stay as they are. NaN before the first draw.
        """
        _, _, successes, draws, beyond, learnt = self.sums
        if not learnt:
            return float(successes / draws) if draws else math.nan
        return float(np.clip(self.predicted + beyond / learnt, 0, 1))

    def look(self, utility: np.ndarray, best: np.ndarray, predicted: float) -> None:
        """
        Decides about the next chunk.

        Args:
            utility (`np.ndarray` of shape `(n,)`): what each of n random candidates is ranked on.
            best (`np.ndarray`): places of those that would be chosen.
            predicted (`float`): mean success predicted of the candidates.
        """
        self.predicted = float(predicted)
        self.headroom = float(utility[best].mean() / max(utility.mean(), 1e-12)) if len(best) else 1.0
        before, good = self.choosing, self.able and self.headroom >= LEAST_HEADROOM
        self.in_vain = 0 if good else self.in_vain + 1
        self.choosing = good or (self.choosing and self.in_vain < PATIENCE)
        self.switched = before != self.choosing

    def measure(self, predicted: np.ndarray, observed: np.ndarray, learnt: bool) -> None:
        """
        Counts uniform draws, of shape `(n,)` each; `learnt` if anything had been observed when they were predicted.
        """
        if not len(observed):
            return
        errors = np.array([0.0, 0.0, observed.sum(), len(observed), 0.0, 0.0])
        if learnt:
            mean = self.sums[2] / self.sums[3] if self.sums[3] else 0.5
            errors[:2] = ((predicted - observed) ** 2).sum(), ((mean - observed) ** 2).sum()
            errors[4:] = (observed - predicted).sum(), len(observed)
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
