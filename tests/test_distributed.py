"""Real processes on the CPU. MULTI_CPU would start one without a word, so every test asserts the world size."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from trl_learnalign import Selection


SCRIPT = Path(__file__).with_name("distributed_run.py")


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(task, path, processes):
    path.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(SCRIPT), task, str(path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert [rank["world"] for rank in ranks] == [processes] * processes
    return ranks


def load(path):
    return Selection.load(next((path / "learnalign").glob("step-*")))


@pytest.mark.parametrize("task", ["select", "select few"])
def test_selection_is_the_same_for_any_number_of_processes(tmp_path, task):
    runs = {processes: launch(task, tmp_path / str(processes), processes) for processes in (1, 2, 3)}
    one = load(tmp_path / "1")
    for processes, ranks in runs.items():
        assert all(rank["indices"] == one.indices for rank in ranks)
        other = load(tmp_path / str(processes))
        for column in one.scores.column_names:
            ours, theirs = (s.scores[column].to_pandas().astype(float).tolist() for s in (one, other))
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9, nan_ok=True), column
        rolled_out = Counter(row for rank in ranks for row in rank["rows"])
        assert set(rolled_out) == set(one.scores["index"].to_pylist())
        # a process with no prompt of its own left rolls out another's, and drops the result
        assert min(rolled_out.values()) == (8 if task == "select" else 8 * processes)


@pytest.mark.parametrize("task", ["train", "train workers", "random"])
def test_prompts_that_reach_the_reward_function(tmp_path, task):
    ranks = launch(task, tmp_path, 2)
    assert ranks[0]["log"] == ranks[1]["log"] and ranks[0]["weights"] == ranks[1]["weights"]
    selection, size = load(tmp_path), ranks[0]["chunk_prompts"]
    (_, none), (start, chosen) = ranks[0]["log"]
    assert none == [] and set(chosen) == set(selection.indices)
    trained = []
    for chunk in ranks[0]["chunks"][: ranks[0]["step"]]:
        half = len(chunk) // 2
        for rank, part in zip(ranks, (chunk[:half], chunk[half:]), strict=True):
            trained.append((rank, part))
    for rank in ranks:  # each rank trained on its half of every chunk, groups of four rollouts whole
        stream = [index for owner, part in trained if owner is rank for index in part for _ in range(4)]
        rows = rank["rows"]
        before = selection.provenance["global_step"] * size // 2 * 4  # then the rollouts of the selection
        assert rows[:before] == stream[:before]
        assert rows[len(rows) - len(stream) + before :] == stream[before:]
    counts = Counter(index for chunk in ranks[0]["chunks"][start : ranks[0]["step"]] for index in chunk)
    assert set(counts) == set(chosen) and max(counts.values()) - min(counts.values()) <= 1


def test_resume_repeats_prompts_and_weights(tmp_path):
    whole = launch("save", tmp_path, 2)
    resumed = launch("resume", tmp_path, 2)
    for a, b in zip(whole, resumed, strict=True):
        assert a["log"] == b["log"] and a["rows"][-16:] == b["rows"][-16:]
        assert a["weights"] == pytest.approx(b["weights"], rel=1e-6)


def test_restart_is_the_same_on_both_ranks(tmp_path):
    ranks = launch("restart", tmp_path, 2)
    assert ranks[0]["weights"] == ranks[1]["weights"] and ranks[0]["log"] == ranks[1]["log"]


def test_a_run_killed_in_a_selection_resumes_into_the_same_selection(tmp_path):
    """SIGKILL, as soon as some batches of rollouts are in the journal; then one flag."""
    (whole,) = launch("save", tmp_path / "whole", 1)
    path = tmp_path / "killed"
    path.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "save", str(path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(path.glob("learnalign/*/journal/rollouts-*.parquet"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, "the selection was never seen under way"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not list(path.glob("learnalign/*/selection.json"))
    done = len(list(path.glob("learnalign/*/journal/rollouts-*.parquet")))
    (resumed,) = launch("resume last", path, 1)
    assert resumed["log"] == whole["log"] and resumed["weights"] == whole["weights"]
    assert load(path).scores.equals(load(tmp_path / "whole").scores)
    # Prompts that were in the journal are not rolled out again: what reached the reward function is the rest of the pool,
    # eight rollouts each, and the training steps from the checkpoint on, a chunk of two prompts with four rollouts each
    step = load(path).provenance["global_step"]
    assert len(resumed["rows"]) == (23 - done) * 8 + (resumed["step"] - step) * 2 * 4
