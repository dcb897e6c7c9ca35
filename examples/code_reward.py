"""
A reward that runs code: the share of a row's tests that a completion passes.

    trl-learnalign select --config run.yaml --reward_funcs examples/code_reward.py:passed_tests

Rows have a column `tests` of lists of assert statements. Each completion runs in a separate process with limits on
time, memory and files, so that a faulty completion does not stop the trainer. This is no sandbox against malicious
code: run such code in a container without a network.
"""

import re
import secrets
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor


SECONDS, BYTES = 5, 1 << 30
FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
RUNNER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
names = {{}}
exec({code!r}, names)
passed = 0
for test in {tests!r}:
    try:
        exec(test, names)
        passed += 1
    except Exception:
        pass
sys.__stdout__.write("{mark}" + str(passed))
"""


def passed_tests(completions: list, tests: list[list[str]], **kwargs) -> list[float]:
    """In [0, 1]; 0 if the code fails or takes too long. At the default threshold, a success passes all tests."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    with ThreadPoolExecutor() as threads:  # they only wait
        return list(threads.map(_share, texts, tests))


def _share(text: str, tests: list[str]) -> float:
    blocks = FENCE.findall(text)
    code = blocks[-1] if blocks else text
    mark = secrets.token_hex()  # which the code cannot print ahead of its tests
    program = RUNNER.format(seconds=SECONDS, bytes=BYTES, code=code, tests=tests, mark=mark)
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                capture_output=True,
                text=True,
                timeout=2 * SECONDS,
                errors="replace",
            )
    except subprocess.TimeoutExpired:
        return 0.0
    _, found, count = done.stdout.rpartition(mark)
    return int(count) / len(tests) if found and count.isdigit() and tests else 0.0
