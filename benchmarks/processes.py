"""
The gradient pass on two processes against one: prompts per second, and what the machine itself allows.

    python benchmarks/processes.py

Each process has one thread. The machine's own limit is measured in the same rounds: two passes that know nothing of
each other, side by side, against one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np
import torch
from workload import build_trainer, draw_groups, seconds

from trl_learnalign.ground.store import Log, prepare
from trl_learnalign.host import find_host
from trl_learnalign.measures.gradients import GradientFeatures


SETTINGS = {"shape": "small", "device": "cpu", "dtype": "float32", "rank": 8, "prompts": 32, "tokens": 64}


def work(output):
    """One pass over this process's share of the pool; rank 0 writes how long all processes took."""
    arguments = argparse.Namespace(**SETTINGS | {"dtype": torch.float32})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments, scratch)
        accelerator = trainer.accelerator
        groups = draw_groups(arguments)
        share = range(accelerator.process_index, len(groups), accelerator.num_processes)
        tasks = {index: groups[index] for index in share}
        lengths = {index: np.array([len(row) for row in rows]) for index, rows in tasks.items()}
        for name in ("first", "measured"):
            with find_host(trainer).left_as_found(8):
                prepare(path := Path(scratch) / f"{name}-{accelerator.process_index}", name)
                log = Log(path, name, accelerator.process_index)
                source = GradientFeatures(find_host(trainer), 32768, 0, lengths, tasks.__getitem__, log)

                def everyone(source=source):
                    source.weighted_sum(torch.ones(len(groups)))
                    accelerator.wait_for_everyone()

                accelerator.wait_for_everyone()
                took = seconds(everyone)
        if accelerator.is_main_process:
            output.write_text(json.dumps({"seconds": took, "world": accelerator.num_processes}))
    os._exit(0)  # all is written; process groups are not waited for


def start(processes, output):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--work", str(output)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(process, output, world):
    assert process.wait(timeout=600) == 0
    result = json.loads(output.read_text())
    assert result["world"] == world
    return result["seconds"]


def main():
    arguments = harness.options(__doc__, rounds=5, output="processes", work=(Path, "for its own use"))
    if arguments.work:
        work(arguments.work)
    ours, limit = [], []
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "0.json", Path(scratch) / "1.json"
        for _ in range(arguments.rounds):
            one = finish(start(1, first), first, 1)
            ours.append(one / finish(start(2, first), first, 2))
            pair = start(1, first), start(1, second)
            limit.append(2 * one / max(finish(*run, 1) for run in zip(pair, (first, second), strict=True)))
            print(
                f"one process {one:.1f} s; two {ours[-1]:.2f} x as fast; the machine's limit {limit[-1]:.2f} x",
                flush=True,
            )
    document = {
        "speedup": statistics.median(ours),
        "limit": statistics.median(limit),
        "of_limit": statistics.median(a / b for a, b in zip(ours, limit, strict=True)),
    }
    document |= harness.conditions(rounds=arguments.rounds, settings=SETTINGS)
    harness.write(arguments.output, document)


if __name__ == "__main__":
    main()
