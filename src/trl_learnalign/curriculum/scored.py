"""Predicts which prompts have groups that say something of success: a reward that decides it, a token in the loss."""

import numpy as np

from .batch import Batch
from .predictor import SuccessPredictor
from .settings import OnlineSettings


MOST_EXAMPLES = 5


class Scored:
    """
    Predicts which prompts give a group that can be learnt from: one with a reward that decides success and a token in
    the loss. A reward function for each task, or answers that a verifier cannot read, leave others without.

    The share of scored groups is predicted from features of the prompt, as success is, once a group was not scored.
    Until then it is 1.

    Args:
        features (`np.ndarray` of shape `(N, D)`): see [`SuccessPredictor`].
        settings ([`OnlineSettings`]): see [`SuccessPredictor`].

    Attributes:
        counts (`np.ndarray` of shape `(5,)`, float64): of the groups since [`~Scored.begin_count`]: groups; those
            without a deciding reward; those without a gradient though they differ, or all masked; rollouts; masked
            rollouts.
        examples (`np.ndarray` of shape `(m,)`, int64): the first rows without a deciding reward.
    """

    def __init__(self, features: np.ndarray, settings: OnlineSettings):
        self.predictor = SuccessPredictor(features, settings)
        self.counts = np.zeros(5)
        self.examples = np.zeros(0, np.int64)
        self._any = False  # a group was not scored

    def chance(self, rows: np.ndarray, unscored: np.ndarray) -> "np.ndarray | float":
        """
        Return the chance that a group of each row will be scored, of shape `(n,)`, or 1 for all.

        Args:
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            unscored (`np.ndarray` of shape `(n,)`): visits in a row that were not scored; -1 for none since a scored
                one.
        """
        if not self._any:
            return 1.0
        return np.where(unscored < 0, 1.0, self.predictor.predict(rows) / (1.0 + np.maximum(unscored, 0)))

    def observe(self, batch: Batch) -> None:
        """Learn whether groups were scored."""
        drawn, scored = batch.drawn, batch.scored
        without = ~scored & ~batch.dead
        self.examples = np.concatenate([self.examples, drawn.rows[without]])[:MOST_EXAMPLES].astype(np.int64)
        rollouts = batch.sizes.sum()
        masked = batch.masked.sum() - (batch.masked.size - rollouts)  # without those that a smaller group has not
        self.counts += [len(drawn), without.sum(), batch.dead.sum(), rollouts, masked]
        self._any |= bool((~scored).any())
        if self._any:
            trials = np.ones(len(drawn))
            self.predictor.observe(
                drawn.numbers, drawn.rows, drawn.clock, scored.astype(float), trials, np.full(len(drawn), np.nan)
            )

    def begin_count(self) -> None:
        """Count anew."""
        self.counts = np.zeros(5)

    def state_dict(self) -> dict:
        """Return the counts and the state of the predictor."""
        return {
            "counts": self.counts,
            "examples": self.examples,
            "any": self._any,
            "predictor": self.predictor.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        if state["counts"].shape != self.counts.shape:
            raise ValueError(f"counts have the shape {state['counts'].shape}")
        self.counts, self.examples = state["counts"].copy(), state["examples"].copy()
        self._any = bool(state["any"])
        self.predictor.load_state_dict(state["predictor"])
