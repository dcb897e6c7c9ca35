"""
How fast what is known of the policy should fade: success predicted one chunk ahead, in runs that were made.

    python benchmarks/chat/half_life.py --runs runs/chat/short/random-0 runs/chat/short/online-0

The rows and successes of a run's `steps.jsonl` are shown to the predictor chunk by chunk: with one fit of several
half-lives and ridges, and with the second, quick fit around it that LearnAlign online has. Features are mean hidden
states after half of the layers, as 64 principal components. Printed are the squared error and the cross-entropy of
predicted success, after the first 64 groups.
"""

import json
import sys
from functools import cache
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from harness import options
from model import load
from pages import table
from policies import GROUP
from questions import pool

from trl_learnalign.curriculum import OnlineSettings
from trl_learnalign.curriculum.predictor import SuccessPredictor


HALF_LIVES = (50, 800), (25, 400), (12, 200), (12, 100), (6, 50), (3, 25)  # optimizer steps, groups
ONCE = {f"{a} steps, {b} groups": {"half_life_steps": a, "half_life_groups": b} for a, b in HALF_LIVES}
QUICK = {f"{speed:g}": {"quick_speed": speed} for speed in (8.0, 16.0, 32.0, 64.0)}  # times as fast
TABLES = {"half-life": (ONCE, "ridge", (1.0, 3.0, 10.0)), "quick fit": (QUICK, "quick_ridge", (3.0, 10.0, 30.0))}
FIRST = 64  # groups that are not counted


@cache
@torch.no_grad()
def features(directory, name, seed) -> np.ndarray:
    """What is known of each prompt of a pool, of shape (N, 65), the first a column of ones."""
    model, tokenizer = load(directory)
    base, prompts = model.eval().model, list(pool(name, seed)["prompt"])
    base.layers = base.layers[: len(base.layers) // 2]
    order = np.argsort([len(prompt[-1]["content"]) for prompt in prompts])
    found = np.zeros((len(prompts), model.config.hidden_size))
    kwargs = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    for rows in np.array_split(order, len(order) // 64 + 1):
        batch = tokenizer.apply_chat_template([prompts[row] for row in rows], **kwargs)
        mask = batch["attention_mask"][..., None]
        states = base(**batch, use_cache=False).last_hidden_state.float()
        found[rows] = ((states * mask).sum(1) / mask.sum(1)).numpy()
    u, s, _ = np.linalg.svd(found - found.mean(0), full_matrices=False)
    parts = u[:, :64] * s[:64]
    return np.concatenate([np.ones((len(parts), 1)), parts / parts[:, 0].std()], axis=1).astype(np.float32)


def errors(x, steps, settings) -> tuple[float, float]:
    """Squared error and cross-entropy of a group's success, predicted before its chunk."""
    predictor, found, seen = SuccessPredictor(x, settings), [], 0
    for number, step in enumerate(steps):
        rows, rates = np.array(step["rows"]), np.array(step["successes"]) / GROUP
        q = predictor.predict(rows) if seen else np.full(len(rows), 0.5)
        if seen >= FIRST:
            sure = np.clip(q, 1e-3, 1 - 1e-3)
            entropy = -rates * np.log(sure) - (1 - rates) * np.log(1 - sure)
            found += zip((rates - q) ** 2, entropy, strict=True)
        clock = min(number / settings.half_life_steps, seen / settings.half_life_groups)
        trials = np.full(len(rows), float(GROUP))
        numbers = np.arange(seen, seen + len(rows))
        predictor.observe(numbers, rows, np.full(len(rows), clock), rates * GROUP, trials, q)
        seen += len(rows)
    return tuple(np.mean(found, axis=0))


def compared(x, steps, head, ways, name, ridges) -> str:
    """A table of these errors: a row for each way, a column for each ridge, a setting of that name."""

    def cell(way, ridge):
        return "{:.4f}, {:.3f}".format(*errors(x, steps, OnlineSettings(**way, **{name: ridge})))

    rows = [[text, *(cell(way, ridge) for ridge in ridges)] for text, way in ways.items()]
    return table([head, *(f"ridge {ridge:g}" for ridge in ridges)], rows)


def main():
    arguments = options(__doc__, runs=["runs/chat/short/random-0"], model=Path("runs/chat/model"))
    for folder in map(Path, arguments.runs):
        x = features(arguments.model, folder.parent.name, int(folder.name.rpartition("-")[2]))
        steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        print(f"\n{folder}", *(compared(x, steps, head, *way) for head, way in TABLES.items()), sep="\n\n")


if __name__ == "__main__":
    main()
