"""
Scores of 1,000,000 prompts from features on disk: memory, and time against reading the files once.

    python benchmarks/million.py [--directory DIR]

DIR needs space for --prompts x --dim x 4 bytes (33 GB) and is empty afterwards. The page cache is told to forget the
files before every reading.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from trl_learnalign.ground.store import Log, prepare
from trl_learnalign.measures.packing import WINDOW
from trl_learnalign.scores.maths import scores_of_batches


ROOT = Path(__file__).resolve().parent.parent


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


def score(path, prompts, dim):
    """Seconds and bytes of resident memory over the start, in a process of its own."""
    forget(path)
    generator = torch.Generator().manual_seed(1)
    weights, mean = torch.rand(prompts, generator=generator).double(), torch.randn(dim, generator=generator).double()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    indices, scores, *_ = scores_of_batches(batches(path, prompts, dim), weights, mean)
    seconds = time.perf_counter() - started
    assert indices.tolist() == list(range(prompts)) and scores.isfinite().all()
    return {"seconds": seconds, "resident": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "million.json")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.score:
        print(json.dumps(score(arguments.score, arguments.prompts, arguments.dim)))
        return

    needed = arguments.prompts * arguments.dim * 4
    if shutil.disk_usage(arguments.directory).free < 1.1 * needed:
        sys.exit(f"{arguments.directory} has no space for {needed / 1e9:.0f} GB of features. Pass --directory.")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        path = Path(scratch) / "log"
        write(path, arguments.prompts, arguments.dim)
        options = [f"--prompts={arguments.prompts}", f"--dim={arguments.dim}", f"--threads={arguments.threads}"]
        readings, runs = [], []
        for _ in range(arguments.rounds):
            readings.append(read(path))
            command = [sys.executable, __file__, "--score", str(path), *options]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"read {readings[-1]:.1f} s, scored {runs[-1]}", flush=True)
        size = sum(file.stat().st_size for file in path.iterdir())
    document = {
        "prompts": arguments.prompts,
        "dim": arguments.dim,
        "bytes": size,
        "read_seconds": statistics.median(readings),
        "score_seconds": statistics.median(run["seconds"] for run in runs),
        "ratio": statistics.median(run["seconds"] / base for run, base in zip(runs, readings, strict=True)),
        "resident_bytes": max(run["resident"] for run in runs),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
