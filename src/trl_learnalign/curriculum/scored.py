"""Groups that say nothing of success: no reward that decides it, or no token in the loss. Which prompts have them."""

import numpy as np

from .predictor import SuccessPredictor


NAMED = 5  # rows that a warning names
MANY = 0.5  # of the completions masked are worth a warning, whether or not a whole group is
_ARRAYS = "counts", "examples", "said"


class Scored:
    """
    Predicts which prompts give a group that can be learnt from: one with a reward that decides success and a token in
    the loss. A reward function for each task, or answers that a verifier cannot read, leave others without.

    The share of scored groups is predicted from features of the prompt, as success is, once a group was not scored.
    Until then it is 1.

    Args:
        features (`np.ndarray` of shape `(N, D)`): see [`SuccessPredictor`].

    Attributes:
        counts (`np.ndarray` of shape `(5,)`, float64): of the groups since the last look: groups; those without a
            deciding reward; those without a gradient though they differ, or all masked; rollouts; masked rollouts.
        examples (`np.ndarray` of shape `(m,)`, int64): the first rows without a deciding reward.
        said (`np.ndarray` of shape `(3,)`, bool): what was warned of.
    """

    def __init__(self, features: np.ndarray):
        self.predictor = SuccessPredictor(features)
        self.counts = np.zeros(5)
        self.examples = np.zeros(0, np.int64)
        self.said = np.zeros(3, bool)
        self._any = False  # a group was not scored

    def chance(self, rows: np.ndarray, unscored: np.ndarray) -> "np.ndarray | float":
        """
        The chance that a group of each row will be scored, of shape `(n,)`, or 1 for all.

        Args:
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            unscored (`np.ndarray` of shape `(n,)`): visits in a row that were not scored; -1 for none since a scored
                one.
        """
        if not self._any:
            return 1.0
        return np.where(unscored < 0, 1.0, self.predictor.predict(rows) / (1.0 + np.maximum(unscored, 0)))

    def observe(self, chunk: int, rows: np.ndarray, scored: np.ndarray, dead: np.ndarray, masked: np.ndarray) -> None:
        """
        Learns of the groups of a chunk.

        Args:
            chunk (`int`): the chunk.
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            scored (`np.ndarray` of shape `(n,)`): whether each group is, bool.
            dead (`np.ndarray` of shape `(n,)`): whether it is not, as it has no gradient though its outcomes differ or
                as it is all masked, bool.
            masked (`np.ndarray` of shape `(n, G)`): rollouts that have no token in the loss, bool.
        """
        without = ~scored & ~dead
        self.examples = np.concatenate([self.examples, rows[without]])[:NAMED].astype(np.int64)
        self.counts += [len(rows), without.sum(), dead.sum(), masked.size, masked.sum()]
        self._any |= bool((~scored).any())
        if self._any:
            self.predictor.observe(chunk, rows, scored.astype(float), np.ones(len(rows)))

    def warnings(self, names: list[str]) -> list[str]:
        """
        What should be said of the groups since the last look, each kind once in a run; they are counted anew.

        Args:
            names (`list[str]`): of the reward functions.
        """
        groups, without, dead, rollouts, masked = self.counts
        self.counts = np.zeros(5)
        many = masked > MANY * rollouts
        kinds = np.array([without > 0, dead > 0 and not masked, (dead > 0 and masked > 0) or many])
        found = [
            text
            for text, new in zip(
                (
                    self._without(groups, without, names),
                    f"{dead:,.0f} of the last {groups:,.0f} groups ({dead / groups:.0%}) have no gradient, although "
                    "their successes differ: their total rewards do not. Give the reward that decides success a "
                    "weight in `reward_weights`, or see what clips it.",
                    f"{masked / rollouts:.0%} of the completions of the last {groups:,.0f} groups were cut off, and "
                    f"`mask_truncated_completions=True` leaves these out of the loss: {dead:,.0f} groups "
                    f"({dead / groups:.0%}) have no gradient because of it. Raise `max_completion_length`.",
                ),
                kinds & ~self.said,
                strict=True,
            )
            if new
        ]
        self.said |= kinds
        return found

    def _without(self, groups, without, names):
        remedy = (
            f"Check what `{names[0]}` makes of these rows, or leave them out."
            if len(names) == 1
            else f"The reward functions are {', '.join(names)}: where each scores the rows of its own task, name "
            "all that decide in `success_reward`. Else leave such rows out."
        )
        rows = f"row {', row '.join(map(str, self.examples))}{' and others' * int(without > len(self.examples))}"
        return (
            f"{without:,.0f} of the last {groups:,.0f} groups ({without / groups:.0%}) have no reward that decides "
            f"success: all are None or NaN ({rows}). Nothing can be predicted of such prompts, so they will seldom be "
            f"chosen. {remedy}"
        )

    def state_dict(self) -> dict:
        """What was counted, named and said, and the state of the predictor."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return arrays | {"any": self._any, "predictor": self.predictor.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        if state["counts"].shape != self.counts.shape:
            raise ValueError(f"counts have the shape {state['counts'].shape}")
        for name in _ARRAYS:
            setattr(self, name, state[name].copy())
        self._any = bool(state["any"])
        self.predictor.load_state_dict(state["predictor"])


def varies(outcomes: np.ndarray) -> np.ndarray:
    """Whether the outcomes of each group differ, of shape `(n,)`; NaN of `(n, G)` is none."""
    known = np.isfinite(outcomes)
    return np.where(known, outcomes, -np.inf).max(1) > np.where(known, outcomes, np.inf).min(1)
