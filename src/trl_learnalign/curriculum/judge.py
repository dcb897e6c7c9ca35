"""Decides whether to choose at all: by the skill of the prediction on uniform draws, and by the gain of choosing."""

import math
from dataclasses import astuple, dataclass

import numpy as np

from .settings import OnlineSettings


_KNOWN_DRAWS = 16  # that a mean known beforehand counts for


@dataclass
class UniformSums:
    """
    Sums over uniform draws, which fade.

    Attributes:
        model_errors (`float`): squared errors of the predictor.
        mean_errors (`float`): squared errors of the mean of the draws before.
        successes (`float`): success rates.
        draws (`float`): number of draws.
        residuals (`float`): success rates less the predicted ones, of draws that were made after anything was learnt.
        predicted_draws (`float`): number of these.
    """

    model_errors: float = 0.0
    mean_errors: float = 0.0
    successes: float = 0.0
    draws: float = 0.0
    residuals: float = 0.0
    predicted_draws: float = 0.0

    def fade(self, factor: float) -> None:
        """Multiply every sum by `factor`."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) * factor)


class Judge:
    """
    Decides whether prompts are chosen.

    Args:
        settings ([`OnlineSettings`]): the thresholds.
        groups (`float`, *optional*): of the whole run.
        known (`float`, *optional*): mean success that is known beforehand. Then choosing begins before the prediction
            was tried, and the mean that it must be better than begins there.

    Attributes:
        choosing (`bool`): whether prompts are chosen; else they are drawn uniformly.
        switched (`bool`): whether that was otherwise before the last decision.
        headroom (`float`): utility (the expected variance of a prompt's rewards) of the best prompts divided by that
            of random ones.
        predicted (`float`): mean success that is predicted of random prompts.
        without_gain (`int`): draws in a row without skill or headroom.
        wait (`int`): uniform draws to judge by.
        trusted (`bool`): whether skill is taken for granted, as success rates were known beforehand. Ends when the
            prediction was tried: from then on choosing needs the same skill as anywhere.
        sums ([`UniformSums`]): over uniform draws.
    """

    NUMBERS = "choosing", "without_gain", "headroom", "predicted", "wait", "trusted"

    def __init__(self, settings: OnlineSettings, groups: float | None = None, known: float | None = None):
        self.settings, self.known = settings, known
        self.trusted = known is not None
        self.wait = settings.wait(groups, self.trusted)
        self.choosing = self.switched = False
        self.headroom, self.predicted = 1.0, 0.5
        self.without_gain = 0
        self.sums = UniformSums()

    @property
    def tried(self) -> bool:
        """True if there were enough uniform draws to judge by."""
        return self.sums.draws >= self.wait

    def draws_to_try(self, together: int) -> int:
        """Return how many uniform draws, `together` at a time, are still to come until the prediction is `tried`."""
        count, draws = self.sums.draws, 0
        while count < self.wait:
            count = count * self.settings.judge_memory**together + together
            draws += together
        return draws

    @property
    def uniform(self) -> float:
        """Share of the next draws that is uniform."""
        settings = self.settings
        return (settings.uniform_untried if self.trusted else settings.uniform) if self.choosing else 1.0

    @property
    def has_clear_skill(self) -> bool:
        """True if the prediction is so much better than the mean that choosing may begin."""
        return self.skill > self.settings.begin_skill

    @property
    def has_skill(self) -> bool:
        """True if success was predicted better than by the mean, on enough uniform draws."""
        wanted = self.settings.least_skill if self.choosing else self.settings.begin_skill
        return self.tried and self.skill > wanted

    @property
    def skill(self) -> float:
        """Brier skill on uniform draws: 1 - squared errors of the predictor / squared errors of their mean."""
        sums = self.sums
        return 1 - sums.model_errors / sums.mean_errors if sums.mean_errors > 0 else 0.0

    @property
    def pool_success(self) -> float:
        """
        Estimated success rate of the whole pool: the mean prediction plus the mean residual on recent uniform draws,
        unbiased as long as the policy and the predictor stay as they are. NaN before the first draw.
        """
        sums = self.sums
        if not sums.predicted_draws:
            return sums.successes / sums.draws if sums.draws else math.nan
        return float(np.clip(self.predicted + sums.residuals / sums.predicted_draws, 0, 1))

    def decide(self, best: np.ndarray, mean: float, predicted: float, draws: int) -> None:
        """
        Decide about the next draws.

        Args:
            best (`np.ndarray` of shape `(n,)`): what the best candidates that are free are ranked on.
            mean (`float`): the same of random candidates.
            predicted (`float`): mean success predicted of random candidates.
            draws (`int`): number of the next draws.
        """
        self.predicted = float(predicted)
        self.headroom = float(best.mean() / max(mean, 1e-12)) if len(best) else 1.0
        before = self.choosing
        if self.trusted and self.tried:
            self.trusted, self.choosing = False, self.choosing and self.has_clear_skill
        good = (self.trusted or self.has_skill) and self.headroom >= self.settings.least_headroom
        self.without_gain = 0 if good else self.without_gain + draws
        self.choosing = good or (self.choosing and self.without_gain < self.settings.patience)
        self.switched = before != self.choosing

    def observe(self, predicted: np.ndarray, observed: np.ndarray, learnt: np.ndarray) -> None:
        """
        Count uniform draws, one after the other.

        Args:
            predicted (`np.ndarray` of shape `(n,)`): success predicted when each was drawn.
            observed (`np.ndarray` of shape `(n,)`): its success rate.
            learnt (`np.ndarray` of shape `(n,)`): whether anything had been observed before it was drawn, bool.
        """
        sums = self.sums
        for expected, rate, told in zip(predicted.tolist(), observed.tolist(), learnt.tolist(), strict=True):
            mean = self._mean()
            sums.fade(self.settings.judge_memory)
            sums.successes += rate
            sums.draws += 1
            if told:
                sums.model_errors += (expected - rate) ** 2
                sums.mean_errors += (mean - rate) ** 2
                sums.residuals += rate - expected
                sums.predicted_draws += 1

    def _mean(self) -> float:
        """Return the mean success of the draws before, which a prediction is compared with."""
        sums = self.sums
        if self.known is None:
            return sums.successes / sums.draws if sums.draws else 0.5
        # Else a prediction that begins with the mean of the known rates would seem skilled while this one has to learn
        return (sums.successes + _KNOWN_DRAWS * self.known) / (sums.draws + _KNOWN_DRAWS)

    def state_dict(self) -> dict:
        """Return sums and numbers."""
        return {"sums": np.array(astuple(self.sums))} | {name: getattr(self, name) for name in self.NUMBERS}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        if state["sums"].shape != (len(UniformSums.__dataclass_fields__),):
            raise ValueError(f"sums have the shape {state['sums'].shape}")
        self.sums = UniformSums(*state["sums"].tolist())
        for name in self.NUMBERS:
            setattr(self, name, type(getattr(self, name))(state[name]))
