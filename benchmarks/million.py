"""
Scores of 1,000,000 prompts from features on disk: memory, and time against reading the files once.

    python benchmarks/million.py [--directory DIR]

DIR needs space for --prompts x --dim x 4 bytes (33 GB) and is empty afterwards. The page cache is told to forget the
files before every reading.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

from trl_learnalign.ground.store import Log, prepare
from trl_learnalign.measures.packing import WINDOW
from trl_learnalign.scores.maths import scores_of_batches


def write(path, prompts, dim):
    prepare(path, "million")
    log = Log(path, "million", 0)
    block = torch.randn(2 * WINDOW, dim, generator=torch.Generator().manual_seed(0))
    for start in range(0, prompts, WINDOW):
        count = min(WINDOW, prompts - start)
        shift = start // WINDOW % WINDOW
        log.append([(start, block[shift : shift + count].numpy())])


def forget(path):
    for file in path.iterdir():
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path):
    """Seconds to read every file once."""
    forget(path)
    buffer = bytearray(8 << 20)
    started = time.perf_counter()
    for file in sorted(path.iterdir()):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


def batches(path, prompts, dim):
    """Read rows in the windows of a selection."""
    log = Log(path, "million", 0)
    for start in range(0, prompts, WINDOW):
        indices = list(range(start, min(start + WINDOW, prompts)))
        yield indices, torch.frombuffer(log.map(start, verify=False), dtype=torch.float32).view(len(indices), dim)


def score(path, prompts, dim, threads):
    """Seconds and bytes of resident memory over the start, in a process of its own."""
    torch.set_num_threads(threads)
    forget(path)
    generator = torch.Generator().manual_seed(1)
    weights, mean = torch.rand(prompts, generator=generator).double(), torch.randn(dim, generator=generator).double()
    before = harness.most_memory(anew=True)
    started = time.perf_counter()
    indices, scores, *_ = scores_of_batches(batches(path, prompts, dim), weights, mean)
    seconds = time.perf_counter() - started
    assert indices.tolist() == list(range(prompts)) and scores.isfinite().all()
    return {"seconds": seconds, "resident": harness.most_memory() - before}


def main():
    sizes = {"prompts": 1_000_000, "dim": 8192, "rounds": 3, "threads": 1}
    arguments = harness.options(__doc__, directory=Path(tempfile.gettempdir()), **sizes, output="million")
    needed = arguments.prompts * arguments.dim * 4
    if shutil.disk_usage(arguments.directory).free < 1.1 * needed:
        sys.exit(f"{arguments.directory} has no space for {needed / 1e9:.0f} GB of features. Pass --directory.")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        path = Path(scratch) / "log"
        write(path, arguments.prompts, arguments.dim)
        readings, runs = [], []
        for _ in range(arguments.rounds):
            readings.append(read(path))
            runs.append(harness.apart(score, path, arguments.prompts, arguments.dim, arguments.threads))
            print(f"read {readings[-1]:.1f} s, scored {runs[-1]}", flush=True)
        size = sum(file.stat().st_size for file in path.iterdir())
    names = ("prompts", "dim", "threads", "rounds")
    document = {name: getattr(arguments, name) for name in names} | {
        "bytes": size,
        "read_seconds": statistics.median(readings),
        "score_seconds": statistics.median(run["seconds"] for run in runs),
        "ratio": statistics.median(run["seconds"] / base for run, base in zip(runs, readings, strict=True)),
        "resident_bytes": max(run["resident"] for run in runs),
    }
    harness.report(arguments.output, document)


if __name__ == "__main__":
    main()
