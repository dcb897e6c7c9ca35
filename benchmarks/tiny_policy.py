"""Measures the tiny policy: what it samples, what it knows (greedy), and what stock GRPO makes of the difference.

    python benchmarks/tiny_policy.py --dataset_path DIR --grpo

DIR holds GSM8K's train.jsonl and test.jsonl. Without it, generated chains stand in, from seeds training never saw.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from equations import equations_reward, generate_chains, load_gsm8k_equations
from train_tiny_policy import evaluate, generate


MAX_COMPLETION_LENGTH = 56  # the longest GSM8K completion has 54 characters


def pick(rows: Dataset, count: int, seed: int) -> Dataset:
    return rows.select(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def sampled_success(model, tokenizer, rows: Dataset, num_samples: int) -> float:
    prompts = [prompt for prompt in rows["prompt"] for _ in range(num_samples)]
    answers = [answer for answer in rows["answer"] for _ in range(num_samples)]
    return statistics.fmean(equations_reward(generate(model, tokenizer, prompts, do_sample=True), answers))


def run_grpo(model_dir: Path, train: Dataset, test: Dataset, args: argparse.Namespace, seed: int) -> dict:
    """Trains with stock TRL GRPO and returns held-out success before and after, and what it took."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with tempfile.TemporaryDirectory() as output_dir:
        config = GRPOConfig(
            output_dir=output_dir,
            learning_rate=args.learning_rate,
            beta=0.0,
            num_generations=8,
            per_device_train_batch_size=8 * args.prompts_per_step,
            num_train_epochs=args.passes,
            max_completion_length=MAX_COMPLETION_LENGTH,
            temperature=1.0,
            # The defaults are for large models on a GPU: checkpointing only costs time here, and bf16 accuracy.
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            reward_funcs=equations_reward,
            args=config,
            train_dataset=pick(train, args.train_prompts, seed),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        torch.manual_seed(1)
        before = sampled_success(trainer.model, tokenizer, test, args.samples)
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        torch.manual_seed(1)
        after = sampled_success(trainer.model, tokenizer, test, args.samples)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "assets" / "tiny-policy")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tiny_policy.json")
    parser.add_argument("--test_rows", type=int, default=600)
    parser.add_argument("--train_prompts", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--grpo", action="store_true", help="also train with GRPO and measure the lift")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one GRPO run for each")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--passes", type=float, default=4)
    parser.add_argument("--prompts_per_step", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    counts = {}
    if args.dataset_path:
        train, counts["train_dropped"] = load_gsm8k_equations(args.dataset_path / "train.jsonl")
        test, counts["test_dropped"] = load_gsm8k_equations(args.dataset_path / "test.jsonl")
    else:
        train, test = generate_chains(7000, seed=20_000), generate_chains(1300, seed=20_001)
    counts |= {"train_rows": len(train), "test_rows": len(test)}
    test = pick(test, args.test_rows, seed=0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
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
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
        "cpu_count": os.cpu_count(),
        "torch_threads": args.threads,
    }
    print(json.dumps(results, indent=2), flush=True)
    if args.grpo:
        runs = [run_grpo(args.model, train, test, args, seed) for seed in args.seeds]
        results["grpo"] = {
            "settings": {
                "learning_rate": args.learning_rate,
                "lora_r": 16,
                "beta": 0.0,
                "num_generations": 8,
                "prompts_per_step": args.prompts_per_step,
                "train_prompts": args.train_prompts,
                "passes": args.passes,
                "max_completion_length": MAX_COMPLETION_LENGTH,
            },
            "mean_lift": round(statistics.fmean(run["lift"] for run in runs), 4),
            "runs": runs,
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
