"""A process that dies, freezes or gets stuck, where no launcher ends the other: it is named, and a slow one is not."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from trl_learnalign.ground.peers import Peers


SCRIPT = Path(__file__).with_name("peers_run.py")
GONE = (
    "PeerError: The key-value store of torch.distributed, which the main process or its launcher keeps, does not "
    "answer"
)


def run(task, path, ends=(0, 1)):
    """Return the output of the processes in `ends`, and the exit codes; the others are killed afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), task, str(path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [
            processes[rank].communicate(timeout=150)[0] for rank in ends
        ]  # no time-out: it does not wait for ever
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs, [process.returncode for process in processes]


def test_a_slow_process_is_waited_for_and_a_dead_one_is_named(tmp_path):
    """Slow by more than the silence of a dead one, once in a reward function, once in a microbatch."""
    (main, other), codes = run("slow", tmp_path)
    assert codes == [0, -signal.SIGKILL], main
    assert "selected" in main and "selected" in other
    assert "PeerError: Process 1 sent no heartbeat for 4 s: it was killed, or its node is lost" in main
    assert "threads []" in main


def test_a_dead_main_process_is_named(tmp_path):
    """
    And before, both refuse with the same words to resume where no checkpoint is complete, as the main process finds.
    """
    (tmp_path / "checkpoint-1").mkdir()
    (other,), codes = run("main killed", tmp_path, ends=[1])
    refused = [(tmp_path / f"refused-{rank}.txt").read_text() for rank in range(2)]
    assert refused[0].replace("rank 0", "rank 1") == refused[1]
    assert refused[0].startswith("rank 0: ValueError: None of the checkpoints")
    assert codes[0] == -signal.SIGKILL and codes[1] == 0, other
    assert GONE in other and "process 0 has ended, was killed, or its node is lost" in other


def test_what_fails_on_the_main_process_is_known_though_the_store_ends_with_it(tmp_path):
    """The other hears of it while it computes, from its own thread; the main process stays that long and no longer."""
    (main, other), codes = run("fails", tmp_path)
    assert codes == [0, 0]
    assert "ValueError: the policy is gone" in main
    assert (
        "PeerError: The selection ends here, because it failed on another process. process 0: ValueError: the p"
        in other
    )


def test_what_one_node_lacks_ends_both_before_anything_is_generated(tmp_path):
    """When the trainer is built, and in `select_prompts`."""
    (main, other), codes = run("target missing", tmp_path)
    assert codes == [0, 0]
    assert other.count("FileNotFoundError: `target_dataset` is") == 2, other
    assert main.count("failed on another process. process 1: FileNotFoundError: `target_dataset` is") == 2, main


@pytest.mark.slow
def test_a_main_process_that_does_not_answer_is_named(tmp_path):
    """After the loss of a node the connection stays open and nothing comes."""
    (other,), _ = run("main frozen", tmp_path, ends=[1])
    assert GONE in other and "no answer for 4 s" in other


@pytest.mark.slow
def test_a_process_that_is_stuck_is_named_after_the_time_out_of_the_process_group(tmp_path):
    (main,), _ = run("stuck", tmp_path, ends=[0])
    assert "PeerError: Process 1 made no progress for 8 s, which is the time-out of the process group" in main


def test_a_torch_without_its_store_is_found_when_the_trainer_is_built(monkeypatch):
    accelerator = SimpleNamespace(process_index=0, num_processes=2)
    Peers(accelerator)
    monkeypatch.delattr(dist.distributed_c10d, "_get_default_store")
    with pytest.raises(RuntimeError, match=rf"torch {re.escape(torch.__version__)} .*`_get_default_store`.*Install"):
        Peers(accelerator)
    Peers(SimpleNamespace(process_index=0, num_processes=1))
