"""The reward that runs code, in examples/code_reward.py: what counts, and code that tries to get out."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import code_reward
from code_reward import passed_tests


ADD = "def add(a, b):\n    return a + b\n"
SUMS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 5"]


@pytest.fixture(autouse=True)
def one_second(monkeypatch):
    monkeypatch.setattr(code_reward, "SECONDS", 1)


def test_the_share_of_tests_passed():
    completions = {
        f"Here:\n```python\n{ADD}```": 2 / 3,
        f"```py\n{ADD}```\nthat is all": 2 / 3,
        "```Python3 \r\ndef add(a, b): return a + b\r\n```": 2 / 3,
        "import math, random, collections, re, heapq, functools, itertools, datetime, threading\n" + ADD: 2 / 3,
        "def add(a, b): return 5": 1 / 3,
        "def add(a, b):\n    while a: pass\n    return 0": 0,  # none after the first, which never ends
        "def add(a, b):\n    while a > 1: pass\n    return a + b": 2 / 3,
        "def add(a, b): exit()": 0,
        "def add(a, b) return": 0,  # does not compile
        "import sys; sys.stdout.write('3'); raise SystemExit": 0,
        "print('9' * 10**6)\n" + ADD: 2 / 3,
        "": 0,
    }
    messages = [[{"role": "assistant", "content": ADD}]]
    rewards = passed_tests([*completions, *messages], [SUMS] * (len(completions) + 1))
    assert rewards == pytest.approx([*completions.values(), 2 / 3])
    assert passed_tests([ADD], [[]]) == [0]


def test_programs_with_inputs_and_outputs():
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "5 5", "output": "10\n"}, {"input": "1 1", "output": "3"}]
    programs = {
        "print(sum(map(int, input().split())))": 2 / 3,
        "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))": 2 / 3,
        "if __name__ == '__main__':\n    print(3)\n    exit()": 2 / 3,
        "print(input() + 1)": 0,
    }
    assert passed_tests([*programs], [tests] * len(programs)) == pytest.approx([*programs.values()])


# Code that ends well only if it gets out, and what keeps it in: limits, namespaces, the hook
GETS_OUT = {
    "endless loop": ("while True: pass", "limits"),
    "endless sleep": ("import time\nwhile True: time.sleep(9)", "limits"),
    "memory hog": ("x = 'a' * 10**10", "limits"),
    "huge file": ("open('big', 'wb', 0).write(bytes(10**6)) == 10**6 or 1 / 0", "limits"),
    "fork bomb": ("import os\nos.fork()\nos.fork()", "hook"),
    "connects": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", "namespaces hook"),
    "kills the parent": ("import os\nos.kill({pid}, 9)", "namespaces hook"),
    "environment of the parent": ("assert open('/proc/{pid}/environ', 'rb').read()", "namespaces hook"),
    "own environment": ("import os\nassert 'SECRET_TOKEN' in os.environ", "limits"),
    "secret in the directory": ("open('secret.txt').read()", "limits"),
    "secret by its path": ("open({secret!r}).read()", "hook"),
    "lists the directory": ("import os\nassert os.listdir({folder!r})", "hook"),
    "removes the secret": ("import os\nos.remove({secret!r})", "hook"),
    "starts a program": ("import subprocess\nsubprocess.run(['true'], check=True)", "hook"),
    "native code": ("import ctypes\nctypes.CDLL(None).getpid()", "hook"),
    "knows the mark": ("import sys, os\nos.write(1, b'0' * 99)\nassert len(sys.orig_argv[-1]) < 99", "limits"),
}


@pytest.mark.parametrize("layers", ["limits namespaces hook", "limits namespaces", "limits hook"])
def test_code_that_tries_to_get_out(tmp_path, monkeypatch, layers):
    """With all that keeps it in, and with the namespaces or the hook alone."""
    if "namespaces" in layers and not code_reward.apart():
        pytest.skip("there are no namespaces here")
    if "namespaces" not in layers:
        monkeypatch.setattr(code_reward, "apart", tuple)
    if "hook" not in layers:
        monkeypatch.setattr(code_reward, "RUNNER", code_reward.RUNNER.replace("sys.addaudithook(refuse)", ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "hf_secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = {"port": server.getsockname()[1], "pid": os.getpid(), "secret": str(secret), "folder": str(tmp_path)}
        held = {name: code for name, (code, by) in GETS_OUT.items() if set(by.split()) & set(layers.split())}
        tried = {name: code.format(**known) for name, code in held.items()}
        started = time.monotonic()
        rewards = passed_tests([code + "\n" + ADD for code in tried.values()], [SUMS[:2]] * len(tried))
    assert dict(zip(tried, rewards, strict=True)) == dict.fromkeys(tried, 0)
    assert time.monotonic() - started < 60 and secret.read_text() == "secret"
    assert passed_tests([ADD], [SUMS[:2]]) == [1]


def test_without_these_it_does_get_out(tmp_path, monkeypatch):
    """So that the tests above fail where a layer is missing."""
    monkeypatch.setattr(code_reward, "apart", tuple)
    monkeypatch.setattr(code_reward, "RUNNER", code_reward.RUNNER.replace("sys.addaudithook(refuse)", ""))
    (tmp_path / "secret.txt").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = {"port": server.getsockname()[1], "pid": os.getpid(), "folder": str(tmp_path)}
        known["secret"] = str(tmp_path / "secret.txt")
        names = ("connects", "environment of the parent", "secret by its path", "lists the directory", "native code")
        codes = [GETS_OUT[name][0].format(**known) + "\n" + ADD for name in names]
        assert passed_tests([*codes, *codes], [SUMS[:2]] * 10) == [1] * 10
    assert passed_tests([GETS_OUT["removes the secret"][0].format(**known) + "\n" + ADD], [SUMS[:2]]) == [1]
    assert not (tmp_path / "secret.txt").exists()


def test_what_it_started_ends_with_it(tmp_path, monkeypatch):
    """A fork bomb that no hook stops: in its namespace all ends with the first process."""
    if not code_reward.apart():
        pytest.skip("there are no namespaces here")
    monkeypatch.setattr(code_reward, "RUNNER", code_reward.RUNNER.replace("sys.addaudithook(refuse)", ""))
    beats = tmp_path / "beats"
    code = "import os, time\nfor _ in range(4): os.fork()\nos.setsid() if os.getpid() > 1 else None\n"
    code += (
        f"while True:\n    os.close(os.open({str(beats)!r}, os.O_CREAT)); os.utime({str(beats)!r}); time.sleep(0.01)"
    )
    assert passed_tests([code], [SUMS]) == [0] and beats.exists()
    last = beats.stat().st_mtime_ns
    time.sleep(0.3)
    assert beats.stat().st_mtime_ns == last


def test_without_namespaces_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(code_reward.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="only a hook inside Python keeps it from the network"):
        assert code_reward.apart.__wrapped__() == ()
