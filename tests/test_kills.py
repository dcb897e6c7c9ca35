"""Runs killed with SIGKILL at a moment drawn by seed and resumed with one flag, against runs never killed."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_learnalign import Selection


SCRIPT = Path(__file__).with_name("killed_run.py")
CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate_configs"
IN_CI = {"staged": (1,), "online": (1,)}  # two processes each; the others are slow


def start(path, processes, schedule="staged", **environment):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "two_cpu_processes.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run(
        [*command, str(SCRIPT), str(path), schedule], env=environment, capture_output=True, text=True, timeout=300
    )


def start_again(path, processes, tally, schedule="staged", **environment):
    """With one flag; where no checkpoint is complete, as that error says, once they are deleted."""
    checkpoints = list(path.glob("checkpoint-*"))
    unfinished = [checkpoint for checkpoint in checkpoints if not is_json(checkpoint / "trainer_state.json")]
    done = start(path, processes, schedule, **environment)
    refused = f"None of the checkpoints in '{path}' is complete" in done.stderr
    assert refused or not checkpoints or len(unfinished) < len(checkpoints), "it started over in silence"
    if refused:
        assert done.returncode != 0 and all(f"'{checkpoint}': " in done.stderr for checkpoint in checkpoints)
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        tally["runs without a whole checkpoint"] += 1
        done = start(path, processes, schedule, **environment)
    return done


def is_json(file):
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):
        return False


def outcome(path, processes):
    """State of the schedule, prompts by step, selections and final weights of a finished run."""
    ranks = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert [rank["world"] for rank in ranks] == [processes] * processes
    assert all(rank["log"] == ranks[0]["log"] and rank["step"] == 9 for rank in ranks)
    prompts = []
    for rank in range(processes):
        lines = (path / f"prompts-{rank}.jsonl").read_text().splitlines()
        prompts.append(dict(json.loads(line) for line in lines))  # of a step done twice, the second counts
    selections = [Selection.load(directory) for directory in sorted((path / "learnalign").glob("step-*"))]
    return ranks[0], prompts, selections, load_file(path / "final-0.safetensors")


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    outcomes = {}

    def run(processes, schedule="staged"):
        if (processes, schedule) not in outcomes:
            path = tmp_path_factory.mktemp("whole") / "run"
            done = start(path, processes, schedule)
            assert done.returncode == 0, done.stderr[-4000:]
            outcomes[processes, schedule] = outcome(path, processes)
        return outcomes[processes, schedule]

    return run


@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        pytest.param(schedule, seed, marks=[] if seed in IN_CI[schedule] else pytest.mark.slow)
        for schedule, number in {"staged": 50, "online": 30}.items()
        for seed in range(number)
    ],
)
def test_a_killed_run_ends_as_one_never_killed(never_killed, tmp_path, schedule, seed, tally):
    processes = 1 + seed % 2
    whole, prompts, selections, weights = never_killed(processes, schedule)
    draw = random.Random(seed)
    path = tmp_path / "run"
    kinds = sorted(set(whole["events"]))
    survived = []
    for _ in range(1 + (seed % 3 == 0)):  # every third run is aimed at twice
        kind = draw.choice(kinds)
        moment = draw.choice([n for n, name in enumerate(whole["events"]) if name == kind])
        rank = draw.randrange(processes)
        killed = start_again(path, processes, tally, schedule, KILL_AT=str(moment), KILL_RANK=str(rank))
        if (path / "rank-0.json").exists():
            break  # a resumed run, or another rank, has fewer events: it came through
        assert killed.returncode != 0
        survived.append(kind)
    resumed = start_again(path, processes, tally, schedule)
    assert resumed.returncode == 0, f"killed at: {kind}\n{resumed.stderr[-4000:]}"
    ours = outcome(path, processes)
    assert ours[0]["log"] == whole["log"] and ours[1] == prompts
    assert len(ours[2]) == len(selections) == (2 if schedule == "staged" else 0)
    for a, b in zip(ours[2], selections, strict=True):
        assert a.indices == b.indices
        assert a.scores.equals(b.scores) if processes == 1 else a.scores["rank"].equals(b.scores["rank"])
    for name in weights:
        if processes == 1:
            assert torch.equal(ours[3][name], weights[name]), kind
        else:
            torch.testing.assert_close(ours[3][name], weights[name], rtol=1e-6, atol=1e-6)
    assert not list(path.rglob(".*.tmp"))
    assert [file.name for file in (path / "_learnalign").iterdir()] == ["lock"]
    for kind in survived:
        tally[f"kills of {processes}: {kind.split(',')[0]}"] += 1


@pytest.mark.slow
def test_a_run_killed_in_its_first_checkpoint_is_refused_and_ends_the_same_when_that_is_deleted(
    never_killed, tmp_path, tally
):
    whole, prompts, _, weights = never_killed(1)
    path = tmp_path / "run"
    start(path, 1, KILL_AT=str(whole["events"].index("checkpoint, weights, stage 0")))
    before = tally["runs without a whole checkpoint"]
    assert start_again(path, 1, tally).returncode == 0
    assert tally["runs without a whole checkpoint"] == before + 1
    ours = outcome(path, 1)
    assert ours[0]["log"] == whole["log"] and ours[1] == prompts
    assert all(torch.equal(ours[3][name], weights[name]) for name in weights)
