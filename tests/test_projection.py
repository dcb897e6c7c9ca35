"""The sketch: linear, unbiased, the same everywhere, and faithful."""

import torch

from trl_learnalign.gradients.sketch import Concatenation, Sketch
from trl_learnalign.ground.hashing import stable_hash


SIZES = {"a.weight": 1000, "b.weight": 37, "c.weight": 4096, "d.weight": 1000}


def sketch_all(tensors, dim, seed=0):
    sketch = Sketch(SIZES, dim, seed)
    out = torch.zeros(len(next(iter(tensors.values()))), dim)
    for name, gradients in tensors.items():
        sketch.add_(out, name, slice(None), gradients)
    return out


def dense(dim, seed=0):
    """The matrix of a sketch, found by sketching every unit vector."""
    blocks = []
    for name, size in SIZES.items():
        out = torch.zeros(size, dim)
        Sketch(SIZES, dim, seed).add_(out, name, slice(None), torch.eye(size))
        blocks.append(out)
    return torch.cat(blocks)


def test_every_coordinate_goes_to_one_bucket_with_a_sign():
    matrix = dense(64)
    assert (matrix.abs().sum(1) == 1).all() and ((matrix != 0).sum(1) == 1).all()
    assert 0.45 < (matrix.sum(1) > 0).float().mean() < 0.55


def test_sketch_equals_the_dense_product():
    torch.manual_seed(0)
    for dim in (16, 64, 1000, 5000):  # shorter and longer than the tensors, dividing their sizes and not
        tensors = {name: torch.randn(3, size) for name, size in SIZES.items()}
        expected = torch.cat(list(tensors.values()), 1) @ dense(dim)
        torch.testing.assert_close(sketch_all(tensors, dim), expected, rtol=1e-4, atol=1e-4)


def test_tensors_of_equal_size_do_not_collide_alike():
    matrix = dense(64)
    a, d = matrix[:1000], matrix[-1000:]
    assert (a.abs().argmax(1) == d.abs().argmax(1)).float().mean() < 0.1
    same_bucket = a.abs().argmax(1)[:, None] == a.abs().argmax(1)[None]
    products_a = (a.sum(1)[:, None] * a.sum(1)[None])[same_bucket]
    products_d = (d.sum(1)[:, None] * d.sum(1)[None])[same_bucket]
    assert 0.4 < (products_a == products_d).float().mean() < 0.6  # signs of a pair are independent between tensors


def test_inner_products_are_unbiased_and_close():
    torch.manual_seed(0)
    tensors = {name: torch.randn(2, size) + 0.5 for name, size in SIZES.items()}
    full = torch.cat(list(tensors.values()), 1)
    exact = (full[0] @ full[1]).item()
    products = []
    for seed in range(200):
        out = sketch_all(tensors, 256, seed)
        products.append((out[0] @ out[1]).item())
    products = torch.tensor(products)
    assert abs(products.mean().item() - exact) < 4 * products.std().item() / 200**0.5
    assert products.std().item() < 0.2 * full[0].norm().item() * full[1].norm().item()


def test_outlier_channels_do_not_collide():
    """A few channels a hundred times greater than the rest, at a stride that divides d, keep their cosine."""
    torch.manual_seed(0)
    gradients = torch.randn(2, 4096)
    gradients[:, ::64] *= 100
    out = sketch_all({"c.weight": gradients}, 1024)
    exact = torch.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert abs(torch.cosine_similarity(out[0], out[1], dim=0) - exact) < 0.25


def test_order_of_tensors_and_split_over_microbatches_do_not_matter():
    torch.manual_seed(0)
    tensors = {name: torch.randn(2, size) for name, size in SIZES.items()}
    reverse = dict(reversed(tensors.items()))
    torch.testing.assert_close(sketch_all(tensors, 128), sketch_all(reverse, 128))
    parts = [{name: values * share for name, values in tensors.items()} for share in (0.25, 0.75)]
    torch.testing.assert_close(sum(sketch_all(part, 128) for part in parts), sketch_all(tensors, 128))


def test_concatenation_is_the_identity():
    sink = Concatenation(SIZES)
    tensors = {name: torch.randn(2, size) for name, size in SIZES.items()}
    out = torch.zeros(2, sink.out_dim)
    for name in reversed(SIZES):
        sink.add_(out, name, slice(None), tensors[name])
    assert torch.equal(out, torch.cat(list(tensors.values()), 1))


def test_hash_is_the_same_in_every_process():
    assert stable_hash("permutation", 0, 1000) == 3459800750125602462
    assert stable_hash("a", "b") != stable_hash("ab")
