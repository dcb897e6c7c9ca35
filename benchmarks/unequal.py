"""
Per-prompt gradients of groups of unequal size, as windows of a real pool leave them in a microbatch, relative to a
plain backward.

    python benchmarks/unequal.py [--device cuda]

The same rows three times: in groups of equal size; in groups of 1 to 8 rows, in the order in which they are packed;
and in an order in which no two neighbours are of one size, so that each prompt's gradient is computed by itself.
"""

import tempfile

import harness
import torch
from gradients import measure
from peers import DIM, our_way
from workload import GROUP, build_trainer, conditions, draw_groups


SIZES = [size for size in range(1, GROUP + 1) for _ in range(4)]  # of 32 groups, 144 rows


def regrouped(groups, sizes):
    """The rows of the groups in groups of other sizes."""
    rows = iter([row for group in groups for row in group])
    return [[next(rows) for _ in range(size)] for size in sizes]


def main():
    arguments = harness.options(__doc__, {"device": ("cpu", "cuda")}, device="cpu", rounds=9)
    arguments.dtype, arguments.shape, arguments.rank, arguments.tokens = torch.float32, "small", 8, 64
    arguments.prompts = sum(SIZES) // GROUP
    orders = {
        "groups of equal size": [GROUP] * arguments.prompts,
        "groups of 1 to 8 rows, as they are packed": SIZES,
        "the same, one prompt at a time": [*range(1, GROUP + 1)] * (len(SIZES) // GROUP),
    }
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments, scratch)
        rows = draw_groups(arguments)
        for name, sizes in orders.items():
            _, found = measure({name: our_way(DIM)}, trainer, regrouped(rows, sizes), arguments)
            results |= found
    found = conditions(arguments, "rounds", "tokens", prompts=len(SIZES), rows=sum(SIZES))
    harness.report(harness.RESULTS / f"unequal_{arguments.device}.json", {"conditions": found, "ways": results})


if __name__ == "__main__":
    main()
