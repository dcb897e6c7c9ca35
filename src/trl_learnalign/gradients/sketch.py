"""Projection of a gradient over many tensors to one short vector, which nearly preserves inner products."""

import torch

from ..ground.hashing import stable_hash


class Sketch:
    r"""
    Count sketch of the concatenation of named tensors, in float32.

    Every coordinate is multiplied by a random sign and added to one of `dim` buckets, so that
    E[<sketch(a), sketch(b)>] = <a, b>. It is computed as a permuted fold: the coordinates of a tensor are permuted,
    cut into rows of `dim`, and the rows are added. Compared with a scatter this is deterministic on CUDA, fills the
    buckets evenly, and its time does not depend on `dim`. The permutation is shared by all tensors of the same size;
    the signs and the bucket offset are each tensor's own (hashes of its name), so that collisions are independent
    between tensors.

    Args:
        sizes (`dict[str, int]`): number of elements of every tensor, by name.
        dim (`int`): length of the sketch.
        seed (`int`): sketches with the same seed, names and sizes are comparable.
    """

    def __init__(self, sizes: dict[str, int], dim: int, seed: int):
        self.dim = dim
        self.out_dim = dim
        self._seed = seed
        self._longest = max(sizes.values())
        self._tables: dict[object, torch.Tensor] = {}  # made where the first gradients lie that need them
        self._sign_offset = {name: stable_hash("sign", seed, name) % self._longest for name in sizes}
        self._bucket_offset = {name: stable_hash("bucket", seed, name) % dim for name in sizes}

    def _permutation(self, size, device):
        if (size, device) not in self._tables:
            generator = torch.Generator().manual_seed(stable_hash("permutation", self._seed, size))
            self._tables[size, device] = torch.randperm(size, generator=generator).to(device)
        return self._tables[size, device]

    def _signs(self, device):
        if device not in self._tables:
            generator = torch.Generator().manual_seed(stable_hash("signs", self._seed))
            signs = torch.randint(0, 2, (2 * self._longest,), generator=generator, dtype=torch.int8) * 2 - 1
            self._tables[device] = signs.to(device)
        return self._tables[device]

    def add_(self, out: torch.Tensor, name: str, rows: slice, gradients: torch.Tensor) -> None:
        """
        Add the sketch of one tensor's gradients.

        Args:
            out (`torch.Tensor` of shape `(n, dim)`): sketches under way, on the device of `gradients`.
            name (`str`): name of the tensor.
            rows (`slice`): the rows of `out` that the gradients belong to.
            gradients (`torch.Tensor` of shape `(rows, size)`): a row per prompt.
        """
        size = gradients.shape[1]
        start = self._sign_offset[name]
        signed = gradients.float() * self._signs(gradients.device)[start : start + size]
        permuted = signed[:, self._permutation(size, gradients.device)]
        whole = size // self.dim * self.dim
        shift = self._bucket_offset[name]
        if whole:
            folded = permuted[:, :whole].view(len(gradients), -1, self.dim).sum(1)
            out[rows] += folded.roll(shift, dims=1)
        rest = size - whole
        if rest:
            first = min(rest, self.dim - shift)
            out[rows, shift : shift + first] += permuted[:, whole : whole + first]
            out[rows, : rest - first] += permuted[:, whole + first :]


class Concatenation:
    """The identity in place of a [`Sketch`]: the gradients of all tensors one after another, `out_dim` in all."""

    def __init__(self, sizes: dict[str, int]):
        self._start = {}
        position = 0
        for name, size in sizes.items():
            self._start[name] = position
            position += size
        self.out_dim = position

    def add_(self, out: torch.Tensor, name: str, rows: slice, gradients: torch.Tensor) -> None:
        """Add one tensor's gradients, with the arguments of [`Sketch.add_`]."""
        start = self._start[name]
        out[rows, start : start + gradients.shape[1]] += gradients.float()
