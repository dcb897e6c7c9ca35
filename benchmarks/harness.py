"""What all benchmarks share: folders, a command line, cells that are run once, and results on disk."""

import argparse
import fcntl
import json
import os
import platform
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS = "examples", "benchmarks/online", "benchmarks/chat", "benchmarks/gsm8k_equations"
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
DATASET = Path, "directory with GSM8K's train.jsonl and test.jsonl; without it generated chains stand in"


def options(doc, choices=None, **defaults) -> argparse.Namespace:
    """
    Read the command line. An option's type is that of its default, or of the first value where there are several. A
    type stands for no value, a pair with a text for a default and its help; the `output` is named as its file is.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        default, text = default if isinstance(default, tuple) and len(default) == 2 else (default, None)
        if name == "output" and isinstance(default, str):
            default = RESULTS / f"{default}.json"
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
            continue
        several = isinstance(default, list)
        kind = default[0] if several else default
        if isinstance(kind, type):
            default = [] if several else None
        else:
            kind = type(kind)
        own = {"nargs": "*" if several else None, "choices": (choices or {}).get(name)}
        parser.add_argument(f"--{name}", type=kind, default=default, help=text, **own)
    return parser.parse_args()


def versions(*more) -> dict[str, str]:
    """Versions of the packages that results depend on, and of those named that are installed."""
    found = {}
    for name in ("torch", "transformers", "trl", "peft", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(**more) -> dict:
    """On what a cost was measured."""
    return more | {"machine": machine(), "cpu_count": os.cpu_count(), "versions": versions("trl-learnalign")}


def read(path, otherwise=None):
    """What a file of results holds, or `otherwise` where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


def write(path, values, indent=1) -> None:
    """Write results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")
    temporary.replace(path)


def report(path, values) -> None:
    """Write results and print them."""
    write(path, values)
    print(json.dumps(values, indent=1))


def most_memory(anew=False) -> int:
    """The most bytes that this process has had resident, or has from now on if it is to begin anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def apart(function, *args):
    """Call a function in a process of its own, which holds no memory at its start."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def claimed(lock, wait=False):
    """Yield whether this process has the file `lock` to itself, once others have left it if it is to `wait`."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        yield free


def cell(done, conditions, work, *args, lock=None, begun=None):
    """
    Run a cell unless another process is at it, or has done it: the file `done` is to hold what `work(*args)` returns
    and the conditions. Return that, or `None`. A cell that is resumed keeps its conditions in the file `begun`.
    """
    with claimed(lock or done.with_suffix(".lock")) as free:
        if not free or (begun and done.is_file()):
            return None
        known = read(begun or done)
        if known is not None and (known if begun else known["conditions"]) != conditions:
            sys.exit(f"'{begun or done}' was made under other conditions. Pass another --output_dir, or move it away.")
        if done.is_file():
            return None
        if begun:
            write(begun, conditions, None)
        found = work(*args) | (conditions if begun else {"conditions": conditions})
        write(done, found, None)
        return found


def cells(options) -> list[tuple]:
    """Pools, seeds and arms, each with each: what is there is always compared on the same seeds."""
    return [(pool, seed, arm) for pool in options.pools for seed in options.seeds for arm in options.arms]
