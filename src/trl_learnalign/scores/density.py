"""Densities of prompts: the number of prompts that each is like, by a Gaussian kernel."""

import math

import torch


_SAMPLE = 2048  # prompts whose distances decide the width
_PAIRS = 1 << 20  # that are in memory at a time, so few that a cache holds them
_SAME = 1e-6  # of the largest squared distance: what is nearer is the same, up to rounding


def width(points: torch.Tensor) -> float:
    """
    Return h of the kernel exp(-|x - y|^2 / h): the median squared distance over ln n, of those between points that
    differ (arXiv 1608.04471, section 5). At the median distance the kernel is 1 / n: all others together then weigh
    about as much as the point itself, so that near-duplicates stand out however large the pool is.

    Args:
        points (`torch.Tensor` of shape `(n, d)`): of a larger number evenly spaced ones are looked at.
    """
    number = len(points)
    some = points[torch.arange(min(number, _SAMPLE)) * number // max(1, min(number, _SAMPLE))]
    squares = torch.pdist(some.double()).square()
    squares = squares[squares > _SAME * squares.max()] if len(squares) else squares
    return squares.median().item() / math.log(number) if len(squares) else 1.0


def densities(points: torch.Tensor, h: float, places: torch.Tensor | None = None) -> torch.Tensor:
    """
    Return density_i = sum_j exp(-|x_i - x_j|^2 / h), in [1, n]: the number of points like x_i, with itself. Density
    sampling takes points by the inverse (arXiv 2402.09668). Exact, in blocks, so that no n x n matrix is in memory:
    random Fourier features would need about n of them, since they are off by the root of n over their number.

    Args:
        points (`torch.Tensor` of shape `(n, d)`): x, float32, on the device to compute on.
        h (`float`): see [`width`].
        places (`torch.Tensor` of shape `(m,)`, *optional*): the i that are asked for; all by default.

    Returns:
        `torch.Tensor` of shape `(m,)`, float64, on the CPU.
    """
    points = (points - points.mean(0)) / math.sqrt(h)  # smaller numbers, less rounding
    squares = points.square().sum(1)
    places = torch.arange(len(points)) if places is None else places
    found = [torch.zeros(0, dtype=torch.float64)]
    for part in places.to(points.device).split(max(1, _PAIRS // max(1, len(points)))):
        kernel = torch.addmm(-squares, points[part], points.T, alpha=2).sub_(squares[part, None]).clamp_(max=0)
        kernel[torch.arange(len(part), device=part.device), part] = 0
        found.append(kernel.exp_().sum(1).cpu().double())
    return torch.cat(found)
