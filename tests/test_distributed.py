"""Real processes on the CPU. MULTI_CPU would start one without a word, so every test asserts the world size."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import distributed_run
import numpy as np
import pandas
import pytest
from safetensors.torch import load_file
from tiny import Seen, config, digit_reward, make_dataset, make_trainer
from torch.testing import assert_close

from trl_learnalign import Selection, select_prompts
from trl_learnalign.ground.store import Log


SCRIPT = Path(__file__).with_name("distributed_run.py")


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


# What `accelerate launch` makes of files such as those in examples/accelerate_configs, but for CPUs
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
FSDP1 = {
    "FSDP_VERSION": "1",
    "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "false",
}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "DS_ACCELERATOR": "cpu",
}
SHARDED = {
    "FSDP2": FSDP,
    "FSDP2 with CPU offload": FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
    "ZeRO-2": DEEPSPEED,
    "ZeRO-3": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def launch(task, path, processes, more=None):
    return launch_all([(task, path)], processes, more)[0]


def launch_all(tasks, processes, more=None):
    """Runs tasks, each in its directory, by the same processes; what each process has to say of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    pairs = [str(part) for pair in tasks for part in pair]
    done = subprocess.run(
        [*command, str(SCRIPT), *pairs], env=ENVIRONMENT | (more or {}), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = []
    for _, path in tasks:
        found.append([json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(processes)])
        assert [rank["world"] for rank in found[-1]] == [processes] * processes
    return found


def alone(task, path):
    """A task on one process: this one."""
    result = distributed_run.main(task, path)
    assert result["world"] == 1
    return result


TASKS = (
    *(
        "select",
        "select few",
        "select by a race",
        "select parts",
        "select for a target",
        "select by influence",
        "select with RLOO",
        "train",
        "train workers",
        "train straddling",
        "random",
        "save",
        "restart",
    ),
    *(
        "nothing fails",
        "reward fails",
        "reward fails in a part",
        "loss is not a number",
        "disk is full",
        "memory is full",
    ),
    *("nothing to learn on one", "taps", "checkpoint fails"),
    *("online", "online with hidden states", "online aligned", "online differs", "online cannot write"),
    "gradients",
    "online refilled",
    *("online draws otherwise", "online asks otherwise", "online reward returns texts"),
)
AGAIN = {
    "save": "resume",
    "online": "resume online",
    "online aligned": "resume online aligned",
    "online refilled": "resume online refilled",
    "gradients": "resume gradients",
    "reward fails": "select",
    "reward fails in a part": "select",
    "loss is not a number": "nothing fails",
    "disk is full": "nothing fails",
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """By task: its directory, and what each of two processes has to say."""
    path = tmp_path_factory.mktemp("first")
    tasks = [(task, path / task) for task in TASKS]
    ranks = launch_all(tasks, 2)
    return {task: (path, found) for (task, path), found in zip(tasks, ranks, strict=True)}


@pytest.fixture(scope="module")
def again(first, tmp_path_factory):
    """Two other processes, in copies of what the first have left."""
    path = tmp_path_factory.mktemp("again")
    for name in AGAIN:
        shutil.copytree(first[name][0], path / name)
    ranks = launch_all([(task, path / name) for name, task in AGAIN.items()], 2)
    return dict(zip(AGAIN, ranks, strict=True))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    path = tmp_path_factory.mktemp("four")
    tasks = [(task, path / task) for task in ("select", "select few")]
    return {task: (path, ranks) for (task, path), ranks in zip(tasks, launch_all(tasks, 4), strict=True)}


def load(path):
    return Selection.load(next((path / "learnalign").glob("step-*")))


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("select")])
def test_selection_is_the_same_for_any_number_of_processes(tmp_path, first, on_four, task, tally):
    runs = {1: (tmp_path, [alone(task, tmp_path)]), 2: first[task]} | ({4: on_four[task]} if task in on_four else {})
    one = load(tmp_path)
    for processes, (path, ranks) in runs.items():
        assert all(rank["indices"] == one.indices for rank in ranks)
        other = load(path)
        for column in one.scores.column_names:
            ours, theirs = (s.scores[column].to_pandas().astype(float).tolist() for s in (one, other))
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9, nan_ok=True), column
        rolled_out = Counter(row for rank in ranks for row in rank["rows"])
        assert set(rolled_out) == set(one.scores["index"].to_pylist())
        # a process with no prompt of its own left rolls out another's, and drops the result
        least = {"select few": 8 * processes, "select by a race": 2}.get(task, 8)
        assert min(rolled_out.values()) == least
        tally[f"selections on {processes} processes"] += 1
        if task in ("select", "select by a race"):
            files, table = rollouts_of(path)
            shards = [f"rollouts-{rank:05d}-of-{processes:05d}.parquet" for rank in range(processes)]
            assert files == (shards if processes > 1 else ["rollouts.parquet"])
            pandas.testing.assert_frame_equal(table, rollouts_of(tmp_path)[1])


def rollouts_of(path):
    files = sorted(path.glob("_learnalign/rollouts/*/rollouts*.parquet"))
    table = pandas.concat(map(pandas.read_parquet, files)).sort_values("index", kind="stable")
    return [file.name for file in files], table.reset_index(drop=True)


def test_measures_of_two_processes_serve_one(tmp_path, first):
    path = shutil.copytree(first["select"][0], tmp_path / "copy")
    for score in ("learnability", "alignment"):
        seen = Seen(digit_reward)
        trainer = make_trainer(path, reward=seen, dataset=make_dataset(23), per_device_train_batch_size=8)
        selection = select_prompts(trainer, config(projection_dim=1024, score=score))
        assert seen.rows == [] and load(first["select"][0]).scores["learnability"].equals(
            selection.scores["learnability"]
        )


@pytest.mark.parametrize("task", ["train", "train workers", "random"])
def test_prompts_that_reach_the_reward_function(first, task):
    path, ranks = first[task]
    assert ranks[0]["log"] == ranks[1]["log"] and ranks[0]["weights"] == ranks[1]["weights"]
    selection, size = load(path), ranks[0]["chunk_prompts"]
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


def test_groups_that_straddle_processes(first):
    """Two rollouts a process make one group of four in training; a selection keeps groups whole."""
    path, ranks = first["train straddling"]
    assert ranks[0]["log"] == ranks[1]["log"] and ranks[0]["weights"] == ranks[1]["weights"]
    selection = load(path)
    assert ranks[0]["chunk_prompts"] == 1 and set(ranks[0]["log"][1][1]) == set(selection.indices)
    stream = [chunk[0] for chunk in ranks[0]["chunks"][: ranks[0]["step"]]]
    before = selection.provenance["global_step"]
    rolled_out = Counter()
    for rank in ranks:
        trained = [index for index in stream for _ in range(2)]
        assert rank["rows"][: 2 * before] == trained[: 2 * before]
        assert rank["rows"][len(rank["rows"]) - len(trained) + 2 * before :] == trained[2 * before :]
        rolled_out.update(rank["rows"][2 * before : len(rank["rows"]) - len(trained) + 2 * before])
    assert set(rolled_out) == set(range(23)) and set(rolled_out.values()) <= {8, 16}  # an odd pool: one done twice


def test_resume_repeats_prompts_and_weights(first, again):
    for a, b in zip(first["save"][1], again["save"], strict=True):
        assert a["log"] == b["log"] and a["rows"][-16:] == b["rows"][-16:]
        assert len(b["rows"]) < len(a["rows"]) and a["weights"] == pytest.approx(b["weights"], rel=1e-6)


def adapter(path):
    """Of the last checkpoint."""
    last = max(path.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.split("-")[1]))
    return load_file(last / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "FSDP2" else pytest.mark.slow) for kind in SHARDED]
)
def test_sharded_weights_make_the_same_run(tmp_path, first, kind):
    """Through the trainer, accelerate and FSDP or DeepSpeed: selection, training, checkpoints, resuming."""
    if kind.startswith("ZeRO"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    expected_path, expected = first["save"]
    ranks = launch("save", tmp_path, 2, SHARDED[kind])
    trained = adapter(tmp_path)
    resumed = launch("resume", tmp_path, 2, SHARDED[kind])
    for one, other, again in zip(expected, ranks, resumed, strict=True):
        assert one["kind"] == "MULTI_CPU" and other["kind"] == again["kind"] == kind[:4].replace("ZeRO", "DEEPSPEED")
        assert one["log"] == other["log"] == again["log"] and len(one["log"]) == 2
        assert one["rows"] == other["rows"] and again["rows"] == other["rows"][-len(again["rows"]) :]
    ours, theirs = load(tmp_path).scores.to_pandas(), load(expected_path).scores.to_pandas()
    for column in ("success_rate", "alignment", "score", "gradient_norm"):
        assert ours[column].tolist() == pytest.approx(theirs[column].tolist(), rel=1e-5, abs=1e-6, nan_ok=True), column
    for weights in (trained, adapter(tmp_path)):
        assert_close(weights, adapter(expected_path), rtol=1e-4, atol=1e-6)
    # What measures are known by: the weights as a whole, in spite of the shards
    begun, stepped = ranks[0]["digests"], resumed[0]["digests"]
    assert begun["0"] == expected[0]["digests"]["0"] and stepped["3"] == begun["3"]
    assert len(set(begun.values())) == len(begun) == ranks[0]["step"] + 1


def test_shards_of_two_processes_go_on_as_the_weights_of_one(tmp_path):
    """
    The selection fails on one of two processes in its gradients; one process without FSDP rolls out nothing again.
    """
    failed = launch("sharded fails", tmp_path, 2, FSDP)
    assert all("are not finite" in rank["error"] for rank in failed), failed
    (again,) = launch("train at once", tmp_path, 1)
    assert "error" not in again and len(again["log"]) == 2
    assert len(again["rows"]) == again["step"] * again["chunk_prompts"] * 4  # training's own


@pytest.mark.slow
def test_fsdp1_makes_the_same_selection(tmp_path, first):
    """It wraps every layer of an adapter, too, and saves no state on CPUs."""
    path, one = first["train"]
    other = launch("train", tmp_path, 2, FSDP | FSDP1)
    digests = other[0]["digests"]
    assert digests["0"] == one[0]["digests"]["0"]
    assert len(set(digests.values())) == len(digests) == other[0]["step"] + 1
    assert other[0]["kind"] == "FSDP" and one[0]["log"] == other[0]["log"] and one[0]["rows"] == other[0]["rows"]
    ours, theirs = (load(directory).scores.to_pandas() for directory in (path, tmp_path))
    for column in ("success_rate", "alignment", "score", "gradient_norm"):
        assert ours[column].tolist() == pytest.approx(theirs[column].tolist(), rel=1e-5, abs=1e-6, nan_ok=True), column


def test_restart_is_the_same_on_both_ranks(first):
    _, ranks = first["restart"]
    assert ranks[0]["weights"] == ranks[1]["weights"] and ranks[0]["log"] == ranks[1]["log"]


def batches_in(path):
    """Finished batches of rollouts of a selection under way, of a prompt each."""
    for manifest in path.glob("_learnalign/*/rollouts/manifest.json"):
        return len(Log(manifest.parent, json.loads(manifest.read_text())["key"], 0))
    return 0


def test_a_run_killed_in_a_selection_resumes_into_the_same_selection(tmp_path):
    """SIGKILL, as soon as some batches of rollouts are finished; then one flag."""
    whole = alone("save", tmp_path / "whole")
    path = tmp_path / "killed"
    path.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "save", str(path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while batches_in(path) < 5:
        assert process.poll() is None and time.monotonic() < deadline, "the selection was never seen under way"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not list(path.glob("learnalign/*/selection.json"))
    done = batches_in(path)
    resumed = alone("resume last", path)
    assert resumed["log"] == whole["log"] and resumed["weights"] == whole["weights"]
    assert load(path).scores.equals(load(tmp_path / "whole").scores)
    # Finished prompts are not rolled out again: what reached the reward function is the rest of the pool,
    # eight rollouts each, and the training steps from the checkpoint on, a chunk of two prompts with four rollouts
    # each
    step = load(path).provenance["global_step"]
    assert len(resumed["rows"]) == (23 - done) * 8 + (resumed["step"] - step) * 2 * 4


@pytest.mark.parametrize(
    ("task", "cause"),
    [
        ("reward fails", "RewardError: The reward function `failing` failed.*does not know row 9.* / ValueError"),
        ("reward fails in a part", "RewardError: The reward function `failing` failed.*does not know row 9"),
        ("loss is not a number", "FloatingPointError: The gradients of the training prompts .* are not finite"),
        ("disk is full", "OSError: .*gradients/.* could not be written.*File too large"),
    ],
)
def test_what_fails_on_one_process_ends_all_with_its_cause(first, again, task, cause, tally):
    """Each process catches its error, so nothing but the package ends the others."""
    path, (other, failed) = first[task]
    assert re.search(cause, failed["error"])
    assert other["error"].startswith(
        "PeerError: The selection ends here, because it failed on another process. process 1: "
    )
    assert re.search(cause.split(" / ")[0], other["error"])
    assert abs(failed["seconds"] - other["seconds"]) < 10  # of one machine's clock: no time-out was waited for
    measures = path / "_learnalign" / "step-000000"
    assert list(measures.glob("rollouts/*.log")) and not list(measures.rglob(".*.tmp"))
    # Once corrected, it goes on: what was finished is still there, as long as the reward function is the same
    assert len(again[task][0]["indices"]) == 8
    tally["failures on one of two processes"] += 1


def test_nodes_with_disks_of_their_own(tmp_path):
    """Two nodes of a process each: each keeps, discards and deletes its own part of the measures."""

    def launch_nodes(task):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        nodes = []
        for rank in "01":
            (tmp_path / rank).mkdir(exist_ok=True)
            environment = ENVIRONMENT | where | {"RANK": rank, "LOCAL_RANK": "0"}
            command = [sys.executable, str(SCRIPT), task, str(tmp_path / rank)]
            nodes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        logs = [node.communicate(timeout=300)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], logs
        return logs

    keys = {}
    launch_nodes("loss is not a number")
    for rank in "01":
        log = tmp_path / rank / "_learnalign" / "step-000000" / "rollouts"
        assert [file.name for file in sorted(log.iterdir())] == [f"0000{rank}-00000.log", "manifest.json"]
        keys[rank] = json.loads((log / "manifest.json").read_text())["key"]
    assert all("is discarded" in log for log in launch_nodes("select"))  # of other settings
    for rank in "01":
        log = tmp_path / rank / "_learnalign" / "step-000000" / "rollouts"
        assert json.loads((log / "manifest.json").read_text())["key"] != keys[rank]
        shards = [file.name for file in (tmp_path / rank).glob("_learnalign/rollouts/*/rollouts*.parquet")]
        assert shards == [f"rollouts-0000{rank}-of-00002.parquet"]


def test_a_reward_that_fails_in_training_ends_all_processes(tmp_path):
    """In TRL's own step: the process that fails says why, and the other that it did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "train reward fails", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "RewardError: The reward function `broken` failed: ValueError: the grader broke" in done.stderr
    assert "RuntimeError: Process 1 failed in a generation for training" in done.stderr
    assert time.monotonic() - started < 100  # start included; the time-out of the process group is half an hour


def test_memory_full_on_one_process_changes_nothing_but_the_microbatches(first):
    (_, whole), (_, halved) = first["nothing fails"], first["memory is full"]
    assert whole[0]["indices"] == halved[0]["indices"] == halved[1]["indices"]


def test_a_process_without_anything_to_learn(first):
    path, ranks = first["nothing to learn on one"]
    table = load(path).scores.to_pandas()
    learnable = table["index"][table["learnability"] > 0]
    assert (learnable % 2 == 0).all() and len(learnable) == 12
    assert ranks[0]["indices"] == ranks[1]["indices"] and len(ranks[0]["indices"]) == 8


def test_resume_on_fewer_processes_is_exact_or_refused(tmp_path, first):
    """The stream of prompts is the same if `generation_batch_size` is; another one is refused."""
    path, whole = first["save"]
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="chunk_prompts was 4 and is 2"):
        alone("resume", tmp_path)
    resumed = alone("resume doubled", tmp_path)
    assert resumed["digests"]["3"] == whole[0]["digests"]["3"]
    assert resumed["log"] == whole[0]["log"] and resumed["chunks"] == whole[0]["chunks"]
    # One process now rolls out what two did: the same prompts, chunk by chunk
    size = resumed["chunk_prompts"]
    chunks = resumed["chunks"][resumed["step"] - 2 : resumed["step"]]
    assert resumed["rows"][-2 * size * 4 :] == [row for chunk in chunks for row in chunk for _ in range(4)]


def test_rewards_of_training_are_those_of_all_processes(first):
    """In the order of the chunk, the same on every process; the rows are each process's own."""
    path, (one, two) = first["taps"]
    assert one["rewards"] == two["rewards"] and [batch for batch, _ in one["rewards"]] == list(range(one["step"]))
    for rank in (one, two):
        assert rank["inputs"] == rank["rows"] and len(rank["rows"]) == 8 * one["step"]
    assert one["rows"] != two["rows"] and all(len(rewards) == 16 for _, rewards in one["rewards"])
    checkpoints = len(list(path.glob("checkpoint-*")))
    assert one["writers"] == [True] * checkpoints and two["writers"] == [False] * checkpoints and checkpoints > 2


def test_a_checkpoint_that_one_process_cannot_write_ends_all(first):
    path, (one, two) = first["checkpoint fails"]
    assert "no space left" in two["error"] and two["error"].startswith("OSError")
    assert one["error"].startswith("PeerError") and "process 1: OSError: no space left" in one["error"]
    assert one["step"] == two["step"] == 2 and not (path / "checkpoint-2" / "trainer_state.json").exists()


def but_for_completions(state):
    """A state without the number of rollouts whose completion another one has: on other processes they differ."""
    values, arrays = state
    return values, arrays | {"curriculum/kinds/totals": [kind[:-1] for kind in arrays["curriculum/kinds/totals"]]}


def test_an_online_run_chooses_the_same_on_any_number_of_processes(tmp_path, first):
    """Where the rewards are the same: here they depend on the prompts alone."""
    _, (one, two) = first["online"]
    whole = alone("online alone", tmp_path)
    assert one["chunks"] == two["chunks"] == whole["chunks"] and len(whole["chunks"]) == 10
    assert one["state"] == two["state"]
    assert but_for_completions(one["state"]) == but_for_completions(whole["state"])
    chunks = [whole["chunks"][str(i)] for i in range(10)]
    assert whole["rows"] == [row for chunk in chunks for row in chunk for _ in range(4)]
    for rank, half in ((one, slice(0, 2)), (two, slice(2, 4))):
        assert rank["rows"] == [row for chunk in chunks for row in chunk[half] for _ in range(4)]
    for rank in (one, two, whole):  # four prompts a step, and eight
        few, enough = rank["warnings"]
        assert "An optimizer step trains on 4 prompts (16 rollouts, 4 for each)" in few
        assert "An optimizer step trains" not in (enough or "")
    _, (one, two) = first["online with hidden states"]
    assert one["chunks"] == two["chunks"] and one["state"] == two["state"] != whole["state"]


def test_an_online_run_by_the_gradients_of_both_processes(first, again):
    """They choose the same, other prompts than without gradients, and so does the run that is resumed."""
    _, ranks = first["online aligned"]
    one, two = ranks
    assert one["chunks"] == two["chunks"] != first["online with hidden states"][1][0]["chunks"]
    assert one["state"] == two["state"]
    values, arrays = one["state"]
    assert values["curriculum"]["alignment"]["trusted"] and len(arrays["curriculum/alignment/sketches"]) >= 8
    for rank, resumed in zip(ranks, again["online aligned"], strict=True):
        assert resumed["rows"] == rank["rows"][-7 * 8 :] and resumed["state"] == rank["state"]


def test_batches_are_refilled_and_replayed_alike_on_both_processes(first, again):
    """Also where a group is on both, and a run that is resumed."""
    _, (one, two) = first["online refilled"]
    assert one["state"] == two["state"] and len(one["rows"]) == len(two["rows"]) > 10 * 4
    numbers = [batch for rank in (one, two) for batch in rank["trained"]]
    assert {size for size, _, _ in numbers} == {6} and not any(dead for _, dead, _ in numbers)
    assert one["replayed"] == two["replayed"] > 5  # groups
    assert [items for *_, items in one["trained"]] == [items for *_, items in two["trained"]]
    for rank, resumed in zip((one, two), again["online refilled"], strict=True):
        assert resumed["state"] == rank["state"] and resumed["trained"] == rank["trained"][3:]


def test_an_online_run_resumed_on_two_processes_or_on_one(tmp_path, first, again):
    path, whole = first["online"]
    for rank, resumed in zip(whole, again["online"], strict=True):
        assert resumed["rows"] == rank["rows"][3 * 8 :] and resumed["state"] == rank["state"]
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="chunk_prompts was 4 and is 2"):
        alone("resume online", tmp_path)
    resumed = alone("resume online doubled", tmp_path)
    assert resumed["state"] == whole[0]["state"] and len(resumed["rows"]) == 7 * 16


def test_schedules_that_differ_end_both_processes_at_the_next_checkpoint(first):
    path, ranks = first["online differs"]
    for rank in ranks:
        assert rank["error"].startswith("RuntimeError: The processes have different schedules")
        assert rank["step"] == 3
    assert (path / "checkpoint-2/trainer_state.json").is_file()
    assert not (path / "checkpoint-3/trainer_state.json").exists()


def test_schedules_that_draw_otherwise_end_both_processes_with_the_next_rewards(first):
    """Though no checkpoint is saved, where they would be compared."""
    path, ranks = first["online draws otherwise"]
    for rank in ranks:
        assert rank["error"].startswith("RuntimeError: The processes have drawn different prompts")
        assert 3 <= rank["step"] <= 5 and len({rank["step"] for rank in ranks}) == 1
    assert not list(path.glob("checkpoint-*"))


def test_the_main_process_decides_whose_completions_are_asked_for(first):
    """Else one process would wait for the other in a collective that it never enters."""
    _, (one, two) = first["online asks otherwise"]
    assert one["chunks"] == two["chunks"] == first["online"][1][0]["chunks"] and "error" not in one
    assert one["step"] == two["step"] == 10


def test_rewards_that_are_no_numbers_end_both_processes(first):
    _, (one, two) = first["online reward returns texts"]
    assert two["error"].startswith(
        "RewardError: The reward function `digit_reward` failed: TypeError: reward 0 is '1.0'"
    )
    assert one["error"].startswith("RuntimeError: Process 1 failed in a generation for training")
    assert one["step"] == two["step"] == 0


def test_a_schedule_that_one_process_cannot_write_ends_all(first):
    path, (one, two) = first["online cannot write"]
    assert one["error"] == "OSError: no space left" and one["step"] == two["step"] == 3
    assert two["error"].startswith("PeerError") and "process 0: OSError: no space left" in two["error"]
    assert not (path / "checkpoint-3/trainer_state.json").exists()


def as_arrays(given):
    return {int(number): np.array(sketch) for number, sketch in given.items()}


def test_gradients_of_groups_that_are_on_two_processes(first, again):
    """Against the plain backwards of both, also after a resume; the same on both, bit for bit."""
    _, ranks = first["gradients"]
    given, compared, both = as_arrays(ranks[0]["given"]), 0, 0
    assert ranks[0]["given"] == ranks[1]["given"] and ranks[0]["reasons"] == ranks[1]["reasons"] == []
    assert set(given) == set(range(3 * 6))
    for chunk, parts in enumerate(zip(*(rank["oracle"] for rank in ranks), strict=True)):
        assert not any(parts[0]["2"]) and not any(parts[1]["0"])  # and some of the other is on both
        both += any(parts[0]["1"]) and any(parts[1]["1"])
        for place in range(3) if chunk < 6 else ():
            expected = sum(np.array(part[str(place)]) for part in parts)
            found = given[3 * chunk + place]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4 * np.abs(expected).max())
            compared += expected.any()
    assert compared > 10 and both >= 2
    resumed = as_arrays(again["gradients"][0]["given"])
    assert set(resumed) == set(range(9, 18)) and again["gradients"][1]["given"] == again["gradients"][0]["given"]
    assert all((resumed[number] == given[number]).all() for number in resumed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FSDP1", *SHARDED])
def test_gradients_with_sharded_weights(tmp_path, first, kind):
    """And an online run that chooses by them: where the last digits differ, both processes still choose the same."""
    if kind.startswith("ZeRO"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    _, expected = first["gradients"]
    environment = FSDP | FSDP1 if kind == "FSDP1" else SHARDED[kind]
    (tmp_path / "gradients").mkdir()
    twice = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"} if kind.startswith("ZeRO") else {}
    ranks = launch("gradients", tmp_path / "gradients", 2, environment | twice)
    plain, given = as_arrays(expected[0]["given"]), as_arrays(ranks[0]["given"])
    assert ranks[0]["kind"] != "MULTI_CPU" and ranks[0]["reasons"] == [] and given.keys() == plain.keys()
    for number, sketch in plain.items():
        assert given[number] == pytest.approx(sketch, rel=1e-3, abs=1e-4 * np.abs(sketch).max())
    if kind != "FSDP1":  # which saves no state on CPUs, and an online run saves one after each step
        (tmp_path / "online").mkdir()
        one, two = launch("online aligned", tmp_path / "online", 2, environment)
        assert one["chunks"] == two["chunks"] and one["state"] == two["state"] and one["step"] == 10
        values, arrays = one["state"]
        assert values["curriculum"]["alignment"]["trusted"] and len(arrays["curriculum/alignment/sketches"]) >= 8
