"""
What the page of the evidence is made of: the results, success rates of runs, and differences with their intervals.
"""

from functools import cache

import harness
import numpy as np
import pandas as pd


RESULTS = harness.RESULTS / "evidence"
WARMUP_STEPS, RESAMPLES = 19, 4000
NAMES = {
    "none": "nothing",
    "warm-up": "the warm-up only",
    "random": "random prompts",
    "filter": "success-rate filter",
    "learnability": "learnability alone",
    "alignment": "alignment alone",
    "learnalign": "LearnAlign",
    "random cold": "random prompts, no warm-up",
    "learnalign cold": "LearnAlign, no warm-up",
    "full": "all prompts",
    "staged": "LearnAlign, staged",
    "learnalign distinct": "LearnAlign, no step twice",
}
COMPARED = ("random", "filter", "learnability", "alignment", "learnalign")
SLOW_ARMS = ("random", "filter", "learnability", "learnalign")  # arms with " slow" behind them


@cache
def load(name: str):
    return harness.read(RESULTS / name) if name.endswith(".json") else pd.read_parquet(RESULTS / name)


def sizes() -> list[int]:
    """Sizes at which LearnAlign and its rivals have a seed in common."""
    cells = {tuple(cell) for cell in load("runs.json")["cells"]}
    found = {cell[:2] for cell in cells if cell[2] == "learnalign"}
    return sorted({size for size, seed in found if all((size, seed, arm) in cells for arm in SLOW_ARMS)})


def full_size() -> int:
    """The longest runs on all prompts, which were also looked at where shorter ones end."""
    looks = load("looks.parquet")
    return looks[looks.arm == "full"]["size"].max()


def steps_of(size: int) -> int:
    conditions = load("runs.json")["conditions"]
    return int(np.ceil(conditions["passes"] * size / conditions["chunk"]))


@cache
def measured(arm: str, size: int, step: int, way: str = "sampled") -> dict[int, np.ndarray]:
    """Success rate of every seed on each test row after `step` steps, where all rows were looked at."""
    looks = load("looks.parquet")
    rows = looks[(looks.arm == arm) & (looks["size"] == size) & (looks.step == step) & (looks.samples == 8)]
    return {row.seed: np.asarray(getattr(row, way)) / (8 if way == "sampled" else 1) for row in rows.itertuples()}


@cache
def resamples(seeds: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the seeds and of the rows in each resample, the same for all that have as many."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in (seeds, rows))


def difference(ours: dict, theirs: dict) -> tuple[float, float, float, int] | None:
    """
    Mean paired difference and its 95 % interval by a bootstrap over seeds and test rows together; the number of seeds.
    One seed leaves the rows alone to be resampled.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    table = np.stack([ours[seed] - theirs[seed] for seed in seeds])
    by_seed, by_row = resamples(*table.shape)
    low, high = np.quantile(np.einsum("bs,sr,br->b", by_seed, table, by_row, optimize=True), (0.025, 0.975))
    return table.mean(), low, high, len(seeds)


def gap(arm: str, base: str, size: int, step: int | None = None) -> tuple[float, float, float, int] | None:
    """[`difference`] of two arms, after all of their steps or after `step`."""
    step = steps_of(size) if step is None else step
    return difference(measured(arm, size, step), measured(base, size, step))


@cache
def learnable() -> pd.DataFrame:
    """The scores of the prompts that are learnable after the warm-up."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.success_rate > 0) & (table.success_rate < 1)]
    return table.assign(learnability=table.success_rate * (1 - table.success_rate))


def points(value: tuple | None) -> str:
    if value is None:
        return ""
    middle, low, high = (f"{100 * number:+.1f}".replace("-0.0", "+0.0") for number in value[:3])
    return f"{middle} [{low}, {high}]"


def mean(values: dict) -> str:
    return f"{100 * np.mean([rows.mean() for rows in values.values()]):.1f}" if values else ""
