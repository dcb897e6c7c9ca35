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
import sys
import time
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import torch
from demo import POLICY, SAMPLES, load, success, train
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "demo_arms.json")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo_arms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--pool", type=int, default=600)
    parser.add_argument("--num_prompts", type=int, default=128)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool, test, source = load(arguments)
    conditions = {
        "data": source,
        "samples": SAMPLES,
        **{name: getattr(arguments, name) for name in ("pool", "num_prompts", "passes", "test", "threads")},
        "cpu_count": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "trl-learnalign")},
    }
    results = {"conditions": conditions, "runs": []}
    if arguments.output.is_file():
        saved = json.loads(arguments.output.read_text())
        if saved["conditions"] == conditions:
            results = saved
    if "before" not in results:
        tokenizer, model = AutoTokenizer.from_pretrained(POLICY), AutoModelForCausalLM.from_pretrained(POLICY)
        results["before"] = round(success(model.float(), tokenizer, test).mean().item(), 4)
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
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
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
