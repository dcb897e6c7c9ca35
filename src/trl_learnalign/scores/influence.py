"""Influence of prompts on a target: the damped inverse of their gradients' second moment, which is never formed."""

from array import array
from collections.abc import Callable, Iterable

import torch

from .maths import COLUMNS, column_products, feature_norms


# Of the mean of the eigenvalues that may be above 0, as DataInf has it (arXiv 2310.00902)
DAMPING = 0.1
TOLERANCE = 1e-8  # of a residual, relative to its right side
MOST_ITERATIONS = 500


def second_moment_times(batches: Iterable[tuple[list[int], torch.Tensor]], vectors: torch.Tensor) -> torch.Tensor:
    """
    Return sum_i phi_i (phi_i . v_s) of features phi that are read batch by batch.

    Args:
        batches (`Iterable`): of k dataset indices and features of shape `(k, d)`.
        vectors (`torch.Tensor` of shape `(S, d)`): v, float64.

    Returns:
        `torch.Tensor` of shape `(S, d)`, float64.
    """
    total = torch.zeros_like(vectors)
    for _, features in batches:
        products = column_products(features, vectors)
        for part, part_of_total in zip(features.split(COLUMNS, 1), total.split(COLUMNS, 1), strict=True):
            part_of_total += products.T @ part.double()
    return total


def solve(
    times: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    agreed: Callable[[float], float] = lambda residual: residual,
) -> tuple[torch.Tensor, int, float]:
    """
    Solve A x_s = b_s by conjugate gradients (Hestenes and Stiefel, 1952), for all s at once.

    Args:
        times (`Callable`): takes vectors of shape `(S, d)`, and returns A times each; A is symmetric and positive.
        right (`torch.Tensor` of shape `(S, d)`): b, float64.
        agreed (`Callable`): takes the residual of this process, and returns the one that all of them go by.

    Returns:
        x, of shape `(S, d)`; the iterations; and the largest |A x_s - b_s| / |b_s|.
    """
    solution, rest = torch.zeros_like(right), right.clone()
    direction, squares = rest.clone(), rest.square().sum(1)
    first = squares.clamp_min(torch.finfo(squares.dtype).tiny)
    for number in range(MOST_ITERATIONS + 1):
        residual = agreed((squares / first).max().sqrt().item())
        if residual <= TOLERANCE or number == MOST_ITERATIONS:
            break
        product = times(direction)
        step = _ratio(squares, torch.linalg.vecdot(direction, product))
        solution += step * direction
        rest -= step * product
        before, squares = squares, rest.square().sum(1)
        direction = rest + _ratio(squares, before) * direction
    return solution, number, residual


def _ratio(above, below):
    return torch.where(below > 0, above / below, 0.0)[:, None]


def influences(
    batches: Iterable[tuple[list[int], torch.Tensor]], solved: torch.Tensor, means: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    Return max_s phi_i . x_s of features that are read batch by batch, once.

    Args:
        batches (`Iterable`): of k dataset indices and features phi of shape `(k, d)`.
        solved (`torch.Tensor` of shape `(S, d)`): x, float64.
        means (`torch.Tensor` of shape `(S, d)`): g, float64.

    Returns:
        four `torch.Tensor` of shape `(n,)`: dataset indices (int64); the influences, max_s cos(phi_i, g_s), and
        |phi_i| (float64).
    """
    columns: list[array] = [array("q"), array("d"), array("d"), array("d")]
    for indices, features in batches:
        products = column_products(features, torch.cat([solved, means]))
        norms = feature_norms(features)
        scale = norms[:, None] * means.norm(dim=1)
        cosines = torch.where(scale > 0, products[:, len(solved) :] / scale, 0.0).max(1).values
        largest = products[:, : len(solved)].max(1).values
        for column, entries in zip(
            columns, (indices, *(one.tolist() for one in (largest, cosines, norms))), strict=True
        ):
            column.extend(entries)
    dtypes = torch.int64, torch.float64, torch.float64, torch.float64
    return tuple(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))
