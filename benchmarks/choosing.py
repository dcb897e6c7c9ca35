"""
What the online schedule costs: to choose a chunk and to learn from its rewards, at 8,000 and at 1,000,000 prompts; and
as a share of a training step on the tiny policy.

    python benchmarks/choosing.py

Processor time of one thread, so that other work on the machine does not count. The features are synthetic, as many as
a run with hidden states has; the predictor's window is full, so that each fit is as large as it gets.
"""

import statistics
import tempfile
import time

import harness
import numpy as np
from equations import equations_reward, generate_chains
from policies import GROUP, POLICY, tiny_trainer
from transformers import TrainerCallback

from trl_learnalign import LearnAlignConfig, LearnAlignSampler
from trl_learnalign.curriculum import Group, OnlineCurriculum, OnlineSettings


SIZES = (8_000, 1_000_000)
COLUMNS = 66  # a constant, the length, 64 components of hidden states
CHUNK = 16


class Pool:
    """A curriculum of a run that is under way, and prompts whose success the features tell."""

    def __init__(self, size):
        random = np.random.default_rng(0)
        features = random.standard_normal((size, COLUMNS), dtype=np.float32)
        features[:, 0] = 1
        self.success = 1 / (1 + np.exp(1.5 - 2 * features[:, 1]))
        self.random = random
        self.curriculum = OnlineCurriculum(features.astype(np.float16), group_size=GROUP)

    def step(self, chunk=CHUNK):
        """Processor seconds to choose a chunk, to learn from its rewards, and for the values of the log."""
        times = [time.process_time()]
        draws = self.curriculum.choose(chunk)
        times.append(time.process_time())
        success = self.success[[draw.row for draw in draws]]
        rewards = (self.random.random((chunk, GROUP, 1)) < success[:, None, None]).astype(float)
        groups = [Group(draw.number, draw.row, own) for draw, own in zip(draws, rewards, strict=True)]
        times.append(time.process_time())
        self.curriculum.observe(groups)
        self.curriculum.tick(1)
        times.append(time.process_time())
        self.curriculum.metrics()
        times.append(time.process_time())
        return times[1] - times[0], times[3] - times[2], times[4] - times[3]

    def costs(self, chunks, chunk=CHUNK) -> dict:
        """Median milliseconds of the parts of a step, over so many chunks, once the predictor's window is full."""
        for _ in range(OnlineSettings.window // chunk + 1):
            self.step(chunk)
        assert self.curriculum.judge.choosing, "the pool is made so that choosing pays"
        parts = zip(*(self.step(chunk) for _ in range(chunks)), strict=True)
        medians = (1000 * statistics.median(part) for part in parts)
        return dict(zip(("choose_ms", "observe_ms", "log_ms"), medians, strict=True))


class Clock(TrainerCallback):
    """Processor seconds of every optimizer step, generation and all."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.started)


def step_of_the_tiny_policy(steps):
    """Median processor milliseconds of a step: 16 prompts, 8 rollouts each."""
    clock, sampler = Clock(), LearnAlignSampler(LearnAlignConfig(schedule="online", write_report=False))
    with tempfile.TemporaryDirectory() as scratch:
        run = (generate_chains(2000, seed=20_000), 2e-4, steps, 42, [clock])
        tiny_trainer(POLICY, None, equations_reward, scratch, *run, sampler=sampler).train()
    return 1000 * statistics.median(clock.seconds[2:])


def main():
    arguments = harness.options(__doc__, sizes=[*SIZES], chunks=100, steps=12, output="choosing")
    pools = [{"prompts": size, **Pool(size).costs(arguments.chunks)} for size in arguments.sizes]
    step = step_of_the_tiny_policy(arguments.steps)
    values = {
        "pools": pools,
        "columns": COLUMNS,
        "chunk_prompts": CHUNK,
        "group_size": GROUP,
        "observations": OnlineSettings.window,
        "step_seconds": step / 1000,
        "share_of_step": sum(value for name, value in pools[0].items() if name.endswith("_ms")) / step,
        "chunks": arguments.chunks,
        "steps": arguments.steps,
        "threads": 1,
    }
    harness.report(arguments.output, harness.conditions(**values))


if __name__ == "__main__":
    main()
