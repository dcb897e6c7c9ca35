"""
Three studies beside the grid: how it was tuned, what a selection depends on, and how long its ranking lasts.

    python benchmarks/gsm8k_equations/studies.py --studies tuning [--dataset_path DIR]
    python benchmarks/gsm8k_equations/studies.py --studies sensitivity persistence [--dataset_path DIR] [--seeds 0 1]

- `tuning`: learning rate and number of passes, chosen on random prompts and on train rows alone, before any arm is
  looked at. The last 600 train rows are held out; the policy trains on 300 and then on 500 random prompts of the
  others, and is looked at on the held-out rows after the warm-up and after 1, 2 and 4 passes. Test rows are not read.
- `sensitivity`: how far a selection depends on num_rollouts, projection_dim, the warm-up and chance. 800 prompts are
  scored in several ways. Each is compared with the defaults (8 rollouts, 300 warm-up prompts, d = 32,768, the grid's
  first seed): rank correlations over the prompts that are learnable in both, and the Jaccard index of the best 200.
  Success rates from 32 other rollouts stand for the true ones. Trains nothing but the warm-ups.
- `persistence`: how long a ranking lasts, at the grid's learning rate and at a fifth of it. For every seed of the
  grid, 800 prompts of the pool are scored from fresh rollouts by the policy that the pool was scored with, and after
  16 and 63 steps of training on the grid's 500 random prompts. Each is compared with the grid's own scores of these
  prompts. What the policy at step 0 disagrees with itself is the noise of eight rollouts; what comes on top of that is
  training. Seeds that the results hold already are left out.
"""

import argparse
import math
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grid import (
    CHUNK,
    CURVES_AT,
    RESULTS,
    SAMPLES,
    SLOW,
    WARMUP,
    Look,
    adapter_after,
    build_trainer,
    choose,
    conditions_of,
    scores,
    warm_up,
)
from harness import DATASET, cell, options, read, write
from policies import read_equations
from projection import spearman
from transformers import TrainerCallback

from trl_learnalign import LearnAlignConfig, select_prompts


HELD_OUT, SIZE, TUNED_ON, PASSES = 600, 500, 100, (1, 2, 4)  # of `tuning`; the third is its seed
PROMPTS, BEST, TRUE_ROLLOUTS = 800, 200, 32
WAYS = {  # seed, prompts of the warm-up, settings
    "another seed": (1, WARMUP, {}),
    "4 rollouts": (0, WARMUP, {"num_rollouts": 4}),
    "16 rollouts": (0, WARMUP, {"num_rollouts": 16}),
    "d = 1,024": (0, WARMUP, {"projection_dim": 1024}),
    "d = 8,192": (0, WARMUP, {"projection_dim": 8192}),
    "exact gradients": (0, WARMUP, {"projection_dim": None}),
    "no warm-up": (0, 0, {}),
    "100 warm-up prompts": (0, 100, {}),
    "1,000 warm-up prompts": (0, 1000, {}),
}
STEPS = (16, 63)  # of `persistence`


def scored(adapter, prompts, seed, arguments, **settings):
    """The scores of the prompts, as the grid makes them but for these settings."""
    trainer = build_trainer(adapter, prompts, 1, seed, arguments)
    config = LearnAlignConfig(num_prompts=BEST, **settings)
    return select_prompts(trainer, config).scores.to_pandas().set_index("index")


def chosen(rows) -> set[int]:
    return set(rows[rows["learnability"] > 0].sort_values("score", ascending=False).index[:BEST])


def agreement(table, base) -> dict[str, float]:
    """Compare two tables of the same prompts."""
    ours, theirs = chosen(table), chosen(base)
    both = (table["learnability"] > 0) & (base["learnability"] > 0)
    result = {
        f"spearman_{column}": spearman(table.loc[both, column], base.loc[both, column])
        for column in ("score", "alignment")
    }
    result["spearman_learnability"] = spearman(table["learnability"], base["learnability"])
    result["jaccard"] = len(ours & theirs) / len(ours | theirs)
    result["learnable"] = (table["learnability"] > 0).mean()
    # Chosen for an alignment that is high by chance? The best of `base`, as they were measured and as `table` sees
    # them
    kept = [index for index in sorted(theirs) if both[index]]
    result["alignment_of_best"] = base.loc[kept, "alignment"].mean()
    result["alignment_of_best_seen_again"] = table.loc[kept, "alignment"].mean()
    result["alignment_of_all"] = table.loc[table["learnability"] > 0, "alignment"].mean()
    return {name: round(float(value), 4) for name, value in result.items()}


def tuned(pool, held_out, arguments) -> dict:
    """Success after each number of passes."""
    steps = {math.ceil(passes * SIZE / CHUNK): passes for passes in PASSES}
    prompts = pool.select(random.Random(TUNED_ON).sample(range(len(pool)), SIZE))
    adapter, look = warm_up(TUNED_ON, pool, arguments), Look(held_out, steps)
    build_trainer(adapter, prompts, max(steps), TUNED_ON, arguments, [look]).train()
    return {str(steps[one["step"]]): round(sum(one["sampled"]) / HELD_OUT / SAMPLES, 4) for one in look.looks}


def tuning(rows, source, arguments):
    folder = arguments.output_dir / "tune"
    pool, held_out = rows.select(range(len(rows) - HELD_OUT)), rows.select(range(len(rows) - HELD_OUT, len(rows)))
    settings = {"data": source, "held_out": HELD_OUT, "prompts": SIZE, "seed": TUNED_ON}
    for rate in arguments.learning_rates:
        own = argparse.Namespace(learning_rate=rate, output_dir=folder / f"{rate:.0e}")
        print(rate, cell(folder / f"{rate:.0e}.json", settings, tuned, pool, held_out, own), flush=True)
    runs = {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
    for found in runs.values():
        del found["conditions"]
    write(RESULTS / "tuning.json", {**settings, "runs": runs})


def sensitivity(pool, source, arguments):
    folder = arguments.output_dir / "sensitivity"
    own = argparse.Namespace(learning_rate=arguments.learning_rate, passes=None, output_dir=folder)
    prompts = pool.select(random.Random(0).sample(range(len(pool)), PROMPTS))

    def table_of(seed, warmup, settings):
        path, steps = folder / f"warm-up-{warmup}", math.ceil(warmup / CHUNK)
        return scored(adapter_after(path, steps, 0, pool, own) if steps else None, prompts, seed, own, **settings)

    truth = table_of(2, WARMUP, {"num_rollouts": TRUE_ROLLOUTS, "score": "learnability"})
    base, rows = table_of(0, WARMUP, {}), []
    for name, way in {"the defaults": None, **WAYS}.items():
        table = table_of(*way) if way else base
        rows.append({"way": name, **agreement(table, base)})
        # Chosen for a V that is high by chance? `truth` comes from other rollouts of the default policy
        ours = sorted(chosen(table))
        for key, seen in {"chosen_learnability": table, "chosen_true_learnability": truth}.items():
            rows[-1][key] = round(float(seen.loc[ours, "learnability"].mean()), 4)
        print(rows[-1], flush=True)
    result = {
        "prompts": PROMPTS,
        "best": BEST,
        "true_rollouts": TRUE_ROLLOUTS,
        "pool_true_learnability": round(float(truth["learnability"].mean()), 4),
        "spearman_learnability_with_true": round(spearman(base["learnability"], truth["learnability"]), 4),
        "rows": rows,
        "conditions": conditions_of(own, pool, [], source),
    }
    write(RESULTS / "sensitivity.json", result)


class Keep(TrainerCallback):
    """The adapter after each of `STEPS`."""

    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in STEPS:
            model.save_pretrained(self.path / f"step-{state.global_step}")


def rows_of(seed, pool, arguments) -> list[dict]:
    """How a ranking lasts, of one seed."""
    places = random.Random(seed).sample(range(len(pool)), PROMPTS)
    prompts, warm = pool.select(places), warm_up(seed, pool, arguments)
    base = scores(seed, False, pool, arguments).scores.to_pandas().set_index("index").loc[places]
    base, rows = base.reset_index(drop=True), []

    def compare(rate, step, adapter):
        # Not with the seed of the grid's own rollouts
        found = agreement(scored(adapter, prompts, 1000 + seed, arguments), base)
        rows.append({"seed": seed, "rate": rate, "step": step, **found})
        print(rows[-1], flush=True)

    compare(0.0, 0, warm)
    dataset = pool.select(choose("random", CURVES_AT, seed, pool, arguments))
    for rate in (1.0, SLOW):
        path = arguments.output_dir / f"seed-{seed}" / f"persistence-{rate}"
        if not all((path / f"step-{step}" / "adapter_model.safetensors").is_file() for step in STEPS):
            build_trainer(warm, dataset, max(STEPS), seed, arguments, [Keep(path)], rate=rate).train()
        for step in STEPS:
            compare(rate, step, path / f"step-{step}")
    return rows


def persistence(pool, source, arguments):
    folder = arguments.output_dir / "gsm8k_equations"
    own = argparse.Namespace(learning_rate=arguments.learning_rate, passes=None, output_dir=folder)
    conditions = {**conditions_of(own, pool, [], source), "prompts": PROMPTS, "best": BEST}
    saved = read(RESULTS / "persistence.json", {"conditions": None})
    rows = saved["rows"] if saved["conditions"] == conditions else []
    for seed in arguments.seeds:
        if not any(row["seed"] == seed for row in rows):
            rows = rows + rows_of(seed, pool, own)
            write(RESULTS / "persistence.json", {"rows": rows, "conditions": conditions})


STUDIES = {"tuning": tuning, "sensitivity": sensitivity, "persistence": persistence}


def main():
    rates = {"learning_rate": 1e-3, "learning_rates": [2e-4, 5e-4, 1e-3, 2e-3]}
    files = {"dataset_path": DATASET, "output_dir": (Path("runs"), "with a folder of each study, and of the grid")}
    studies = {"studies": [*STUDIES], "seeds": [0, 1, 2, 3, 4]}
    arguments = options(__doc__, {"studies": STUDIES}, **files, **studies, **rates)
    rows, _, source = read_equations(arguments.dataset_path)
    for name in arguments.studies:
        STUDIES[name](rows, source, arguments)


if __name__ == "__main__":
    main()
