"""The two events of a curriculum: a prompt was drawn, and the rollouts of a draw are finished."""

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
        sketch (`np.ndarray` of shape `(dim,)`, *optional*): of its gradient, where alignment is wanted.
    """

    number: int
    row: int
    rewards: np.ndarray
    masked: np.ndarray | None = None
    completion: str | None = None
    alike: np.ndarray | None = None
    sketch: np.ndarray | None = None
