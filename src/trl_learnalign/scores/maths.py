"""The maths of LearnAlign (arXiv 2506.11480), without a trainer: rewards and features in, scores out."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..curriculum.rewards import is_success


COLUMNS = 1024  # of features that are in float64 at a time


def success_rates(rewards: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Return the share of each group's scorable rollouts whose reward is at least `threshold`.

    Args:
        rewards (`torch.Tensor` of shape `(n, G)`): rewards of n groups; NaN where a rollout could not be scored.
        threshold (`float`): least reward of a success.

    Returns:
        `torch.Tensor` of shape `(n,)`, float64, in [0, 1]; NaN for a group without a scorable rollout.
    """
    scorable = ~rewards.isnan()
    return (scorable & is_success(rewards, threshold)).sum(1).double() / scorable.sum(1)


def learnability(success_rate: torch.Tensor) -> torch.Tensor:
    """Return V = p (1 - p), of shape `(n,)`, in [0, .25] (section 3.2 of the paper)."""
    return success_rate * (1 - success_rate)


def reward_variance(rewards: torch.Tensor) -> torch.Tensor:
    """
    Return the learnability for graded rewards: the (population) variance of each group's rewards, the rewards of all
    groups having been scaled to [0, 1] by their least and greatest value. For rewards of 0 and 1 it equals p (1 - p).

    Args:
        rewards (`torch.Tensor` of shape `(n, G)`): NaN where a rollout could not be scored.

    Returns:
        `torch.Tensor` of shape `(n,)`, float64, in [0, .25]; exactly 0 for a group of equal rewards; NaN for a group
        without a scorable rollout.
    """
    rewards = rewards.double()
    known = rewards[~rewards.isnan()]
    if known.numel() == 0 or known.max() == known.min():
        return torch.zeros_like(rewards[:, 0]).masked_fill(rewards.isnan().all(1), torch.nan)
    scaled = (rewards - known.min()) / (known.max() - known.min())
    mean = scaled.nanmean(1, keepdim=True)
    unknown = rewards.isnan()
    # The mean of equal numbers may be off in the last digit
    equal = rewards.masked_fill(unknown, -torch.inf).amax(1) == rewards.masked_fill(unknown, torch.inf).amin(1)
    return (scaled - mean).square().nanmean(1).masked_fill(equal, 0.0)


def feature_norms(features: torch.Tensor) -> torch.Tensor:
    """Return |phi| of features of shape `(n, d)`: of shape `(n,)`, float64, without a copy in float64."""
    squares = torch.zeros(len(features), dtype=torch.float64)
    for part in features.split(COLUMNS, 1):
        part = part.double()
        squares += torch.linalg.vecdot(part, part)
    return squares.sqrt()


def add_unit_features(total: torch.Tensor, features: torch.Tensor, weights: torch.Tensor) -> None:
    """
    Add sum_i z_i to `total`, where z_i = w_i phi_i / |phi_i| is the factor of Eq. 8: S_ij = z_i . z_j. A feature of
    norm 0 adds nothing.

    Args:
        total (`torch.Tensor` of shape `(d,)`): float64.
        features (`torch.Tensor` of shape `(n, d)`): gradient features phi.
        weights (`torch.Tensor` of shape `(n,)`): V for the score of the paper, 1 for the alignment alone.
    """
    norms = feature_norms(features)
    add_features(total, features, torch.where(norms > 0, weights.double() / norms, 0.0))


def add_features(total: torch.Tensor, features: torch.Tensor, weights: torch.Tensor) -> None:
    """Add sum_i w_i phi_i to `total`, with the arguments of [`add_unit_features`]."""
    for feature, weight in zip(features, weights.tolist(), strict=True):  # no copy, as d may be the size of a LoRA
        total.add_(feature, alpha=weight)


def column_products(features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return phi_i . v_s of features `(n, d)` and float64 vectors `(S, d)`: of shape `(n, S)`, float64."""
    products = torch.zeros(len(features), len(vectors), dtype=torch.float64)
    for part, part_of_vectors in zip(features.split(COLUMNS, 1), vectors.split(COLUMNS, 1), strict=True):
        products += part.double() @ part_of_vectors.T
    return products


def scores_from_mean(
    features: torch.Tensor, weights: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return score_i = mean_j S_ij = z_i . mean_j z_j, which takes O(n d) and no n x n matrix.

    Args:
        features (`torch.Tensor` of shape `(n, d)`): gradient features phi.
        weights (`torch.Tensor` of shape `(n,)`): see [`add_unit_features`].
        mean (`torch.Tensor` of shape `(d,)`): mean_j z_j over the whole pool, float64.

    Returns:
        three float64 `torch.Tensor` of shape `(n,)`: the scores, the alignments cos(phi_i, mean_j z_j), and |phi_i|.
    """
    products, squares = torch.zeros(2, len(features), dtype=torch.float64)
    for part, part_of_mean in zip(features.split(COLUMNS, 1), mean.split(COLUMNS), strict=True):
        part = part.double()
        products += part @ part_of_mean
        squares += torch.linalg.vecdot(part, part)
    norms = squares.sqrt()
    cosine = torch.where(norms > 0, products / norms, 0.0)
    length = mean.norm()
    alignment = cosine / length if length > 0 else torch.zeros_like(cosine)
    return weights.double() * cosine, alignment.clamp(-1.0, 1.0), norms


def scores_of_batches(
    batches: Iterable[tuple[list[int], torch.Tensor]], weights: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    Do what [`scores_from_mean`] does for a pool whose features are read batch by batch, once.

    Args:
        batches (`Iterable`): of k dataset indices and features of shape `(k, d)`.
        weights (`torch.Tensor`): the weight of every row of the dataset, by its index.
        mean (`torch.Tensor` of shape `(d,)`): see [`scores_from_mean`].

    Returns:
        four `torch.Tensor` of shape `(n,)`: dataset indices (int64); scores, alignments and norms (float64).
    """
    # Grown in place: small tensors kept between large ones that come and go would leave holes in the memory
    columns: list[array] = [array("q"), array("d"), array("d"), array("d")]
    for indices, features in batches:
        values = (value.tolist() for value in scores_from_mean(features, weights[indices], mean))
        for column, entries in zip(columns, (indices, *values), strict=True):
            column.extend(entries)
        del features  # may be as large as a LoRA
    dtypes = torch.int64, torch.float64, torch.float64, torch.float64
    return tuple(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))


def cosines_of_batches(
    batches: Iterable[tuple[list[int], torch.Tensor]], directions: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    Return cos(phi_i, g_s) of features that are read batch by batch, once.

    Args:
        batches (`Iterable`): of k dataset indices and features phi of shape `(k, d)`.
        directions (`torch.Tensor` of shape `(S, d)`): g, float64. A feature or a direction of norm 0 has a cosine of
            0.

    Returns:
        three `torch.Tensor`: dataset indices of shape `(n,)`, int64; the cosines, `(n, S)`, and |phi_i|, `(n,)`, both
            float64.
    """
    columns: list[array] = [array("q"), array("d"), array("d")]
    lengths = directions.norm(dim=1)
    for indices, features in batches:
        products, norms = column_products(features, directions), feature_norms(features)
        scale = norms[:, None] * lengths
        cosines = torch.where(scale > 0, products / scale, 0.0).flatten()
        for column, entries in zip(columns, (indices, cosines.tolist(), norms.tolist()), strict=True):
            column.extend(entries)
        del features  # may be as large as a LoRA
    dtypes = torch.int64, torch.float64, torch.float64
    rows, cosines, norms = (torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))
    return rows, cosines.view(-1, len(directions)), norms


def ranking(scores: torch.Tensor, learnabilities: torch.Tensor, seed: int) -> np.ndarray:
    """
    Return all n positions, best first: those with V > 0 by falling score, then those with V = 0. Scores that agree in
    12 digits are ties, as only rounding makes them differ (1/5 x 4/5 and 4/5 x 1/5); ties are in random order.

    Args:
        scores (`torch.Tensor` of shape `(n,)`): what to rank on.
        learnabilities (`torch.Tensor` of shape `(n,)`): V.
        seed (`int`): of the order of ties. The same seed and n give the same order anywhere.
    """
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).numpy()
    rounded = np.fromiter((float(f"{score:.12g}") for score in scores.double().numpy()), float, len(scores))
    return order[np.lexsort((-rounded[order], ~(learnabilities > 0).numpy()[order]))]  # keeps the order of ties


def advantages(
    rewards: torch.Tensor, weights: torch.Tensor, scale: str = "group", aggregation: str = "sum_then_normalize"
) -> torch.Tensor:
    """
    Compute the advantages of the rollouts of a pool, as GRPOTrainer computes them, with the pool in place of the
    batch.

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


def advantages_leave_one_out(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    penalties: torch.Tensor,
    clip: Sequence[float] | None = None,
    normalize: bool = False,
) -> torch.Tensor:
    """
    Compute the advantages of the rollouts of a pool, as RLOOTrainer computes them, with the pool in place of the
    batch: each total reward minus the mean of the others of its group.

    Args:
        rewards (`torch.Tensor` of shape `(n, G, F)`): rewards of n groups by F reward functions; NaN if unscorable.
        weights (`torch.Tensor` of shape `(F,)`): the trainer's reward weights.
        penalties (`torch.Tensor` of shape `(n, G)`): taken off the total rewards, after clipping.
        clip (`Sequence[float]`, *optional*): the trainer's `reward_clip_range`.
        normalize (`bool`): the trainer's `normalize_advantages`.

    Returns:
        `torch.Tensor` of shape `(n, G)`, float64; 0 for a rollout that no reward function scored.
    """
    total = (rewards.double() * weights.double()).nansum(2).masked_fill(rewards.isnan().all(2), torch.nan)
    if clip:
        total = total.clamp(*clip)
    total = total - penalties.double()
    others = (~total.isnan()).sum(1, keepdim=True) - 1
    found = total - (total.nansum(1, keepdim=True) - total) / others
    if normalize:
        found = (found - found.nanmean()) / (_nanstd(found.view(1, -1)) + 1e-4)
    return found.nan_to_num(0.0)


def _nanstd(values):
    """Compute the sample standard deviation along dimension 1, NaN left out; 0 for fewer than two values."""
    known = (~values.isnan()).sum(1)
    squares = (values - values.nanmean(1, keepdim=True)).square().nansum(1)
    return torch.where(known > 1, (squares / (known - 1).clamp_min(1)).sqrt(), 0.0)
