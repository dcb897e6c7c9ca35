"""
A small experiment on two CPU cores: GRPO on prompts that LearnAlign chooses online, beside GRPO on random prompts.

    python examples/demo_online.py [--dataset_path DIR]

The pool is as pools are that nobody has filtered: a quarter are equations that the tiny policy can learn, as many are
far too hard for it, some are trivial, and a third are decided by chance, as by a flaky grader, whatever the policy
answers. Two processes train on it at the same time, from the same policy, with equally many rollouts: one is TRL's own
trainer, the other has the three lines that choose every batch of prompts online. DIR holds GSM8K's `train.jsonl` and
`test.jsonl`, whose equations are then used in place of generated ones.
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from demo import POLICY, SAMPLES, success
from equations import equations_reward, generate_chains, load_gsm8k_equations
from hard_pool import COIN, EQUATION, HARD, TRIVIAL, hard_pool
from peft import LoraConfig
from side_by_side import Watch, draw, print_end, print_table, train_both
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler


PROMPTS, GROUP = 16, 8  # of a step; rollouts of a prompt
SHARES = {EQUATION: 0.25, HARD: 0.27, TRIVIAL: 0.15, COIN: 0.33}  # of the pool


def load(arguments) -> tuple[Dataset, Dataset]:
    """A pool to train on, and held-out rows."""
    if arguments.dataset_path is None:
        equations, test = generate_chains(7000, seed=11), generate_chains(1300, seed=12)
    else:
        equations, test = (
            load_gsm8k_equations(arguments.dataset_path / f"{split}.jsonl")[0] for split in ("train", "test")
        )
    sizes = {kind: round(share * arguments.pool) for kind, share in SHARES.items()}
    pool = hard_pool(equations, arguments.seed, sizes)
    return pool, test.shuffle(seed=arguments.seed).select(range(min(arguments.test, len(test))))


class Reward:
    """1 for a right answer, and on coins by chance; keeps which groups of the last step were coins, or live."""

    __name__ = "right"

    def __init__(self, seed):
        self.random, self.chance, self.live = np.random.default_rng(seed), np.zeros(0), np.zeros(0)

    def __call__(self, completions, answer, kind, **kwargs):
        rewards, coins = np.array(equations_reward(completions, answer)), np.array(kind) == COIN
        rewards[coins] = self.random.random(coins.sum()) < 0.5
        self.chance, self.live = coins[::GROUP], rewards.reshape(-1, GROUP).std(axis=1) > 0
        return rewards.tolist()


def held_out(model, tokenizer, test) -> float:
    """Success at temperature 1."""
    merged = copy.deepcopy(model).merge_and_unload()  # faster than with the adapter beside the weights
    return success(merged, tokenizer, test).mean().item()


def train(arm, arguments, messages) -> None:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    disable_progress_bar()
    pool, test = load(arguments)
    options, reward = {}, Reward(arguments.seed)
    if arm == "online":
        options["train_sampler"] = LearnAlignSampler(LearnAlignConfig(schedule="online"))
    trainer = (LearnAlignGRPOTrainer if options else GRPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(arguments.output_dir / arm),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=56,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            beta=0.0,
            max_steps=arguments.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
            seed=arguments.seed,
        ),
        train_dataset=pool,
        processing_class=AutoTokenizer.from_pretrained(POLICY),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch(arm, arguments.steps, messages, reward, partial(held_out, test=test))],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, help="directory with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-online"))
    parser.add_argument("--pool", type=int, default=3000, help="prompts to train on")
    parser.add_argument("--steps", type=int, default=75, help=f"of {PROMPTS} prompts with {GROUP} rollouts each")
    parser.add_argument("--test", type=int, default=300, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    pool, test = load(arguments)
    print(
        f"A pool of {len(pool):,} prompts: equations, others too hard, others trivial, and a third decided by chance. "
        f"{len(test)} equations held out. Two runs of {arguments.steps} steps, {PROMPTS} prompts x {GROUP} rollouts"
    )
    shares, looks = train_both(train, arguments)
    figure = arguments.output_dir / "success.png"
    draw(shares, looks, PROMPTS * GROUP, figure)

    print(f"\nHeld-out success at temperature 1 ({len(test)} prompts, {SAMPLES} samples each)")
    print_table(shares, looks, PROMPTS * GROUP, arguments.steps)
    print_end(started, figure, arguments.output_dir)


if __name__ == "__main__":
    main()
