"""The maths of LearnAlign (arXiv 2506.11480), free of any trainer: rewards and features in, scores out."""

from array import array
from collections.abc import Iterable

import torch


def success_rates(rewards: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Share of each group's scorable rollouts whose reward is at least `threshold`.

    Args:
        rewards (`torch.Tensor` of shape `(n, G)`): rewards of n groups; NaN where a rollout could not be scored.
        threshold (`float`): least reward of a success.

    Returns:
        `torch.Tensor` of shape `(n,)`, float64, in [0, 1]; NaN for a group without a scorable rollout.
    """
    scorable = ~rewards.isnan()
    return (scorable & (rewards >= threshold)).sum(1).double() / scorable.sum(1)


def learnability(success_rate: torch.Tensor) -> torch.Tensor:
    """V = p (1 - p), of shape `(n,)`, in [0, .25] (section 3.2 of the paper)."""
    return success_rate * (1 - success_rate)


def reward_variance(rewards: torch.Tensor) -> torch.Tensor:
    """
    Learnability for graded rewards: the (population) variance of each group's rewards, the rewards of all groups
    having been scaled to [0, 1] by their least and greatest value. For rewards of 0 and 1 it equals p (1 - p).

    Args:
        rewards (`torch.Tensor` of shape `(n, G)`): NaN where a rollout could not be scored.

    Returns:
        `torch.Tensor` of shape `(n,)`, float64, in [0, .25]; NaN for a group without a scorable rollout.
    """
    rewards = rewards.double()
    known = rewards[~rewards.isnan()]
    if known.numel() == 0 or known.max() == known.min():
        return torch.where(rewards.isnan().all(1), torch.nan, 0.0)
    scaled = (rewards - known.min()) / (known.max() - known.min())
    mean = scaled.nanmean(1, keepdim=True)
    return (scaled - mean).square().nanmean(1)


def unit_features(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    z_i = w_i phi_i / |phi_i|, the factor of Eq. 8: S_ij = z_i . z_j.

    Args:
        features (`torch.Tensor` of shape `(n, d)`): gradient features phi.
        weights (`torch.Tensor` of shape `(n,)`): V for the score of the paper, 1 for the alignment alone.

    Returns:
        `torch.Tensor` of shape `(n, d)`, float32. A feature of norm 0 gives zeros.
    """
    norms = features.norm(dim=1)
    factor = torch.where(norms > 0, weights.to(features) / norms.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return features * factor[:, None]


def scores_from_mean(
    features: torch.Tensor, weights: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    score_i = mean_j S_ij = z_i . mean_j z_j, which takes O(n d) and no n x n matrix.

    Args:
        features (`torch.Tensor` of shape `(n, d)`): gradient features phi.
        weights (`torch.Tensor` of shape `(n,)`): see [`unit_features`].
        mean (`torch.Tensor` of shape `(d,)`): mean_j z_j over the whole pool, float64.

    Returns:
        two float64 `torch.Tensor` of shape `(n,)`: the scores, and the alignments cos(phi_i, mean_j z_j).
    """
    norms = features.norm(dim=1).double()
    cosine = torch.where(norms > 0, (features.double() @ mean) / norms, 0.0)
    length = mean.norm()
    alignment = cosine / length if length > 0 else torch.zeros_like(cosine)
    return weights.double() * cosine, alignment.clamp(-1.0, 1.0)


def scores_of_batches(
    batches: Iterable[tuple[list[int], torch.Tensor]], weights: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`scores_from_mean`] of a pool whose features are read batch by batch, once.

    Args:
        batches (`Iterable`): of k dataset indices and features of shape `(k, d)`.
        weights (`torch.Tensor`): the weight of every row of the dataset, by its index.
        mean (`torch.Tensor` of shape `(d,)`): see [`scores_from_mean`].

    Returns:
        four `torch.Tensor` of shape `(n,)`: dataset indices (int64); scores, alignments and norms of the features
        (float64).
    """
    # Grown in place: small tensors kept between large ones that come and go would leave holes in the memory
    columns = array("q"), array("d"), array("d"), array("d")
    for indices, features in batches:
        scores, alignments = scores_from_mean(features, weights[indices], mean)
        norms = features.norm(dim=1).double()
        for column, values in zip(
            columns, (indices, scores.tolist(), alignments.tolist(), norms.tolist()), strict=True
        ):
            column.extend(values)
    dtypes = torch.int64, torch.float64, torch.float64, torch.float64
    return tuple(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))


def top_prompts(scores: torch.Tensor, learnabilities: torch.Tensor, num: int) -> list[int]:
    """
    Positions of the `num` best learnable prompts, best first, ties by position.

    A prompt with V = 0 teaches nothing and is never chosen, not even when there are fewer than `num` others; a prompt
    with V > 0 may be chosen with a negative score.

    Args:
        scores (`torch.Tensor` of shape `(n,)`): what to rank on.
        learnabilities (`torch.Tensor` of shape `(n,)`): V.
        num (`int`): how many at most.
    """
    return ranking(scores, learnabilities)[: min(num, int((learnabilities > 0).sum()))]


def ranking(scores: torch.Tensor, learnabilities: torch.Tensor) -> list[int]:
    """All n positions: those with V > 0 by falling score, then those with V = 0; ties by position."""
    scores, learnable = scores.tolist(), (learnabilities > 0).tolist()
    return sorted(range(len(scores)), key=lambda i: (not learnable[i], -scores[i], i))


def advantages(
    rewards: torch.Tensor, weights: torch.Tensor, scale: str = "group", aggregation: str = "sum_then_normalize"
) -> torch.Tensor:
    """
    Advantages of the rollouts of a pool, as GRPOTrainer computes them, with the pool in place of the batch.

    The scale of a group leaves the direction of its gradient unchanged unless the KL term is in use.

    Args:
        rewards (`torch.Tensor` of shape `(n, G, F)`): rewards of n groups by F reward functions; NaN if unscorable.
        weights (`torch.Tensor` of shape `(F,)`): the trainer's reward weights.
        scale (`str`): the trainer's `scale_rewards`: `"group"`, `"batch"` or `"none"`.
        aggregation (`str`): the trainer's `multi_objective_aggregation`.

    Returns:
        `torch.Tensor` of shape `(n, G)`, float64; 0 for a rollout that no reward function scored.
    """
    rewards, weights = rewards.double(), weights.double()
    unscorable = rewards.isnan().all(2)
    if aggregation == "normalize_then_sum":
        rewards = (rewards - rewards.nanmean(1, keepdim=True)) / (_nanstd(rewards)[:, None] + 1e-4)
        scale = "batch"
    total = (rewards * weights).nansum(2).masked_fill(unscorable, torch.nan)
    centred = total - total.nanmean(1, keepdim=True)
    if scale == "batch":
        centred = centred / (_nanstd(total.view(1, -1)) + 1e-4)
    elif scale == "group":
        centred = centred / (_nanstd(total)[:, None] + 1e-4)
    return centred.nan_to_num(0.0)


def _nanstd(values):
    """Sample standard deviation along dimension 1, NaN left out; 0 for fewer than two values."""
    known = (~values.isnan()).sum(1)
    squares = (values - values.nanmean(1, keepdim=True)).square().nansum(1)
    return torch.where(known > 1, (squares / (known - 1).clamp_min(1)).sqrt(), 0.0)
