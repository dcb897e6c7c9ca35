"""One run per directory, whole checkpoints, files that cannot be written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import Seen, assert_same_weights, config, digit_reward, make_model, make_trainer, weights
from transformers import TrainerCallback

from trl_learnalign import select_prompts
from trl_learnalign.ground.disk import DirectoryLock, write_json
from trl_learnalign.run.checkpoints import damage, survey, whole_checkpoint


HOLDER = """
import sys, time
from pathlib import Path
from trl_learnalign.ground.disk import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has the directory of `tmp_path / "shared"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "shared" / "learnalign")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_runs_in_one_directory_notice_it(tmp_path, other_run):
    message = rf"Another run is using '.*shared/learnalign' \(process {other_run.pid} on .*pass another `output_dir`"
    with pytest.raises(RuntimeError, match=message):
        make_trainer(tmp_path / "shared", config()).train()
    with pytest.raises(RuntimeError, match=message):
        select_prompts(make_trainer(tmp_path / "shared"), config())
    assert [file.name for file in (tmp_path / "shared" / "_learnalign").iterdir()] == ["lock"]
    select_prompts(make_trainer(tmp_path / "of its own"), config())  # other directories are not concerned
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    select_prompts(make_trainer(tmp_path / "shared"), config())  # what a dead run leaves behind locks nothing


def test_a_process_may_take_its_own_lock_again(tmp_path):
    path = tmp_path / "learnalign"
    first, second = DirectoryLock(path), DirectoryLock(path)
    first.release()
    first.release()
    assert DirectoryLock._held[path.resolve()][1] == 1
    second.release()
    assert tmp_path.resolve() not in DirectoryLock._held


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    lock = DirectoryLock(tmp_path / "learnalign")
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        time.sleep(0.1)
        lock.release()
        DirectoryLock(tmp_path / "learnalign").release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_killed_run_left_beside_its_selection_is_removed(tmp_path):
    select_prompts(make_trainer(tmp_path), config())
    path = tmp_path / "learnalign" / "step-000000"
    whole = sorted(path.iterdir())
    for step in (0, 3):  # one at a step that this run has not
        journal = tmp_path / "_learnalign" / f"step-{step:06d}"
        journal.mkdir(exist_ok=True)
        (journal / "manifest.json").write_text('{"key": "of another run"}')
        (journal / ".features-00.safetensors.123.tmp").write_text("half")
    for directory in (path, path.parent, tmp_path / "_learnalign"):
        (directory / ".selection.json.123.tmp").write_text("half")
    select_prompts(make_trainer(tmp_path), config(num_prompts=7))
    assert sorted(path.iterdir()) == whole
    assert [file.name for file in path.parent.iterdir()] == ["step-000000"]
    assert sorted(file.name for file in (tmp_path / "_learnalign").iterdir()) == ["lock", "step-000000"]
    assert not list(tmp_path.rglob(".*.tmp")) and not list(tmp_path.rglob("features-*"))


def test_a_failed_run_lets_the_next_one_in(tmp_path):
    def failing(completions, **kwargs):
        raise ValueError("not today")

    with pytest.raises(RuntimeError, match="`failing` failed: ValueError: not today"):
        select_prompts(make_trainer(tmp_path, reward=failing), config())
    assert (tmp_path / "learnalign").resolve() not in DirectoryLock._held


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    trainer = make_trainer(path, config(), num_train_epochs=2, save_strategy="steps", save_steps=2)
    trainer.train()
    return path, weights(trainer)


def copy(source, target):
    subprocess.run(["cp", "-r", f"{source}/.", str(target)], check=True)
    return target


def resume_from(path):
    return whole_checkpoint(path, True, [survey(path, True)])


FILES = (
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_cut_short_is_passed_over(checkpoints, tmp_path, name, caplog, tally):
    tally["nonsense: checkpoints cut short"] += 1
    path = copy(checkpoints[0], tmp_path)
    steps = sorted(int(file.name.split("-")[1]) for file in path.glob("checkpoint-*"))
    last = path / f"checkpoint-{steps[-1]}"
    assert damage(last) is None and resume_from(path) == str(last)
    os.truncate(last / name, os.path.getsize(last / name) // 2)
    assert name in damage(last)
    assert resume_from(path) == str(path / f"checkpoint-{steps[-2]}")
    assert f"'{last}' is not complete" in caplog.text
    with pytest.raises(ValueError, match=f"The checkpoint '{last}' is not complete: .*{name}"):
        make_trainer(path, config()).train(resume_from_checkpoint=str(last))
    (last / name).unlink()
    if name == "trainer_state.json":
        assert "trainer_state.json" in damage(last)


def test_a_checkpoint_without_the_random_state_of_a_process(checkpoints, tmp_path):
    path = copy(checkpoints[0], tmp_path) / "checkpoint-2"
    document = json.loads((path / "trainer_state.json").read_text())
    document["stateful_callbacks"]["learnalign"]["num_processes"] = 2
    (path / "trainer_state.json").write_text(json.dumps(document))
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    assert damage(path) == "rng_state_1.pth is missing"
    assert damage(path, shared=False) is None  # it is on the disk of another node
    (path / "rng_state_0.pth").unlink()
    assert damage(path) is None  # `save_only_model`


def test_a_run_with_a_checkpoint_cut_short_ends_the_same(checkpoints, tmp_path):
    path = copy(checkpoints[0], tmp_path)
    for file in path.glob("checkpoint-*"):
        if int(file.name.split("-")[1]) > 2:
            (file / "trainer_state.json").unlink()
    trainer = make_trainer(path, config(), num_train_epochs=2, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(weights(trainer), checkpoints[1])


def test_files_of_a_callback_in_a_checkpoint_are_none_of_our_business(tmp_path, caplog):
    """In formats that Trainer does not write under these endings, and damaged ones."""

    class Samples(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (path / "eval_samples.json").write_text('{"prompt": 1}\n{"prompt": 2}\n')
            torch.save({"ema": torch.ones(3)}, path / "ema.pt", _use_new_zipfile_serialization=False)
            (path / "ema.safetensors").write_text("not what it seems")
            (path / "more.bin").write_text("nor this")

    def trained(resume=None):
        seen = Seen(digit_reward)
        trainer = make_trainer(
            tmp_path,
            config(),
            reward=seen,
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
        )
        trainer.add_callback(Samples())
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen.rows

    def checkpoints():
        return sorted((int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")), reverse=True)

    whole, rows = trained()
    steps = whole.state.max_steps
    assert checkpoints() == [steps, steps - 1]
    subprocess.run(["rm", "-r", str(tmp_path / f"checkpoint-{steps}")], check=True)
    resumed, again = trained(resume=True)
    assert again == rows[-len(again) :] and len(again) == 16  # one step, of four prompts with four rollouts each
    assert_same_weights(weights(resumed), weights(whole))
    assert checkpoints() == [steps, steps - 1]
    assert "not whole" not in caplog.text


def test_where_no_checkpoint_is_whole_nothing_starts_over_in_silence(checkpoints, tmp_path):
    """And what the error says to do, does it."""
    path = copy(checkpoints[0], tmp_path)
    damaged = sorted(path.glob("checkpoint-*"), key=lambda file: -int(file.name.split("-")[1]))
    for number, file in enumerate(damaged):
        name = FILES[number]
        os.truncate(file / name, os.path.getsize(file / name) // 2)
    before = sorted(path.rglob("*"))
    kwargs = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(
        ValueError, match="None of the checkpoints .* is complete .* Delete these directories"
    ) as error:
        make_trainer(path, config(), **kwargs).train(resume_from_checkpoint=True)
    for number, file in enumerate(damaged):
        assert re.search(rf"'{file}': {re.escape(FILES[number])} ", str(error.value))
    assert sorted(path.rglob("*")) == before
    for file in damaged:
        subprocess.run(["rm", "-r", str(file)], check=True)
    trainer = make_trainer(path, config(), **kwargs)
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(weights(trainer), checkpoints[1])


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    trainer = make_trainer(tmp_path, config(), num_train_epochs=1)
    with pytest.raises(ValueError, match="No valid checkpoint"):  # nothing was ever started here
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "learnalign").mkdir()
    make_trainer(tmp_path, config(), num_train_epochs=1).train(resume_from_checkpoint=True)
    assert "left no checkpoint, so it starts from the beginning" in caplog.text


def test_a_checkpoint_must_be_whole_on_every_node(tmp_path):
    """With `save_on_each_node` every node has its own part; one that is complete on one node only is passed over."""
    last, first = f"{tmp_path}/checkpoint-4", f"{tmp_path}/checkpoint-2"
    one = {"started": True, "damage": {last: None, first: None}}
    other = {"started": True, "damage": {last: "optimizer.pt is cut short", first: None}}
    assert whole_checkpoint(tmp_path, True, [one]) == last
    assert whole_checkpoint(tmp_path, True, [one, other]) == first
    with pytest.raises(
        ValueError, match=r"checkpoint-4': optimizer.pt is cut short; .*checkpoint-2': it is missing on"
    ):
        whole_checkpoint(tmp_path, True, [one, other | {"damage": {last: "optimizer.pt is cut short"}}])
    replaced = {"started": False, "damage": {}}  # a new disk
    for surveys in ([replaced, one], [one, replaced]):
        with pytest.raises(
            ValueError, match=r"checkpoint-4': it is missing on a node; .*checkpoint-2': it is missing"
        ):
            whole_checkpoint(tmp_path, True, surveys)


def test_shards_of_large_weights_are_looked_at(checkpoints, tmp_path):
    path = copy(checkpoints[0] / "checkpoint-2", tmp_path)
    make_model().save_pretrained(path, max_shard_size="4KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1 and damage(path) is None
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    assert damage(path).startswith(f"{shards[0].name} is damaged")
    shards[0].unlink()
    assert damage(path) == f"{shards[0].name} is missing"


# Writing


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "learnalign").write_text("a file in its place")
    for run in (lambda t: select_prompts(t, config()), lambda t: t.train()):
        with pytest.raises(OSError, match=r"The directory '.*learnalign' cannot be made .*Pass another `output_dir`"):
            run(make_trainer(tmp_path, config()))


def test_a_full_disk_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "file.json", {"small": 1})
    script = f"""
import resource
from pathlib import Path
from trl_learnalign.ground.disk import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_json(Path({str(tmp_path / "file.json")!r}), {{"large": "x" * 5000}})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "file.json' could not be written" in done.stdout and "Free disk space" in done.stdout
    assert [file.name for file in Path(tmp_path).iterdir()] == ["file.json"]
    assert (tmp_path / "file.json").read_text() == '{\n "small": 1\n}\n'
