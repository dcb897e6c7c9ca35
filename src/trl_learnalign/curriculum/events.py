"""Draws and groups: the prompts that training asks for, and the rewarded rollouts that come of them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """
    A row of the dataset that was chosen once.

    Attributes:
        number (`int`): draws of the run before this one.
        row (`int`): of the dataset.
    """

    number: int
    row: int


@dataclass(frozen=True, eq=False)
class Group:
    """
    The rollouts of one prompt, when their rewards are known.

    Attributes:
        number (`int`): the number of the draw that asked for the group. A group may be observed twice, as where a
            resumed run generates it again: it has the same number both times.
        row (`int`): of the dataset.
        rewards (`np.ndarray` of shape `(G, F)`): of G rollouts by F reward functions, float64; NaN for none.
        masked (`np.ndarray` of shape `(G,)`, *optional*): rollouts without a token in the loss, such as truncated ones
            under `mask_truncated_completions`, bool; `None` where each has one.
        completion (`str`, *optional*): the completion of the first rollout, where it was asked for.
        sketch (`np.ndarray` of shape `(dim,)`, *optional*): of the gradient of the group, where it was asked for.
    """

    number: int
    row: int
    rewards: np.ndarray
    masked: np.ndarray | None = None
    completion: str | None = None
    sketch: np.ndarray | None = None
