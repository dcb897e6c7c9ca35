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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import Empty

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from demo import POLICY, SAMPLES, success
from equations import equations_reward, generate_chains, load_gsm8k_equations
from hard_pool import COIN, EQUATION, HARD, TRIVIAL, hard_pool
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PROMPTS, GROUP = 16, 8  # of a step; rollouts of a prompt
SHARES = {EQUATION: 0.25, HARD: 0.27, TRIVIAL: 0.15, COIN: 0.33}  # of the pool
ARMS = {"uniform": "random prompts", "online": "LearnAlign online"}
COLOURS = {"uniform": "#000000", "online": "#D55E00"}
WINDOW = 10  # steps
LOOKS = 5  # at held-out success, after the first


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
    """1 for a right answer, and on coins by chance; keeps the kinds of the prompts of the last step."""

    __name__ = "right"

    def __init__(self, seed):
        self.random, self.kinds, self.live = np.random.default_rng(seed), np.zeros(0), np.zeros(0)

    def __call__(self, completions, answer, kind, **kwargs):
        rewards, kinds = np.array(equations_reward(completions, answer)), np.array(kind)
        rewards[kinds == COIN] = self.random.random((kinds == COIN).sum()) < 0.5
        self.kinds, self.live = kinds[::GROUP], rewards.reshape(-1, GROUP).std(axis=1) > 0
        return rewards.tolist()


class Watch(TrainerCallback):
    """Tells the main process of each step, and of held-out success after every part of the run."""

    def __init__(self, arm, test, steps, messages, reward):
        self.arm, self.test, self.messages, self.reward = arm, test, messages, reward
        self.due = {round(steps * part / LOOKS) for part in range(LOOKS + 1)}

    def on_train_begin(self, args, state, control, **kwargs):
        self.look(0, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "frac_reward_zero_std" in logs:
            coins = self.reward.kinds == COIN
            self.messages.put(("step", self.arm, (coins.mean(), (self.reward.live & ~coins).mean())))

    def on_step_end(self, args, state, control, **kwargs):
        self.look(state.global_step, **kwargs)

    def look(self, step, model=None, processing_class=None, **kwargs):
        if step in self.due:
            training = model.training
            with torch.random.fork_rng(devices=[]):  # training draws as it would without the look
                merged = copy.deepcopy(model).merge_and_unload()  # faster than with the adapter beside the weights
                rate = success(merged, processing_class, self.test).mean().item()
            model.train(training)
            self.messages.put(("look", self.arm, (step, rate)))


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
        callbacks=[Watch(arm, test, arguments.steps, messages, reward)],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def watch(runs, messages, steps) -> tuple[dict, dict]:
    """
    Shows both runs until they end. Returns, of each, by step the share of the rollouts on coins and of live groups
    that are no coins; and success by step.
    """
    shares, looks = {arm: [] for arm in ARMS}, {arm: {} for arm in ARMS}
    bars = {
        arm: tqdm(total=steps, desc=f"{name:17s}", unit="step", position=i)
        for i, (arm, name) in enumerate(ARMS.items())
    }
    while True:
        ended = all(run.done() for run in runs)
        try:
            while True:
                kind, arm, value = messages.get(timeout=0.5)
                if kind == "step":
                    shares[arm].append(value)
                    bars[arm].update()
                else:
                    looks[arm][value[0]] = value[1]
                coins = f"on chance {np.mean(shares[arm][-20:], axis=0)[0]:.0%}, " if shares[arm] else ""
                bars[arm].set_postfix_str(f"{coins}held-out success {[*looks[arm].values()][-1]:.3f}")
        except Empty:
            pass
        if ended or any(run.done() and run.exception() for run in runs):
            break
    for bar in bars.values():
        bar.close()
    for run in runs:
        run.result()  # raises what a run raised
    return {arm: np.array(found) for arm, found in shares.items()}, looks


def curve(looks) -> list[tuple[int, float]]:
    """Rollouts and success."""
    return [(PROMPTS * GROUP * step, rate) for step, rate in sorted(looks.items())]


def rollouts_to(points, goal) -> float | None:
    """Rollouts until a curve is at `goal`, on the line between two looks; None if it never is."""
    for (start, before), (stop, after) in zip(points, points[1:], strict=False):
        if after >= goal:
            return start + max(0.0, goal - before) / max(after - before, 1e-9) * (stop - start)
    return None


def draw(shares, looks, path) -> None:
    """Held-out success, and the share of the rollouts that chance decided, against rollouts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for arm, name in ARMS.items():
        rollouts, rates = zip(*curve(looks[arm]), strict=True)
        left.plot(rollouts, 100 * np.array(rates), marker="o", color=COLOURS[arm], label=name)
        coins = shares[arm][:, 0]
        smooth = [np.mean(coins[max(0, end - WINDOW) : end]) for end in range(1, len(coins) + 1)]
        right.plot(
            PROMPTS * GROUP * np.arange(1, len(smooth) + 1), 100 * np.array(smooth), color=COLOURS[arm], label=name
        )
    left.set_ylabel("held-out success, %")
    right.set_ylabel(f"decided by chance, %, mean of {WINDOW} steps")
    right.set_ylim(0, 100)
    for axes in (left, right):
        axes.set_xlabel("rollouts generated")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(ARMS), mp_context=context) as processes:
        messages = manager.Queue()
        runs = [processes.submit(train, arm, arguments, messages) for arm in ARMS]
        shares, looks = watch(runs, messages, arguments.steps)
    figure = arguments.output_dir / "success.png"
    draw(shares, looks, figure)

    steps = sorted(looks["uniform"])
    print(f"\nHeld-out success at temperature 1 ({len(test)} prompts, {SAMPLES} samples each)")
    counts = "".join(f"{PROMPTS * GROUP * step:8,d}" for step in steps)
    print(f"  after rollouts   {counts}   by chance   live, no chance")
    for arm, name in ARMS.items():
        rates = "".join(f"{looks[arm][step]:8.3f}" for step in steps)
        coins, live = shares[arm].mean(axis=0)
        print(f"  {name:17s}{rates}   {coins:9.0%}   {live:15.0%}")
    total = PROMPTS * GROUP * arguments.steps
    needed = rollouts_to(curve(looks["online"]), looks["uniform"][arguments.steps])
    print(
        "  With LearnAlign online the final success of random prompts is not reached."
        if needed is None
        else f"  With LearnAlign online the final success of random prompts is reached after {needed:,.0f} rollouts, "
        f"{needed / total:.0%} of theirs (one run each)."
    )
    print(f"\nTotal: {time.perf_counter() - started:.0f} s")
    print(f"The figure: {figure}")
    print(
        f"What was chosen, to be opened in a browser: {arguments.output_dir / 'online' / 'learnalign' / 'report.html'}"
    )


if __name__ == "__main__":
    main()
