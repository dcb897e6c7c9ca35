"""Nonsense in every field and file: an error of ours or the right result, never anything else."""

import dataclasses
import datetime
import json
import math
import tempfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import config, digit_reward, make_dataset, make_trainer, online
from transformers import TrainerState

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, Selection, select_prompts
from trl_learnalign.ground.store import Log, prepare
from trl_learnalign.host.groups import RolloutGroup
from trl_learnalign.measures.records import decode, encode
from trl_learnalign.run.state import STATE_FILE


FIELDS = {field.name: field.default for field in dataclasses.fields(LearnAlignConfig)}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**300),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["learnalign", "random", "variance", "one_correct", "restart", "success_rate"]),
    st.lists(st.integers(), max_size=2),
    st.just(np.float32(0.5)),
    st.just(np.arange(2)),
    st.just(torch.ones(2)),
)
QUIET = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@QUIET
@given(st.dictionaries(st.sampled_from(list(FIELDS)), ODD, max_size=4))
def test_config(tally, changes):
    tally["nonsense: configurations"] += 1
    try:
        made = LearnAlignConfig(**changes)
    except ValueError as error:
        assert any(f"`{name}`" in str(error) for name in changes)
        return
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False)) == made.to_dict()
    assert made.num_prompts >= 1 and made.warmup_prompts >= 0 and math.isfinite(made.success_threshold)


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    selection = select_prompts(make_trainer(path), config())
    return selection, path / "learnalign" / "step-000000"


def damaged(data, content: bytes) -> bytes:
    """Bytes changed, cut off, put in or swapped."""
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap", "empty"]))
    at = data.draw(st.integers(0, len(content) - 1))
    match kind:
        case "flip":
            return content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "insert":
            return content[:at] + data.draw(st.binary(min_size=1, max_size=20)) + content[at:]
        case "swap":
            return content[at:] + content[:at]
    return b""


@QUIET
@given(st.data())
def test_selection(saved, tally, data):
    tally["nonsense: files of selections"] += 1
    selection, path = saved
    name = data.draw(st.sampled_from(["scores.parquet", "selection.json"]))
    with tempfile.TemporaryDirectory() as directory:
        for file in ("scores.parquet", "selection.json"):
            content = (path / file).read_bytes()
            Path(directory, file).write_bytes(damaged(data, content) if file == name else content)
        try:
            loaded = Selection.load(directory)
        except ValueError as error:
            assert "cannot be used" in str(error) and "Delete it and select again" in str(error)
        else:
            assert loaded.indices == selection.indices and loaded.scores.equals(selection.scores)
            assert loaded.provenance == selection.provenance


def test_files_of_different_selections_do_not_go_together(saved, tmp_path):
    other = select_prompts(make_trainer(tmp_path), config(selection_seed=5))
    for file in ("scores.parquet", "selection.json"):
        mixed = tmp_path / file.replace(".", "-")
        other.save(mixed)
        (mixed / file).write_bytes((saved[1] / file).read_bytes())
        with pytest.raises(ValueError, match=r"scores\.parquet is not the one that selection\.json was written with"):
            Selection.load(mixed)


# The same for both rollouts, and one for each
PROMPTS = [np.array([4, 5], np.int32)] * 2, [np.array([4], np.int32), np.array([5, 9], np.int32)]


@QUIET
@given(st.data())
def test_logs(tally, data):
    """Of a damaged file nothing but whole originals is ever read, and what is appended afterwards is there."""
    tally["nonsense: files of measures"] += 1
    prompt = data.draw(st.sampled_from(PROMPTS))
    groups = [
        RolloutGroup(
            row=index,
            prompt_ids=prompt,
            completion_ids=[np.array([6], np.int32), np.array([7, 8], np.int32)],
            loss_masks=[np.array([1], np.int8), np.array([1, index % 2], np.int8)],
            completions=["a", [{"role": "assistant", "content": "b"}]],
            rewards=np.array([[1.0], [index]], np.float32),
            penalties=np.array([0.0, 0.5], np.float32),
        )
        for index in (3, 4, 5)
    ]
    features = torch.randn(2, 8)
    with tempfile.TemporaryDirectory() as directory:
        prepare(path := Path(directory) / "log", "key")
        log = Log(path, "key", 0)
        log.append([(group.row, encode(group)) for group in groups])
        log.append([(99, features.numpy())])
        log.close()
        file = data.draw(st.sampled_from(sorted(path.iterdir())))
        content = file.read_bytes()
        file.write_bytes(damaged(data, content))
        prepare(path, "key")
        again = Log(path, "key", 0)
        for reader in (log, again):  # one that was open before, and one that looks anew
            for group in groups:
                payload = reader.read(group.row)
                if payload is not None:
                    np.testing.assert_equal(vars(decode(payload, completions=True)), vars(group))
            mapped = reader.map(99)
            assert mapped is None or torch.equal(torch.frombuffer(mapped, dtype=torch.float32), features.flatten())
        again.append([(group.row, encode(group)) for group in groups])
        for reader in (again, Log(path, "key", 1)):
            for group in groups:
                np.testing.assert_equal(vars(decode(reader.read(group.row), completions=True)), vars(group))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """
    By schedule: what reads and writes the state of a run, its checkpoint, and what trainer_state.json holds of it.
    """
    made = {}
    for name, choice in {"staged": config(), "online": online()}.items():
        path = tmp_path_factory.mktemp(name)
        trainer = make_trainer(path, choice, max_steps=5, save_strategy="steps", save_steps=5)
        trainer.train()
        checkpoint = path / "checkpoint-5"
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, LearnAlignCallback))
        made[name] = callback._checkpoints, checkpoint, state["stateful_callbacks"]["learnalign"]
    return made


@pytest.mark.parametrize("schedule", ["staged", "online"])
@QUIET
@given(st.data())
def test_state_in_a_checkpoint(written, tally, schedule, data):
    """Its values, in trainer_state.json, and its arrays, in a file."""
    tally["nonsense: states in checkpoints"] += 1
    state, checkpoint, whole = written[schedule]
    content, arrays = json.loads(json.dumps(whole)), (checkpoint / STATE_FILE).read_bytes()
    found = damaged(data, arrays) if data.draw(st.booleans()) else arrays
    place = content if data.draw(st.booleans()) else None
    while isinstance(place, (dict, list)) and place:  # change something somewhere
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    callbacks = {"learnalign": data.draw(st.sampled_from([content, content, None]))}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, STATE_FILE).write_bytes(found)
        state._note(Path(directory))
        try:
            state.stream.schedule.load_state_dict(
                state.read(TrainerState(global_step=3, stateful_callbacks=callbacks))[0]
            )
        except ValueError as error:
            assert "checkpoint" in str(error)
        else:
            assert content == whole and found == arrays


# Columns


@pytest.mark.parametrize(
    "column",
    [
        [None] * 8,
        [b"\x00\xff"] * 8,
        [datetime.datetime(2020, 1, 1)] * 8,
        [Decimal("1.5")] * 8,
        [[], [None], [1, 2]] * 2 + [[3], []],
        [{"a": {"b": [i]}} for i in range(8)],
        [math.nan, math.inf, -0.0, 1e300] * 2,
        ["<script>alert(1)</script>", "\x00", "\ud7ff", "'; DROP TABLE", "../../etc", "{}", "%s", "\n"],
    ],
    ids=["null", "bytes", "time", "decimal", "lists", "nested", "floats", "strings"],
)
def test_columns_of_odd_types(tmp_path, column, tally):
    tally["nonsense: columns"] += 1

    def reward(completions, row, odd, **kwargs):
        assert len(odd) == len(completions)
        return digit_reward(completions=completions, row=row)

    rows = make_dataset(8)
    dataset = Dataset.from_dict({"prompt": rows["prompt"], "row": rows["row"], "odd": column})
    trainer = make_trainer(tmp_path, reward=reward, dataset=dataset)
    selection = select_prompts(trainer, config(num_prompts=3, save_rollouts=True))
    plain = select_prompts(make_trainer(tmp_path / "plain", dataset=rows), config(num_prompts=3))
    assert selection.scores.equals(plain.scores)
    assert selection.to_dataset(dataset)["row"] == [rows["row"][i] for i in selection.indices]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.select(range(23)),
        lambda d: d.select([1, 0, *range(2, 24)]),
        lambda d: d.map(lambda row: {"row": row["row"] + (row["row"] == 7)}),
        lambda d: d.rename_column("row", "other"),
    ],
)
def test_a_selection_is_refused_for_another_dataset(saved, change):
    with pytest.raises(ValueError, match="The dataset is not the one that the selection was made from"):
        saved[0].to_dataset(change(make_dataset()))
