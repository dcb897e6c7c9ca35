"""Measures the tiny policy: what it samples, what it knows (greedy), and what stock GRPO makes of the difference.

    python benchmarks/tiny_policy.py --dataset_path DIR --grpo

DIR holds GSM8K's train.jsonl and test.jsonl. Without it, generated chains stand in, from seeds training never saw.
"""

import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import harness
import torch
from datasets import Dataset
from equations import equations_reward, generate_chains, load_gsm8k_equations
from policies import LORA, POLICY, arguments_of, load_policy, successes, trainer_of
from train_tiny_policy import evaluate


MAX_COMPLETION_LENGTH = 56  # the longest GSM8K completion has 54 characters


def pick(rows: Dataset, count: int, seed: int) -> Dataset:
    return rows.select(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def run_grpo(model_dir: Path, train: Dataset, test: Dataset, args, seed: int) -> dict:
    """Trains with stock TRL GRPO and returns held-out success before and after, and what it took."""
    policy = load_policy(model_dir)

    def success(model) -> float:
        return float(successes(model, policy[1], test, args.samples, seed=1)[0].mean())

    with tempfile.TemporaryDirectory() as output_dir:
        config = arguments_of(
            output_dir,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            per_device_train_batch_size=8 * args.prompts_per_step,
            num_train_epochs=args.passes,
            max_completion_length=MAX_COMPLETION_LENGTH,
            logging_steps=5,
            seed=seed,
        )
        trainer = trainer_of(policy, equations_reward, config, pick(train, args.train_prompts, seed))
        before = success(trainer.model)
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        after = success(trainer.model)
        curve = [round(log["reward"], 3) for log in trainer.state.log_history if "reward" in log]
    result = {
        "seed": seed,
        "before": round(before, 4),
        "after": round(after, 4),
        "lift": round(after - before, 4),
        "optimizer_steps": trainer.state.global_step,
        "train_seconds": round(seconds),
        "train_reward_every_5_steps": curve,
    }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    files = {"dataset_path": harness.DATASET, "model": POLICY, "output": "tiny_policy"}
    sizes = {"test_rows": 600, "train_prompts": 1000, "samples": 8, "threads": 2}
    training = {"seeds": [0], "learning_rate": 2e-4, "passes": 4.0, "prompts_per_step": 32}
    args = harness.options(__doc__, **files, **sizes, grpo=(False, "also train, and measure the lift"), **training)
    torch.set_num_threads(args.threads)
    counts = {}
    if args.dataset_path:
        train, counts["train_dropped"] = load_gsm8k_equations(args.dataset_path / "train.jsonl")
        test, counts["test_dropped"] = load_gsm8k_equations(args.dataset_path / "test.jsonl")
    else:
        train, test = generate_chains(7000, seed=20_000), generate_chains(1300, seed=20_001)
    counts |= {"train_rows": len(train), "test_rows": len(test)}
    test = pick(test, args.test_rows, seed=0)

    model, tokenizer = load_policy(args.model)
    torch.manual_seed(0)
    started = time.time()
    held_out = evaluate(model, tokenizer, test, args.samples)
    learnable = evaluate(model, tokenizer, pick(train, args.train_prompts, seed=0), num_samples=8)["learnable"]
    results = {
        "dataset": "GSM8K equations" if args.dataset_path else "generated chains",
        **counts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_rows_measured": len(test),
        "samples_per_row": args.samples,
        "test_sampled_success": held_out["sampled"],
        "test_greedy_success": held_out["greedy"],
        "train_prompts_measured": args.train_prompts,
        "train_share_neither_always_nor_never_solved_in_8": learnable,
        "eval_seconds": round(time.time() - started, 1),
        "versions": harness.versions("datasets"),
        "cpu_count": os.cpu_count(),
        "torch_threads": args.threads,
    }
    print(json.dumps(results, indent=2), flush=True)
    if args.grpo:
        runs = [run_grpo(args.model, train, test, args, seed) for seed in args.seeds]
        names = ("learning_rate", "prompts_per_step", "train_prompts", "passes")
        fixed = {
            "lora_r": LORA["r"],
            "beta": 0.0,
            "num_generations": 8,
            "max_completion_length": MAX_COMPLETION_LENGTH,
        }
        results["grpo"] = {
            "settings": {name: getattr(args, name) for name in names} | fixed,
            "mean_lift": round(statistics.fmean(run["lift"] for run in runs), 4),
            "runs": runs,
        }
    harness.write(args.output, results, 2)


if __name__ == "__main__":
    main()
