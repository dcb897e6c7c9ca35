"""Two training runs at the same time, each in a process of its own: bars while they train, a figure and a table."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Empty

import matplotlib
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback


matplotlib.use("Agg")
import matplotlib.pyplot as plt


ARMS = {"uniform": "random prompts", "online": "LearnAlign online"}
COLOURS = {"uniform": "#000000", "online": "#D55E00"}
WINDOW = 10  # steps
LOOKS = 5  # at held-out success, after the first


@dataclass
class Watch(TrainerCallback):
    """
    Tells the main process of each step, and of held-out success after every part of the run.

    Attributes:
        arm (`str`): one of `ARMS`.
        steps (`int`): of the run.
        messages: the queue to the main process.
        reward: has `chance` and `live` of the groups of the last step, two arrays of booleans.
        success (`Callable`): takes the model and the tokenizer, and returns held-out success.
    """

    arm: str
    steps: int
    messages: object
    reward: object
    success: Callable

    def on_train_begin(self, args, state, control, **kwargs):
        self.look(0, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "frac_reward_zero_std" in logs:
            chance = self.reward.chance
            self.messages.put(("step", self.arm, (chance.mean(), (self.reward.live & ~chance).mean())))

    def on_step_end(self, args, state, control, **kwargs):
        self.look(state.global_step, **kwargs)

    def look(self, step, model=None, processing_class=None, **kwargs):
        if step in {round(self.steps * part / LOOKS) for part in range(LOOKS + 1)}:
            training = model.training
            with torch.random.fork_rng(devices=[]):  # training draws as it would without the look
                rate = self.success(model, processing_class)
            model.train(training)
            self.messages.put(("look", self.arm, (step, rate)))


def train_both(train: Callable, arguments) -> tuple[dict, dict]:
    """
    Run `train(arm, arguments, messages)` for both arms at the same time, and show both until they end. Return, of
    each, by step the share of the rollouts decided by chance and of live groups that are not; and success by step.
    """
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(ARMS), mp_context=context) as processes:
        messages = manager.Queue()
        runs = [processes.submit(train, arm, arguments, messages) for arm in ARMS]
        return _watch(runs, messages, arguments.steps)


def _watch(runs, messages, steps):
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


def rollouts_to(points, goal) -> float | None:
    """Return the rollouts until a curve is at `goal`, on the line between two looks; None if it never is."""
    for (start, before), (stop, after) in zip(points, points[1:], strict=False):
        if after >= goal:
            return start + max(0.0, goal - before) / max(after - before, 1e-9) * (stop - start)
    return None


def draw(shares, looks, rollouts: int, path: Path) -> None:
    """Draw held-out success, and the share of the rollouts that chance decided, against rollouts, so many a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for arm, name in ARMS.items():
        steps, rates = zip(*sorted(looks[arm].items()), strict=True)
        left.plot(rollouts * np.array(steps), 100 * np.array(rates), marker="o", color=COLOURS[arm], label=name)
        coins = shares[arm][:, 0]
        smooth = [np.mean(coins[max(0, end - WINDOW) : end]) for end in range(1, len(coins) + 1)]
        right.plot(rollouts * np.arange(1, len(smooth) + 1), 100 * np.array(smooth), color=COLOURS[arm], label=name)
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


def print_table(shares, looks, rollouts: int, steps: int) -> None:
    """Print held-out success by rollouts, so many a step, and when both first had the last of random prompts."""
    marks = sorted(looks["uniform"])
    counts = "".join(f"{rollouts * step:8,d}" for step in marks)
    print(f"  after rollouts   {counts}   by chance   live, no chance")
    for arm, name in ARMS.items():
        rates = "".join(f"{looks[arm][step]:8.3f}" for step in marks)
        coins, live = shares[arm].mean(axis=0)
        print(f"  {name:17s}{rates}   {coins:9.0%}   {live:15.0%}")
    goal = looks["uniform"][steps]
    needed, own = (
        rollouts_to([(rollouts * step, looks[arm][step]) for step in marks], goal) for arm in ("online", "uniform")
    )
    print(
        "  With LearnAlign online the final success of random prompts is not reached."
        if needed is None
        else f"  With LearnAlign online the final success of random prompts is reached after {needed:,.0f} rollouts; "
        f"random prompts first had it after {own:,.0f} (one run each)."
    )


def print_end(started: float, figure: Path, output_dir: Path) -> None:
    """Print how long all took since `started`, and where figure and page are."""
    print(f"\nTotal: {time.perf_counter() - started:.0f} s")
    print(f"The figure: {figure}")
    print(f"What was chosen, to be opened in a browser: {output_dir / 'online' / 'learnalign' / 'report.html'}")
