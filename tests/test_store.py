"""Append-only files: what is read back from them, and how many files, writes and bytes of memory they take."""

import os
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from tiny import config, make_dataset, make_trainer, parity_reward

from trl_learnalign import select_prompts
from trl_learnalign.ground import store
from trl_learnalign.ground.store import Log, prepare
from trl_learnalign.host.groups import RolloutGroup
from trl_learnalign.measures.records import decode, encode


def opened(path, key="key", rank=0):
    prepare(path, key)
    return Log(path, key, rank)


def a_group(index=3, own_prompts=False, masked=True, size=2):
    generator = np.random.default_rng(index)
    prompt = np.array([4, 5], np.int32)
    prompts = [np.array([4] * (g + 1), np.int32) for g in range(size)] if own_prompts else [prompt] * size
    ids = [generator.integers(0, 1 << 20, g + 1, np.int32) for g in range(size)]
    masks = [np.ones(len(one), np.int8) for one in ids]
    if masked:
        masks[-1][-1] = 0
    completions = ["a", [{"role": "assistant", "content": "b\u2028"}]] * (size // 2)
    rewards = generator.normal(size=(size, 2)).astype(np.float32)
    rewards[0, 1] = np.nan
    return RolloutGroup(index, prompts, ids, masks, completions, rewards, rewards[:, 0] / 3, has_images=size > 2)


@pytest.mark.parametrize("own_prompts", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [2, 20])
def test_a_group_is_read_back_as_it_was(own_prompts, masked, size):
    group = a_group(7, own_prompts, masked, size)
    again = decode(encode(group), completions=True)
    np.testing.assert_equal(vars(again), vars(group))
    assert (again.prompt_ids[0] is again.prompt_ids[1]) != own_prompts
    for name in ("prompt_ids", "completion_ids", "loss_masks"):
        assert [one.dtype for one in getattr(again, name)] == [one.dtype for one in getattr(group, name)]
    assert decode(encode(group)).completions == []


def test_records_are_found_by_name_and_key(tmp_path, caplog):
    log = opened(tmp_path / "log")
    features = np.arange(12, dtype=np.float32).reshape(3, 4)
    log.append([(2**63 - 1, features), (0, b""), (7, b"first")])
    log.append([(7, b"second")])
    for reader in (log, opened(tmp_path / "log"), opened(tmp_path / "log", rank=1)):
        assert reader.read(2**63 - 1) == features.tobytes() == bytes(reader.map(2**63 - 1))
        assert reader.read(0) == bytes(reader.map(0)) == b"" and reader.read(7) == b"second"
        assert 7 in reader and 8 not in reader and reader.read(8) is reader.map(8) is None
        mapped = torch.frombuffer(reader.map(2**63 - 1), dtype=torch.float32)
        mapped += 1  # a private copy: the file stays as it is
        assert reader.read(2**63 - 1) == features.tobytes()
    other = Log(tmp_path / "log", "another key", 0)  # as on a node where a file of another run is left
    assert len(other) == 0 and other.read(7) is None
    assert not caplog.text
    opened(tmp_path / "log", "another key")
    assert "is discarded" in caplog.text and not list((tmp_path / "log").glob("*.log"))


def test_a_torn_tail_is_cut_off(tmp_path):
    """
    At lengths that a killed process may have left: what was whole before is there, and what is appended after it, too.
    """
    log = opened(tmp_path / "log")
    records = [(index, encode(a_group(index))) for index in range(3)]
    ends = []
    for record in records:
        log.append([record])
        ends.append(log._files[0].stat().st_size)
    log.close()
    whole = log._files[0].read_bytes()
    for size in sorted(
        {0, len(whole), *range(0, len(whole), 13), *(end + n for end in ends for n in range(-66, 1, 6))}
    ):
        log._files[0].write_bytes(whole[:size])
        again = opened(tmp_path / "log")
        count = len(again)
        # The zeros behind the last payload may be missing
        assert count >= sum(end <= size for end in ends) and count <= sum(end - 64 < size for end in ends)
        assert [again.read(index) for index in range(count)] == [payload for _, payload in records[:count]]
        again.append([(9, b"new")])
        again.close()
        assert opened(tmp_path / "log").read(9) == b"new" and len(opened(tmp_path / "log")) == count + 1
    assert [file.name for file in log.path.glob("*.log")] == ["00000-00000.log"]


def test_behind_a_damaged_header_the_others_are_found(tmp_path):
    log = opened(tmp_path / "log")
    for index in range(5):
        log.append([(index, encode(a_group(index)))])
    content = bytearray(log._files[0].read_bytes())
    size = len(content) // 5
    for place in (size + 10, 3 * size + 70):  # the header of the second, the payload of the fourth
        content[place] ^= 1
    log._files[0].write_bytes(content)
    again = opened(tmp_path / "log")
    assert [again.read(index) is not None for index in range(5)] == [True, False, True, False, True]
    again.append([(1, b"new")])
    assert opened(tmp_path / "log").read(1) == b"new" and opened(tmp_path / "log").read(4) == encode(a_group(4))


def test_a_process_killed_while_it_appends_leaves_whole_records_only(tmp_path):
    script = """
import os, sys
from pathlib import Path
from trl_learnalign.ground.store import Log
log, n = Log(Path(sys.argv[1]), "key", 0), 0
while True:
    log.append([(n + i, (n + i).to_bytes(8, "big") * 5000) for i in range(4)])
    n += 4
    print(n, flush=True)
"""
    prepare(path := tmp_path / "log", "key")
    draw, finished = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(draw.randrange(3, 30)):
            finished = int(process.stdout.readline())
        process.kill()
        process.wait()
        log = opened(path)
        assert len(log) >= finished
        for name in range(finished):
            assert log.read(name) == name.to_bytes(8, "big") * 5000


def test_a_full_disk_leaves_what_was_finished(tmp_path):
    prepare(path := tmp_path / "log", "key")
    script = f"""
import resource
from pathlib import Path
from trl_learnalign.ground.store import Log
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log = Log(Path({str(path)!r}), "key", 0)
log.append([(1, b"x" * 500)])
try:
    log.append([(2, b"x" * 5000)])
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append([(3, b"y")])
print(log.read(1) == b"x" * 500, log.read(2), log.read(3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "00000-00000.log' could not be written" in done.stdout and "Free disk space" in done.stdout
    assert done.stdout.splitlines()[-1] == "True None b'y'"
    assert opened(path).read(3) == b"y"


def test_a_file_is_emptied_though_other_records_are_stale(tmp_path):
    """Records of another process, and its own that nothing needs any more."""
    opened(tmp_path / "log", rank=1).append([(1, bytes(5000))])
    opened(tmp_path / "log").append([(2, bytes(5000))])
    log = opened(tmp_path / "log")
    log.keep([1, 3])
    log.append([(3, bytes(5000))])
    assert 1 in log and 2 not in log and 3 in log
    log.discard([3])
    assert not (log.path / "00000-00000.log").stat().st_size and (log.path / "00001-00000.log").stat().st_size
    assert log.read(1) == bytes(5000)


def test_files_are_of_bounded_size_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SEGMENT_BYTES", 10_000)
    log = opened(tmp_path / "log")
    for name in range(100):
        log.append([(name, bytes(936))])  # 1,000 with its header, padded to 1,024
    files = sorted(log.path.glob("*.log"))
    assert len(files) == 10 and all(10_000 <= file.stat().st_size < 11_024 for file in files)
    again = opened(tmp_path / "log")
    assert all(again.read(name) == bytes(936) for name in range(100))
    again.append([(100, b"")])
    assert len(list(log.path.glob("*.log"))) == 11
    monkeypatch.undo()
    # A million prompts with eight completions of 2,000 tokens (4 bytes each, and as many of text), and features of the
    # default length, on 64 processes, each of which has a last file that is not full
    rollouts, features = 1_000_000 * 8 * 2_000 * 8, 1_000_000 * (1 << 15) * 4
    assert rollouts // store.SEGMENT_BYTES + features // store.SEGMENT_BYTES + 2 * 64 <= 1_000


def test_an_index_entry_takes_less_than_100_bytes(tmp_path):
    log, number = opened(tmp_path / "log"), 50_000
    tracemalloc.start()
    try:
        for start in range(0, number, 100):
            log.append([(2 * name, b"") for name in range(start, start + 100)], durable=False)
        taken, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 100 * number and peak < 100 * number
    assert all(2 * name in log and 2 * name + 1 not in log for name in random.Random(0).sample(range(number), 500))


def test_one_write_and_one_fsync_for_a_round(tmp_path, monkeypatch):
    """And one for a window of gradients, which may be of any number of microbatches."""
    synced, written = [], []

    def fsync(descriptor, original=os.fsync):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    def write(stream, data, original=store._write):
        written.append(str(stream.name))
        original(stream, data)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(store, "_write", write)
    trainer = make_trainer(tmp_path, reward=parity_reward, dataset=make_dataset(24))
    select_prompts(trainer, config(rollout_batch_prompts=4, max_tokens_per_batch=60))
    measures = tmp_path / "_learnalign" / "step-000000"
    assert synced.count(str(measures / "rollouts/00000-00000.log")) == 6
    assert written.count(str(measures / "rollouts/00000-00000.log")) == 6
    assert synced.count(str(measures / "gradients/00000-00000.log")) == 1
    assert written.count(str(measures / "gradients/parts/00000-00000.log")) > 10
    # Besides, the key of each measure and the files of the selection
    others = [name for name in synced if not name.endswith(".log")]
    assert len(others) == 2 + len(list((tmp_path / "learnalign/step-000000").iterdir()))
    logs = [file for file in tmp_path.rglob("*.log") if file.stat().st_size]
    assert len(logs) == 2
