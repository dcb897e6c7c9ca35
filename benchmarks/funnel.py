"""
A thousand prompts of a million: columns, a forward, rollouts. Survivors, seconds and memory of each stage.

    python benchmarks/funnel.py [--prompts 5000] [--candidate_score column:quality confidence]

The prompts are generated chains with a made-up column `quality`, read from a file as those of a large dataset are; the
policy is the tiny one. Each score of `--candidate_score` leaves a tenth of its prompts, and learnability, by a race,
chooses a tenth of the last. Memory is the most that the process had resident, above what it had before the selection.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from workload import ROOT, save_results

from trl_learnalign import LearnAlignConfig, Selection, select_prompts


sys.path.insert(0, str(ROOT / "examples"))

from demo import POLICY
from equations import equations_reward, generate_chains


BLOCK = 10_000  # prompts that are generated at once


def rows_of(num):
    draws = random.Random(0)
    for start in range(0, num, BLOCK):
        for row in generate_chains(min(BLOCK, num - start), seed=1000 + start):
            yield row | {"quality": draws.random()}


def build_trainer(dataset, directory):
    args = GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=56,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        reward_funcs=equations_reward,
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(POLICY),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def resident():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--candidate_score", nargs="+", default=["column:quality", "confidence"])
    parser.add_argument("--rollouts", choices=("all", "racing"), default="racing")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "funnel.json")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    warnings.filterwarnings("ignore", category=FutureWarning)
    sizes = [arguments.prompts // 10 ** (stage + 1) for stage in range(len(arguments.candidate_score))]
    config = LearnAlignConfig(
        num_prompts=max(sizes[-1] // 10, 1),
        num_rollouts=8,
        score="learnability",
        rollouts=arguments.rollouts,
        candidate_score=arguments.candidate_score,
        candidate_prompts=sizes,
        answer_column="answer",
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        dataset = Dataset.from_generator(rows_of, gen_kwargs={"num": arguments.prompts}, cache_dir=scratch)
        trainer = build_trainer(dataset, Path(scratch) / "run")
        before, started = resident(), time.perf_counter()
        selection = select_prompts(trainer, config)
        seconds, most = time.perf_counter() - started, resident()
        step = Path(scratch) / "run" / "learnalign" / "step-000000"
        assert Selection.load(step).indices == selection.indices
        written = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    provenance = selection.provenance
    values = {
        "prompts": len(dataset),
        "chosen": len(selection.indices),
        "candidates": provenance["candidates"],
        "race": provenance.get("race"),
        "seconds_of": provenance["seconds"],
        "seconds": seconds,
        "resident_before": before,
        "resident_more": most - before,
        "bytes_written": written,
        "mean_success": selection.mean_success_rates(),
    }
    save_results(arguments.output, json.loads(json.dumps(values)))


if __name__ == "__main__":
    main()
