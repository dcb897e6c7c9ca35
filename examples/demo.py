"""
A small experiment on two CPU cores: is training on LearnAlign's prompts better than training on random ones?

    python examples/demo.py [--dataset_path DIR]

A tiny policy solves some chains of equations. Two runs start from it, with the same warm-up, the same number of
training prompts and the same number of steps; one trains on random prompts, the other on those that LearnAlign
selects. DIR holds GSM8K's `train.jsonl` and `test.jsonl`, whose equations are then used in place of generated ones.
"""

import argparse
import random
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from equations import equations_reward, generate_chains, load_gsm8k_equations
from peft import LoraConfig
from train_tiny_policy import generate
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler, Selection


# Settings that only the newest transformers calls by another name
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)

POLICY = Path(__file__).parent / "assets" / "tiny-policy"
SAMPLES = 8


def load(arguments) -> tuple[Dataset, Dataset, str]:
    """A pool to choose from, held-out rows, and the name of their source."""
    if arguments.dataset_path is None:
        return generate_chains(arguments.pool, seed=11), generate_chains(arguments.test, seed=12), "generated chains"
    pool, _ = load_gsm8k_equations(arguments.dataset_path / "train.jsonl")
    test, _ = load_gsm8k_equations(arguments.dataset_path / "test.jsonl")
    draw = random.Random(0)
    pool = pool.select(sorted(draw.sample(range(len(pool)), arguments.pool)))
    test = test.select(sorted(draw.sample(range(len(test)), arguments.test)))
    return pool, test, "equations of GSM8K"


def success(model, tokenizer, test) -> torch.Tensor:
    """Held-out success at temperature 1, a value per row: the mean of eight samples."""
    torch.manual_seed(0)
    prompts = [prompt for prompt in test["prompt"] for _ in range(SAMPLES)]
    answers = [answer for answer in test["answer"] for _ in range(SAMPLES)]
    rewards = equations_reward(generate(model, tokenizer, prompts, do_sample=True), answers)
    return torch.tensor(rewards).view(-1, SAMPLES).mean(1)


def build_trainer(score, pool, arguments, sampler=LearnAlignSampler) -> LearnAlignGRPOTrainer:
    """A trainer as in any GRPO script, and a sampler."""
    learnalign = LearnAlignConfig(
        num_prompts=arguments.num_prompts, warmup_prompts=64, score=score, write_report=score != "random"
    )
    training_args = GRPOConfig(
        output_dir=str(arguments.output_dir / score),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=256,  # 32 prompts of 8 rollouts
        num_generations=8,
        max_completion_length=56,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        beta=0.0,
        num_train_epochs=arguments.passes,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=arguments.seed,
    )
    trainer = LearnAlignGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        reward_funcs=equations_reward,
        args=training_args,
        train_dataset=pool,
        processing_class=AutoTokenizer.from_pretrained(POLICY),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_sampler=sampler(learnalign),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer


class Bar(ProgressCallback):
    """The progress bar without log values, so that the output of the demo fits on one screen."""

    def on_log(self, args, state, control, **kwargs):
        pass


def train(score, pool, test, arguments, sampler=LearnAlignSampler) -> tuple[torch.Tensor, Path, int]:
    """One run; returns the held-out success after it, the directory of its selection, and its steps."""
    trainer = build_trainer(score, pool, arguments, sampler)
    trainer.train()
    after = success(trainer.model, trainer.processing_class, test)
    path = Path(trainer.args.output_dir) / "learnalign" / "step-000002"  # two steps of warm-up
    return after, path, trainer.state.global_step


def show(selection: Selection, pool: Dataset) -> None:
    """Prints some prompts of both ends of the ranking, and histograms of the success rates of pool and choice."""
    table = selection.scores.to_pandas().sort_values("rank")
    print("\n  rank  success  V      alignment  prompt")
    for part in (table.head(5), table[table["learnability"] > 0].tail(2), table.tail(1)):
        for row in part.itertuples(index=False):
            alignment = "-" if row.learnability == 0 else f"{row.alignment:+.2f}"
            prompt = pool[row[0]]["prompt"][:60]
            print(f"  {row.rank:4d}  {row.success_rate:.3f}    {row.learnability:.3f}  {alignment:9s}  {prompt}")
    print("\n  solved of 8 times " + "".join(f"{solved:6d}" for solved in range(9)))
    for name, rows in (("pool", table), ("chosen", table[table["selected"]])):
        counts = [(rows["success_rate"] * 8 == solved).sum() for solved in range(9)]
        print(f"  {name:18s}" + "".join(f"{count:6d}" for count in counts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, help="directory with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--pool", type=int, default=600, help="prompts to choose from")
    parser.add_argument("--num_prompts", type=int, default=128, help="prompts to choose")
    parser.add_argument("--passes", type=int, default=5, help="passes over the chosen prompts")
    parser.add_argument("--test", type=int, default=400, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    disable_progress_bar()  # of loading weights; training has its own
    started = time.perf_counter()

    pool, test, source = load(arguments)
    print(f"{source}: a pool of {len(pool)} prompts, {len(test)} held out")
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    before = success(AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32), tokenizer, test)
    print("Run 1 of 2: random prompts")
    at_random, _, steps = train("random", pool, test, arguments)
    print("Run 2 of 2: LearnAlign's prompts")
    chosen, path, same_steps = train("learnalign", pool, test, arguments)
    assert steps == same_steps

    selection = Selection.load(path)
    show(selection, pool)
    print(f"\nHeld-out success at temperature 1 ({len(test)} prompts, {SAMPLES} samples each)")
    error = before.std() / len(before) ** 0.5
    print(f"  before training         {before.mean():.3f} +- {error:.3f}")
    print(f"  after random prompts    {at_random.mean():.3f}  ({arguments.num_prompts} prompts, {steps} steps)")
    cost = len(pool) * selection.provenance["num_rollouts"]  # of choosing
    print(
        f"  after LearnAlign's      {chosen.mean():.3f}  ({arguments.num_prompts} prompts, {steps} steps, and "
        f"{cost:,} rollouts to choose)"
    )
    gap = chosen - at_random
    error = gap.std() / len(gap) ** 0.5
    print(
        f"  LearnAlign - random    {gap.mean():+.3f} +- {error:.3f}  (one run each; the error is over held-out "
        "prompts only)"
    )
    print(f"\nTotal: {time.perf_counter() - started:.0f} s")
    print(f"The scores, to be read in Python: Selection.load('{path}')")
    print(f"Why each prompt was chosen, to be opened in a browser: {path.parent / 'report.html'}")


if __name__ == "__main__":
    main()
