"""
A reward that runs code: the share of a row's tests that a completion passes.

    trl-learnalign select --config run.yaml --reward_funcs examples/code_reward.py:passed_tests

Rows have a column `tests`: lists of assert statements, or of programs' inputs and outputs, `{"input": "1 2",
"output": "3"}`, as the sources of OpenCodeReasoning (arXiv 2504.01943) have them. Each completion runs in a process of
its own, in an empty directory, without environment variables:

- limits: `SECONDS` of CPU time and twice as many in all, `BYTES` of memory, files of `FILE_BYTES`, and, but for root,
  `PROCESSES` with its threads;
- namespaces, where `unshare` may make them: no network, no other processes, and all that it started ends with it;
- an audit hook, which refuses sockets, processes, signals, `ctypes`, writing, and reading other files than Python's.

This keeps faulty and careless code away from the trainer and its secrets. It is no boundary against an attacker: a
hook inside Python can be got around, and alone keeps the code from your files, and, without namespaces, of which a
warning tells, from the network and other processes. The code also runs beside its tests, and may tamper with them. Run
code that you must distrust in a container or a virtual machine.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor


SECONDS, BYTES, FILE_BYTES, PROCESSES = 5, 1 << 30, 4096, 16
FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
NAMESPACES = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
# What the process runs. The job comes through its input, as a command line could be read. The count goes to a file,
# after a mark that the code does not know
RUNNER = """
import io, json, os, resource, sys

job = json.load(sys.stdin)
code, tests, mark = job["code"], job["tests"], job["mark"]
counts, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in range(3):
    os.dup2(nowhere, stream)
roots = tuple(os.path.realpath(path) + os.sep for path in {sys.prefix, sys.base_prefix, *sys.path})
changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
modules = {"_ctypes", "_posixshmem", "_posixsubprocess", "_socket"}
rooms = ("ctypes.", "fcntl.", "os.", "resource.", "shutil.", "signal.", "socket.", "subprocess.", "sys.settrace")

def inside(path):
    return (os.path.realpath(os.fsdecode(path or ".")) + os.sep).startswith(roots)

def refuse(event, args):
    if event == "import":
        if args[0].rpartition(".")[2] in modules:
            raise ImportError(f"{args[0]} is not allowed here")
    elif event == "open":
        if not isinstance(args[0], int) and (args[2] & changes or not inside(args[0])):
            raise PermissionError(f"{args[0]} is not to be opened here")
    elif event in ("os.listdir", "os.scandir"):
        if isinstance(args[0], int) or not inside(args[0]):
            raise PermissionError(f"{args[0]} is not to be listed here")
    elif event.startswith(rooms) and event not in ("os.putenv", "os.unsetenv"):
        raise PermissionError(f"{event} is not allowed here")

def passes(test):
    if isinstance(test, str):
        exec(test, names)
        return True
    held = io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(test["input"].encode()))
    sys.stdout = shown = io.TextIOWrapper(held, write_through=True)
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        pass
    shown.flush()
    return held.getvalue().decode().split() == test["output"].split()

for name, most in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (most, most))
sys.addaudithook(refuse)
code, names, passed = compile(code, "completion", "exec"), {"__name__": "completion"}, 0
if any(isinstance(test, str) for test in tests):
    exec(code, names)
for test in tests:
    try:
        passed += passes(test)
    except (Exception, SystemExit):
        pass
    os.pwrite(counts, f"{mark}{passed:9}".encode(), 0)
os._exit(0)
"""


def passed_tests(completions: list, tests: list[list], **kwargs) -> list[float]:
    """
    In [0, 1]; tests that come after one that takes too long are not passed, and none is if the code fails. At the
    default threshold, a success passes all tests.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    with ThreadPoolExecutor() as threads:  # they only wait
        return list(threads.map(_share, texts, tests))


@functools.cache
def apart() -> tuple[str, ...]:
    """The command that starts another in namespaces of its own; empty, with a warning, where there are none."""
    unshare = shutil.which("unshare")
    for more in (("--mount-proc",), ()):  # which a container may not allow
        command = (unshare, *NAMESPACES, *more)
        if unshare and not subprocess.run([*command, sys.executable, "-I", "-c", ""], capture_output=True).returncode:
            return command
    warnings.warn(
        "There are no namespaces for the code of completions (`unshare` is missing or not allowed), so only a hook "
        "inside Python keeps it from the network and from other processes. Use a container without a network.",
        stacklevel=2,
    )
    return ()


def _share(text: str, tests: list) -> float:
    blocks, command, mark = FENCE.findall(text), apart(), secrets.token_hex()
    limits = {"CPU": SECONDS, "AS": BYTES, "FSIZE": FILE_BYTES, "CORE": 0, "NOFILE": 64}
    limits["NPROC"] = PROCESSES if command else 0  # where all processes of the user count, none more
    limits = {f"RLIMIT_{name}": most for name, most in limits.items()}
    job = {"code": blocks[-1] if blocks else text, "tests": tests, "mark": mark, "limits": limits}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as counts,
        subprocess.Popen(
            [*command, sys.executable, "-I", "-c", RUNNER],
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=counts,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process,
    ):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(json.dumps(job).encode(), timeout=2 * SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts.seek(0)
        said = counts.read(FILE_BYTES).decode(errors="replace")
    count = said.removeprefix(mark).strip()
    return int(count) / len(tests) if said.startswith(mark) and count.isdigit() and tests else 0.0
