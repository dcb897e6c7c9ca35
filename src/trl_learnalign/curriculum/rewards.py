"""The meaning of rewards: success, a gradient, a doubtful threshold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


ROUNDING = 1e-6  # of a threshold: rewards are float32, and may be sums of several

# From rewards of shape `(n, G, F)` the one that decides success, NaN for none, and the advantages; `(n, G)` each
RewardReader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def read_rewards(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Read rewards as GRPO does without weights: their sum decides, and an advantage is its distance from the mean of the
    group.

    Args:
        rewards (`np.ndarray` of shape `(n, G, F)`): NaN for none.

    Returns:
        the deciding reward, NaN for none, and the advantage, 0 there; of shape `(n, G)` each.
    """
    known = np.isfinite(rewards).any(-1)
    total = np.where(known, np.nansum(rewards, axis=-1), np.nan)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    mean = np.nansum(total, axis=1, keepdims=True) / count
    return total, np.where(known, total - mean, 0.0)


@dataclass(frozen=True)
class DecidedBy:
    """
    Reads rewards as [`read_rewards`], but some of the functions decide success.

    Attributes:
        functions (`tuple[int, ...]`): their columns; the first that gave a rollout a reward decides.
    """

    functions: tuple[int, ...]

    def __call__(self, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        deciding = np.full(rewards.shape[:2], np.nan)
        for column in self.functions:
            deciding = np.where(np.isnan(deciding), rewards[:, :, column], deciding)
        return deciding, read_rewards(rewards)[1]


def is_success(rewards: Any, threshold: float) -> Any:
    """
    Tell whether a reward is at least `threshold`, up to rounding: .9 as a float32 is less than .9. NaN is no success.

    Args:
        rewards (`torch.Tensor` or `np.ndarray`): of any shape.
        threshold (`float`): least reward of a success.

    Returns:
        bool, of the same kind and shape.
    """
    return rewards >= threshold - ROUNDING * abs(threshold)


def has_gradient(advantages: Any, trained: Any) -> Any:
    """
    Tell whether a group has a gradient: a rollout in the loss has an advantage. Advantages of equal rewards may be off
    in the last digit.

    Args:
        advantages (`torch.Tensor` or `np.ndarray` of shape `(n, G)`): of the rollouts.
        trained (the same): whether a token of each rollout is in the loss, bool.

    Returns:
        bool, of the same kind, of shape `(n,)`.
    """
    return ((abs(advantages) > 1e-9) & trained).any(1)


def doubtful_threshold(rewards: np.ndarray, threshold: float) -> tuple[float, float, float] | None:
    """
    Look for shaped rewards with the threshold on the wrong side of most of them: right answers worth .9 to .99 and a
    threshold of 1, or wrong ones worth .1 and a threshold of .05.

    Args:
        rewards (`np.ndarray` of any shape): rewards that decide success; NaN for none.
        threshold (`float`): least reward of a success.

    Returns:
        `None`, or the share of the rewards of the better half of the range that are no successes (or of the worse half
        that are, with a minus sign), and the least and the greatest of those. Two different rewards are no doubt, nor
        is a half with a minority on the wrong side.
    """
    known = rewards[np.isfinite(rewards)]
    if not len(known) or len(np.unique(known)) <= 2:
        return None
    middle, success = (float(known.min()) + float(known.max())) / 2, is_success(known, threshold)
    for half, wrong, sign in ((known > middle, ~success, 1), (known < middle, success, -1)):
        if (half & wrong).sum() > half.sum() / 2:
            found = known[half & wrong]
            return sign * float((half & wrong).sum() / half.sum()), float(found.min()), float(found.max())
    return None
