"""
How faithful the projection is: scores by `projection_dim` against exact ones, on the demo's pool after its warm-up.

    python benchmarks/projection.py --dataset_path DIR

DIR holds GSM8K's train.jsonl and test.jsonl; without it generated chains stand in. All scores are of the same
rollouts.
"""

import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import harness
import torch
from demo import build_trainer, load

from trl_learnalign import LearnAlignConfig, select_prompts


DIMS = (1024, 4096, 8192, 32768, 65536)


def spearman(a, b) -> float:
    """Rank correlation of two columns; equal values share the mean of their ranks."""
    return float(a.rank().corr(b.rank()))


def compared(ours, theirs) -> dict:
    """
    Of two tables of scores: rank correlation over the prompts learnable in both, and what their top quarters share.
    """
    both = (ours["learnability"] > 0) & (theirs["learnability"] > 0)
    scores, quarter = [table["score"][both] for table in (ours, theirs)], int(both.sum()) // 4
    best, other = (set(column.nlargest(quarter).index) for column in scores)
    shares = {"spearman": spearman(*scores), "top_quarter": len(best & other) / quarter}
    return {"learnable": int(both.sum())} | {name: round(share, 4) for name, share in shares.items()}


def arguments_of(doc: str, name: str):
    """Arguments of the command line and of the demo's functions."""
    arguments = harness.options(doc, dataset_path=harness.DATASET, output=name, threads=1)
    vars(arguments).update(pool=600, num_prompts=128, passes=1, test=1, seed=0)
    return arguments


@contextmanager
def warmed_up(arguments, **changes):
    """
    The demo's trainer after its warm-up and two steps, so that no LoRA B is zero; its pool, and where that is from.
    `changes` are of its arguments.
    """
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as output_dir:
        arguments.output_dir = Path(output_dir)
        pool, _, source = load(arguments)
        trainer = build_trainer("random", pool, arguments)
        vars(trainer.args).update({"max_steps": 4} | changes)
        trainer.train()
        yield trainer, pool, source


def main():
    arguments = arguments_of(__doc__, "projection")
    with warmed_up(arguments) as (trainer, pool, source):
        config = LearnAlignConfig(num_prompts=128, projection_dim=None)
        tables = {
            dim: select_prompts(trainer, replace(config, projection_dim=dim)).scores.to_pandas()
            for dim in (None, *DIMS)
        }
    size = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    exact, rows = tables[None], []
    for dim in DIMS:
        assert tables[dim]["success_rate"].equals(exact["success_rate"])  # the same rollouts
        found = compared(tables[dim], exact)
        learnable = found.pop("learnable")
        rows.append({"dim": dim, **found})
    results = {
        "data": source,
        "pool": len(pool),
        "learnable": learnable,
        "lora_parameters": size,
        "default": LearnAlignConfig().projection_dim,
        "rows": rows,
    }
    harness.report(arguments.output, harness.conditions(**results))


if __name__ == "__main__":
    main()
