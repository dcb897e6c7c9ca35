"""
The demo's comparison over several seeds, with the paper's ablations and a success-rate filter: held-out success after
equal training.

    python benchmarks/demo_arms.py --dataset_path DIR [--seeds 0 1 2 3 4]

DIR holds GSM8K's train.jsonl and test.jsonl; without it generated chains stand in. Every finished run is written to
the output at once, and a later call skips the runs that are there.
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


def main():
    sizes = {"pool": 600, "num_prompts": 128, "passes": 5, "test": 400, "threads": 1}
    files = {"dataset_path": harness.DATASET, "output": "demo_arms", "output_dir": Path("runs/demo_arms")}
    arguments = harness.options(__doc__, **files, seeds=[0, 1, 2, 3, 4], **sizes)
    torch.set_num_threads(arguments.threads)
    pool, test, source = load(arguments)
    conditions = {
        "data": source,
        "samples": SAMPLES,
        **{name: getattr(arguments, name) for name in ("pool", "num_prompts", "passes", "test", "threads")},
        "cpu_count": os.cpu_count(),
        "versions": harness.versions("trl-learnalign"),
    }
    results = harness.read(arguments.output, {"conditions": None})
    if results["conditions"] != conditions:
        results = {"conditions": conditions, "runs": []}
    if "before" not in results:
        results["before"] = round(success(*load_policy(), test).mean().item(), 4)
    for seed in arguments.seeds:
        for arm in ARMS:
            if any(run["seed"] == seed and run["arm"] == arm for run in results["runs"]):
                continue
            started = time.perf_counter()
            run_arguments = argparse.Namespace(**{**vars(arguments), "seed": seed})
            run_arguments.output_dir = arguments.output_dir / f"seed-{seed}"
            after, path, steps = train_arm(arm, pool, test, run_arguments)
            selection = Selection.load(path)
            lengths = selection.scores["completion_length_mean"].to_pandas()
            unranked = arm in ("random", "filter")  # trained on prompts that no ranking chose
            results["runs"].append(
                {
                    "seed": seed,
                    "arm": arm,
                    "success": round(after.mean().item(), 4),
                    "steps": steps,
                    "seconds": round(time.perf_counter() - started, 1),
                    "phases": selection.provenance["seconds"],
                    "learnable": selection.num_learnable(),
                    "pool_length": None if unranked else round(lengths.mean(), 2),
                    "chosen_length": None
                    if unranked
                    else round(lengths[selection.scores["selected"].to_pandas()].mean(), 2),
                }
            )
            results["summary"] = summarize(results["runs"])
            harness.write(arguments.output, results)
            print(json.dumps(results["runs"][-1]), flush=True)
    print(json.dumps(results["summary"], indent=1))


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
