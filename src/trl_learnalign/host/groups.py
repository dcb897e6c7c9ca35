"""Rollouts of one prompt: as they are measured, as they enter a gradient, and dealt to processes."""

from dataclasses import dataclass

import numpy as np


@dataclass
class RolloutGroup:
    """
    The rollouts of one prompt.

    Attributes:
        row (`int`): row of the training dataset.
        prompt_ids (`list[np.ndarray]`): tokens that each of G completions continues, int32. One array where all are
            equal; an environment or a `rollout_func` may begin every rollout differently.
        completion_ids (`list[np.ndarray]`): tokens of each of G completions, int32.
        loss_masks (`list[np.ndarray]`): 1 for a completion token that the policy is trained on, else 0 (tool results,
            truncated completions under `mask_truncated_completions`), int8.
        completions (`list`): G completions as the reward functions got them, text or messages, images replaced by
            text.
        rewards (`np.ndarray` of shape `(G, F)`): of F reward functions, float32; NaN where one gave none.
        penalties (`np.ndarray` of shape `(G,)`): what the trainer takes off the total reward of each completion,
            float32: RLOOTrainer the KL term, beta times log pi - log pi_ref of the completion. 0 for GRPOTrainer,
            whose loss has it, and where no gradients are taken.
        has_images (`bool`): `True` if one of the rollouts of its batch has an image, so that the tokens are not all
            of the policy's input.
    """

    row: int
    prompt_ids: list[np.ndarray]
    completion_ids: list[np.ndarray]
    loss_masks: list[np.ndarray]
    completions: list
    rewards: np.ndarray
    penalties: np.ndarray
    has_images: bool = False


@dataclass
class Row:
    """
    A rollout as it enters a gradient: tokens, loss mask, advantage, weight in the group mean; and, where the trainer's
    loss has `entropy_share` less than 1, a mask of the tokens whose entropy is high.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    loss_mask: np.ndarray
    advantage: float
    weight: float
    entropy_mask: np.ndarray | None = None

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion_ids)


def shared(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return the arrays; if all are equal, one of them repeated, to save memory."""
    first = arrays[0]
    return [first] * len(arrays) if all(np.array_equal(first, other) for other in arrays[1:]) else arrays


def deal(batches: list[list[int]], first: int, rank: int, sharing: int) -> tuple[list[int], list[int], bool]:
    """
    Deal a process its part of the round that begins with batch `first`: its batch, the batch whose seed it takes, and
    `True` if that is its own work. A process without a batch repeats another's, since all must generate equally often.
    `sharing` processes generate together, and so with the same seed. A batch has the same neighbours, and the same
    seed, on any number of processes:

        sharing 2, 4 processes    round 0           round 1
        process                   0   1 | 2   3     0   1 | 2   3
        batch of 7                0   1 | 2   3     4   5 | 6   6 again
        seed of batch             0   0 | 2   2     4   4 | 6   6
    """
    own, lead = first + rank, first + rank - rank % sharing
    seed_of = batches[lead if lead < len(batches) else first]
    return (batches[own], seed_of, True) if own < len(batches) else (seed_of, seed_of, False)
