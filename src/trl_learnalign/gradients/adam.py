"""The step that Adam would take for a gradient alone, projected."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .sketch import Concatenation, Sketch


class Moments(NamedTuple):
    """
    Adam's state of one weight.

    Attributes:
        mean, square (`torch.Tensor` of the shape of the weight): `exp_avg` and `exp_avg_sq`, of the loss.
        steps (`int`): so far.
        betas (`tuple[float, float]`): of its group.
        eps (`float`): the same.
    """

    mean: torch.Tensor
    square: torch.Tensor
    steps: int
    betas: tuple[float, float]
    eps: float


class AdamDirections:
    r"""
    Turns gradients g of an objective into Adam's steps, each as if it were the next of training (LESS, arXiv
    2402.04333, section 3.1). Elementwise, with m and v after t steps, of the objective (that of the loss is -m),

        Gamma = m' / (sqrt(v') + eps)    m' = (beta_1 m + (1 - beta_1) g) / (1 - beta_1^(t + 1))
                                         v' = (beta_2 v + (1 - beta_2) g^2) / (1 - beta_2^(t + 1))

    PyTorch's Adam takes this step, without its learning rate. The code of LESS has neither divisor, which no cosine
    depends on but for eps, and eps under the root. Gradients are not clipped, as there.

    Args:
        sizes (`dict[str, int]`): number of elements of every layer's gradient, in their order.
        moments (`Mapping[str, Moments]`): of every layer, by the same names.
        dim (`int` or `None`): length of a projected step; `None` for the exact one.
        seed (`int`): of the projection, which is that of [`PromptGradients`].
    """

    def __init__(self, sizes: dict[str, int], moments: Mapping[str, Moments], dim: int | None, seed: int):
        self._sizes, self._moments = sizes, moments
        self._sink = Concatenation(sizes) if dim is None else Sketch(sizes, dim, seed)
        self.out_dim = self._sink.out_dim

    def __call__(self, gradients: torch.Tensor) -> torch.Tensor:
        """
        Return the projected steps.

        Args:
            gradients (`torch.Tensor` of shape `(n, sum of sizes)`): exact ones, of whole prompts.

        Returns:
            `torch.Tensor` of shape `(n, out_dim)`, float32, on the CPU.
        """
        device = next(iter(self._moments.values())).mean.device
        out = torch.zeros(len(gradients), self.out_dim, device=device)
        parts = gradients.split(list(self._sizes.values()), 1)
        for name, gradient in zip(self._sizes, parts, strict=True):
            mean, square, steps, (beta_1, beta_2), eps = self._moments[name]
            gradient = gradient.to(mean.device)
            mean = ((1 - beta_1) * gradient - beta_1 * mean.flatten().float()) / (1 - beta_1 ** (steps + 1))
            square = beta_2 * square.flatten().float() + (1 - beta_2) * gradient.square()
            square /= 1 - beta_2 ** (steps + 1)
            self._sink.add_(out, name, slice(None), (mean / (square.sqrt_() + eps)).to(device))
        return out.cpu()
