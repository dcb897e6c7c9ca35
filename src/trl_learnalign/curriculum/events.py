"""The events of a curriculum: a prompt was drawn, its rollouts are finished, its gradient was taken."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """
    A prompt that is to be trained on.

    Attributes:
        number (`int`): counts the draws of a run from 0. A group names the draw that asked for it by this number.
        row (`int`): row of the dataset.
    """

    number: int
    row: int


@dataclass(frozen=True)
class Group:
    """
    The rollouts of one prompt, when their rewards are known.

    Attributes:
        number (`int`): the draw that asked for it. A group that is observed twice changes nothing.
        row (`int`): row of the dataset.
        rewards (`np.ndarray` of shape `(G, F)`): rewards of G rollouts by F reward functions, NaN for none.
        masked (`np.ndarray` of shape `(G,)`, *optional*): rollouts without a token in the loss, bool.
        completion (`str`, *optional*): text of the first rollout, where one was asked for.
        alike (`np.ndarray` of shape `(G,)`, *optional*): a number for each completion, the same for equal ones.
    """

    number: int
    row: int
    rewards: np.ndarray
    masked: np.ndarray | None = None
    completion: str | None = None
    alike: np.ndarray | None = None


@dataclass(frozen=True)
class Gradient:
    """
    The gradient of one group, as training took it, when the backward passes of all its rows are done.

    Attributes:
        number (`int`): of the draw. A second one of the same draw changes nothing.
        row (`int`): row of the dataset.
        sketch (`np.ndarray` of shape `(dim,)`): a sketch of the gradient of the loss, float32: of the group's part in
            the gradient that the optimizer gets. Zero for a group without a gradient.
    """

    number: int
    row: int
    sketch: np.ndarray
