"""
The demo's comparison over several seeds, with the paper's ablations and a success-rate filter: held-out success after
equal training.

    python benchmarks/demo_arms.py --dataset_path DIR [--seeds 0 1 2 3 4]

DIR holds GSM8K's train.jsonl and test.jsonl; without it generated chains stand in. A finished run is a file in the
output directory, which a later call leaves out.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import harness
import torch
from demo import SAMPLES, load, success, train
from policies import load_policy

from trl_learnalign import LearnAlignSampler, Selection


ARMS = ("random", "filter", "learnability", "alignment", "learnalign")


class FilterSampler(LearnAlignSampler):
    """Trains on random prompts among all that are learnable, as many as a selection has."""

    def append(self, start_chunk, indices):
        table = Selection.load(self.directory).to_pandas().query("learnability > 0")
        super().append(start_chunk, table.sample(len(indices), random_state=self.layout.seed).index.tolist())


def train_arm(arm, pool, test, arguments):
    if arm != "filter":
        return train(arm, pool, test, arguments)
    arguments.output_dir /= "filter"  # `learnability` has a selection beside it
    FilterSampler.directory = arguments.output_dir / "learnability" / "learnalign" / "step-000002"
    return train("learnability", pool, test, arguments, FilterSampler)


def run(seed, arm, pool, test, arguments) -> dict:
    started = time.perf_counter()
    folder = arguments.output_dir / f"seed-{seed}"
    own = argparse.Namespace(**vars(arguments) | {"seed": seed, "output_dir": folder})
    after, path, steps = train_arm(arm, pool, test, own)
    selection = Selection.load(path)
    lengths, chosen = (selection.scores[name].to_pandas() for name in ("completion_length_mean", "selected"))
    means = lengths.mean(), lengths[chosen].mean()
    means = (None, None) if arm in ("random", "filter") else (round(mean, 2) for mean in means)  # no ranking chose
    found = {"seed": seed, "arm": arm, "success": round(after.mean().item(), 4), "steps": steps}
    found |= {"seconds": round(time.perf_counter() - started, 1), "phases": selection.provenance["seconds"]}
    found |= {"learnable": selection.num_learnable()}
    return found | dict(zip(("pool_length", "chosen_length"), means, strict=True))


def main():
    sizes = {"pool": 600, "num_prompts": 128, "passes": 5, "test": 400, "threads": 1}
    files = {"dataset_path": harness.DATASET, "output": "demo_arms", "output_dir": Path("runs/demo_arms")}
    arguments = harness.options(__doc__, **files, seeds=[0, 1, 2, 3, 4], **sizes)
    torch.set_num_threads(arguments.threads)
    pool, test, source = load(arguments)
    conditions = {"data": source, "samples": SAMPLES, **{name: getattr(arguments, name) for name in sizes}}
    conditions |= {"cpu_count": os.cpu_count(), "versions": harness.versions("trl-learnalign")}
    runs = []
    for seed in arguments.seeds:
        for arm in ARMS:
            file = arguments.output_dir / f"seed-{seed}" / f"{arm}.json"
            harness.cell(file, conditions, run, seed, arm, pool, test, arguments)
            if found := harness.read(file):
                del found["conditions"]
                runs.append(found)
                print(json.dumps(found), flush=True)
    results = {"conditions": conditions, "runs": runs}
    results["before"] = round(success(*load_policy(), test).mean().item(), 4)
    harness.write(arguments.output, results | {"summary": summarize(runs)})
    print(json.dumps(summarize(runs), indent=1))


def summarize(runs):
    """Per arm: mean success over seeds, and the paired difference from random with its standard error over seeds."""
    summary = {}
    for arm in ARMS:
        by_seed = {run["seed"]: run["success"] for run in runs if run["arm"] == arm}
        random = {run["seed"]: run["success"] for run in runs if run["arm"] == "random"}
        gaps = [by_seed[seed] - random[seed] for seed in by_seed if seed in random]
        if by_seed:
            summary[arm] = {
                "seeds": len(by_seed),
                "success": round(statistics.fmean(by_seed.values()), 4),
                "over_random": round(statistics.fmean(gaps), 4) if gaps else None,
                "standard_error": round(statistics.stdev(gaps) / len(gaps) ** 0.5, 4) if len(gaps) > 1 else None,
            }
    return summary


if __name__ == "__main__":
    main()
