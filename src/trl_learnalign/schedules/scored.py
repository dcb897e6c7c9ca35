"""Groups that say nothing of success: no reward that decides it, or no token in the loss. Which prompts have them."""

import numpy as np

from .predictor import SuccessPredictor


NAMED = 5  # rows that a warning names


class Scored:
    """
    Predicts which prompts give a group that can be learnt from: one with a reward that decides success and a token in
    the loss. A reward function for each task, or answers that a verifier cannot read, leave others without.

    The share of scored groups is predicted from features of the prompt, as success is, once a group was not scored.
    Until then it is 1.

    Args:
        features (`np.ndarray` of shape `(N, D)`): see [`SuccessPredictor`].

    Attributes:
        counts (`np.ndarray` of shape `(5,)`, float64): groups; those without a deciding reward; those whose rollouts
            are all masked; rollouts; masked rollouts.
        examples (`list[int]`): the first rows without a deciding reward.
    """

    def __init__(self, features: np.ndarray):
        self.predictor = SuccessPredictor(features)
        self.counts = np.zeros(5)
        self.examples: list[int] = []

    def chance(self, rows: np.ndarray, unscored: np.ndarray) -> "np.ndarray | float":
        """
        The chance that a group of each row will be scored, of shape `(n,)`, or 1 for all.

        Args:
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            unscored (`np.ndarray` of shape `(n,)`): visits in a row that were not scored; -1 for none since a scored
                one.
        """
        if not self.counts[1:3].any():
            return 1.0
        return np.where(unscored < 0, 1.0, self.predictor.predict(rows) / (1.0 + np.maximum(unscored, 0)))

    def observe(self, chunk: int, rows: np.ndarray, scored: np.ndarray, masked: np.ndarray) -> None:
        """
        Learns of the groups of a chunk.

        Args:
            chunk (`int`): the chunk.
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            scored (`np.ndarray` of shape `(n,)`): whether each group is, bool.
            masked (`np.ndarray` of shape `(n, G)`): rollouts that have no token in the loss, bool.
        """
        cut = masked.all(1)
        without = ~scored & ~cut
        self.examples = [*self.examples, *rows[without].tolist()][:NAMED]
        self.counts += [len(rows), without.sum(), cut.sum(), masked.size, masked.sum()]
        if self.counts[1:3].any():
            self.predictor.observe(chunk, rows, scored.astype(float), np.ones(len(rows)))

    def warnings(self, names: list[str]) -> list[str]:
        """
        What should be said of the groups so far.

        Args:
            names (`list[str]`): of the reward functions.
        """
        groups, without, cut, rollouts, masked = self.counts
        texts = []
        if without:
            remedy = (
                f"Check what `{names[0]}` makes of these rows, or leave them out."
                if len(names) == 1
                else f"The reward functions are {', '.join(names)}: where each scores the rows of its own task, name "
                "all that decide in `success_reward`. Else leave such rows out."
            )
            texts.append(
                f"{without:,.0f} of the first {groups:,.0f} groups ({without / groups:.0%}) have no reward that "
                f"decides success: all are None or NaN (row {', row '.join(map(str, self.examples))}"
                f"{' and others' * int(without > len(self.examples))}). Nothing can be predicted of such prompts, so "
                f"they will seldom be chosen. {remedy}"
            )
        if cut:
            texts.append(
                f"{cut:,.0f} of the first {groups:,.0f} groups ({cut / groups:.0%}) have no token in the loss: all "
                "their completions were cut off, and `mask_truncated_completions=True` leaves these out. They have no "
                f"gradient. Of all completions {masked / rollouts:.0%} were cut off. Raise `max_completion_length`."
            )
        return texts

    def state_dict(self) -> dict:
        """The counts and the state of the predictor."""
        return {"counts": self.counts, "predictor": self.predictor.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        if state["counts"].shape != self.counts.shape:
            raise ValueError(f"counts have the shape {state['counts'].shape}")
        self.counts = state["counts"].copy()
        self.predictor.load_state_dict(state["predictor"])


def has_gradient(total: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """
    Whether a group has a gradient: a rollout with a token in the loss has another reward than the mean of the group.

    Args:
        total (`np.ndarray` of shape `(n, G)`): total rewards, NaN for none.
        masked (`np.ndarray` of shape `(n, G)`): rollouts that have no token in the loss, bool.

    Returns:
        `np.ndarray` of shape `(n,)`, bool.
    """
    known = np.isfinite(total)
    least = np.where(known, total, np.inf).min(1, keepdims=True)
    most = np.where(known, total, -np.inf).max(1, keepdims=True)
    mean = np.where(known, total, 0.0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    # The mean of rewards that differ is off by rounding where one of them equals it
    apart = np.abs(np.where(known, total, mean) - mean) > 1e-6 * np.where(most > least, most - least, np.inf)
    return (apart & ~masked).any(1)
