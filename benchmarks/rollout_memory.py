"""
Memory and files of the rollouts of 100,000 prompts, with 8 completions of 2,000 tokens each.

    python benchmarks/rollout_memory.py [--directory DIR]

The groups are of random tokens, since a policy would take days on a CPU; all that is done with them is the package's
own: rounds, files, rewards of the pool, microbatches of the gradients, and the rows of each microbatch read back. DIR
needs 14 GB and is empty afterwards.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from datasets import Dataset
from workload import build_trainer

from trl_learnalign import LearnAlignConfig
from trl_learnalign.host import find_host, generation
from trl_learnalign.host.groups import RolloutGroup
from trl_learnalign.measures.alignments import features_of
from trl_learnalign.measures.rollouts import RolledOut, gather_rewards, roll_out
from trl_learnalign.selection.run import SelectionRun


SETTINGS = {"shape": "small", "device": "cpu", "rank": 8, "prompts": 8}
BATCH = 64


def groups_of(indices, size, tokens):
    """Rollouts as a generation makes them. Two thirds of the prompts are learnable."""
    generator = np.random.default_rng(indices[0])
    for index in indices:
        solved = np.arange(size) < index % 3 * size // 3
        yield RolloutGroup(
            row=index,
            prompt_ids=[generator.integers(0, 150_000, 100, np.int32)] * size,
            completion_ids=list(generator.integers(0, 150_000, (size, tokens), np.int32)),
            loss_masks=list(np.ones((size, tokens), np.int8)),
            completions=["word" * tokens] * size,
            rewards=solved[:, None].astype(np.float32),
            penalties=np.zeros(size, np.float32),
        )


def count_syncs():
    original, calls = os.fsync, []
    os.fsync = lambda descriptor: (calls.append(descriptor), original(descriptor))[1]
    return calls


def work(directory, arguments):
    """One process, from the first round to the last row of a gradient; returns what it took."""
    trainer = build_trainer(argparse.Namespace(**SETTINGS, dtype=torch.float32, tokens=8), str(directory))
    trainer.train_dataset = Dataset.from_dict({"prompt": [""]}).select([0] * arguments.prompts)
    generation.generate_groups = lambda host, dataset, indices, *_: list(
        groups_of(indices, host.group_size, arguments.tokens)
    )
    choice = LearnAlignConfig(num_rollouts=8, rollout_batch_prompts=BATCH, max_tokens_per_batch=16_000)
    run = SelectionRun(find_host(trainer), choice, 0)
    run.make_keys()
    syncs, before, started = count_syncs(), harness.most_memory(anew=True), time.perf_counter()
    with run.host.left_as_found(8):
        log = run.open_log("rollouts")
        syncs.clear()
        own = roll_out(run.context, run.context.dataset, run.pool, log, BATCH)
        rounds = len(syncs)
        rolled_out = RolledOut(own, gather_rewards(run.context, own))
        source = features_of(run.context, rolled_out, run.open_log("gradients"))
        tokens = 0
        for window in source.windows:
            rows = {index: source.rows(index) for index in window.indices}
            tokens += sum(len(rows[index][row]) for _, places in window.microbatches() for index, row in places)
        assert tokens == source.num_tokens()[0] > 0
        seconds = time.perf_counter() - started
        files = list(log.path.glob("*.log"))
        return {
            "resident_bytes": harness.most_memory() - before,
            "fsyncs": rounds,
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
            "seconds": seconds,
        }


def main():
    folder = Path(tempfile.gettempdir())
    arguments = harness.options(__doc__, directory=folder, prompts=100_000, tokens=2_000, output="rollout_memory")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        found = harness.apart(work, Path(scratch), arguments)
    values = {"prompts": arguments.prompts, "rollouts": 8, "tokens": arguments.tokens, "batch": BATCH, **found}
    harness.report(arguments.output, harness.conditions(**values))


if __name__ == "__main__":
    main()
