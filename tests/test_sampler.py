"""The stream of prompts: TRL's order, a pure function of the log, nothing dropped, nothing visited more often."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import planned
from trl.trainer.utils import RepeatSampler

from trl_learnalign import LearnAlignConfig, LearnAlignSampler, Schedule
from trl_learnalign.curriculum.states import join, split
from trl_learnalign.run.layout import Layout
from trl_learnalign.schedules import StagedSchedule
from trl_learnalign.schedules.base import Run
from trl_learnalign.schedules.stream import Stream


LAYOUT = Layout(
    pool_size=12,
    num_prompts=5,
    warmup_prompts=6,
    chunk_prompts=3,
    repeats=2,
    group_size=4,
    accumulation=1,
    read_ahead=1,
    epochs=2.0,
    shuffle=True,
    seed=3,
)


def bound(settings=None, **changes):
    config = LearnAlignConfig(num_prompts=5, warmup_prompts=6, **settings or {})
    layout = replace(LAYOUT, **changes)
    schedule = StagedSchedule(
        Run(layout.pool_size, layout.chunk_prompts, layout.group_size, layout.seed, config, None)
    )
    schedule.layout = layout
    sampler = LearnAlignSampler(config)
    sampler.bind(Stream(schedule, layout))
    return sampler


def load(sampler, state):
    """As a resumed run does."""
    sampler.schedule.load_state_dict(sampler.stream.load_state_dict(state))


def prompts(sampler, epochs=1):
    """The distinct prompts of the stream, chunk by chunk, as a trainer's loop would draw them."""
    layout, chunks = sampler.layout, []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        flat = list(sampler)
        assert len(flat) == len(sampler)
        size = layout.chunk_prompts * layout.group_size
        for start in range(0, len(flat), size * layout.repeats):
            chunk = flat[start : start + size]
            assert flat[start : start + size * layout.repeats] == chunk * layout.repeats
            heads = chunk[:: layout.group_size]
            assert chunk == [index for index in heads for _ in range(layout.group_size)]
            chunks.append(heads)
    return chunks


@pytest.mark.parametrize("shuffle", [True, False])
def test_order_is_that_of_repeat_sampler_when_nothing_is_selected(shuffle):
    sampler = bound(warmup_prompts=0, num_prompts=12, epochs=1.0, shuffle=shuffle)
    theirs = RepeatSampler(range(12), mini_repeat_count=4, batch_size=3, repeat_count=2, shuffle=shuffle, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert list(sampler) == list(theirs)
    assert len(sampler) == len(theirs)


def test_stream_is_a_pure_function_of_the_log():
    sampler = bound()
    sampler.schedule.accept(3, [1, 4, 7, 9, 11])
    sampler.schedule.accept(8, [0, 2])
    state = sampler.stream.state_dict()
    forward = [sampler.chunk(i) for i in range(40)]
    assert [planned(sampler, i) for i in reversed(range(40))] == forward[::-1]
    again = bound()
    load(again, state)
    assert list(prompts(again, epochs=3)) == forward[: 3 * LAYOUT.epoch_chunks]


def test_versions_start_where_the_log_says_and_visit_equally_often():
    sampler = bound()
    sampler.schedule.accept(3, [1, 4, 7, 9, 11])
    sampler.schedule.accept(10, [0, 2, 5, 8])
    for first, last, chosen in ((3, 10, {1, 4, 7, 9, 11}), (10, 33, {0, 2, 5, 8})):
        counts = Counter(index for i in range(first, last) for index in sampler.chunk(i))
        assert set(counts) == chosen and max(counts.values()) - min(counts.values()) <= 1
    start = [index for i in range(3) for index in planned(sampler, i)]
    assert len(set(start)) == 9


def test_a_pass_straddles_chunks_and_drops_no_prompt():
    sampler = bound(pool_size=7, chunk_prompts=3)
    visited = [index for i in range(7) for index in sampler.chunk(i)]
    assert [sorted(visited[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3
    assert visited[:7] != visited[7:14]


def test_chunk_larger_than_the_selection():
    sampler = bound()
    sampler.schedule.accept(3, [8, 9])
    assert sorted(sampler.chunk(3) + sampler.chunk(4)) == [8, 8, 8, 9, 9, 9]


def test_an_empty_version_goes_on_as_if_nothing_had_been_selected():
    plain, empty = bound(), bound()
    empty.schedule.accept(4, [])
    assert [empty.chunk(i) for i in range(20)] == [plain.chunk(i) for i in range(20)]


def test_the_last_version_of_a_chunk_wins():
    sampler = bound()
    sampler.schedule.accept(0, [1, 2, 3])
    sampler.schedule.accept(0, [4, 5, 6])
    assert sorted(sampler.chunk(0)) == [4, 5, 6]


@pytest.mark.parametrize("warmup", [0, 1, 6, 7, 100])
@pytest.mark.parametrize("chosen", [1, 5, 12])
@pytest.mark.parametrize("epochs", [0.5, 1.0, 3.0, 2.5])
@pytest.mark.parametrize(("repeats", "accumulation"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 4)])
def test_epochs_hold_the_warmup_and_a_pass_over_the_selection_each(warmup, chosen, epochs, repeats, accumulation):
    layout = replace(
        LAYOUT, warmup_prompts=warmup, num_prompts=chosen, epochs=epochs, repeats=repeats, accumulation=accumulation
    )
    chunks = layout.epoch_chunks * epochs
    left = (chunks - layout.warmup_end) * layout.chunk_prompts
    assert left >= epochs * chosen
    assert left < epochs * chosen + layout.chunk_prompts * (1 + epochs)  # no more than rounding asks for
    assert layout.warmup_end * layout.chunk_prompts >= warmup
    assert layout.batches_trained(layout.epoch_steps) == layout.epoch_chunks * repeats
    steps = range(3 * layout.epoch_steps + 1)
    trained = [layout.batches_trained(step) for step in steps]
    assert all(0 < b - a <= accumulation for a, b in zip(trained, trained[1:], strict=False))
    for chunk in range(2 * layout.epoch_chunks):
        assert layout.steps_of(chunk) == next(step for step in steps if layout.chunks_trained(step) >= chunk)
    assert layout.first_selection[1] <= layout.warmup_end


def test_no_chunk_is_drawn_before_it_is_asked_for():
    sampler = bound()
    stream = iter(sampler)
    next(stream)
    assert sampler.stream.drawn == 1
    for _ in range(LAYOUT.chunk_prompts * LAYOUT.group_size * LAYOUT.repeats):
        next(stream)
    assert sampler.stream.drawn == 2


def test_another_read_ahead_is_refused_where_it_changes_the_length_of_an_epoch():
    """The number of workers decides how long the warm-up is, and so where the chunks of each epoch begin."""
    settings = {"num_prompts": 5, "repeats": 1, "accumulation": 4, "epochs": 3.0}
    saved = bound(**settings).stream.state_dict()
    longer = bound(**settings, read_ahead=5)
    assert longer.layout.epoch_chunks != bound(**settings).layout.epoch_chunks
    with pytest.raises(ValueError, match="another stream.*read_ahead.*`dataloader_num_workers`.* was 1 and is 5"):
        load(longer, saved)
    load(bound(**settings, read_ahead=2), saved)  # the epochs are as long
    without = bound(**settings, warmup_prompts=0).stream.state_dict()
    load(bound(**settings, warmup_prompts=0, read_ahead=5), without)


def test_one_sampler_serves_one_trainer():
    sampler = bound()
    with pytest.raises(ValueError, match="already belongs to a trainer.*new LearnAlignSampler"):
        sampler.bind(sampler.stream)


def test_unbound_sampler_says_what_to_do():
    with pytest.raises(RuntimeError, match="belongs to no trainer.*train_sampler"):
        len(LearnAlignSampler())
    with pytest.raises(TypeError, match="`config` must be a LearnAlignConfig, but is a dict"):
        LearnAlignSampler({"num_prompts": 3})
    with pytest.raises(TypeError, match="`schedule` is a Schedule, but every run.*Pass the class, `schedule=Sch"):
        LearnAlignSampler(schedule=Schedule(None))
    with pytest.raises(TypeError, match="`schedule` must be a class of schedules.*but is a str"):
        LearnAlignSampler(schedule="online")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["state"].pop("starts"), "damaged.*starts"),
        (lambda s: s.update(state_version=99), "version 99"),
        (lambda s: s["layout"].update(pool_size=13), "pool_size was 13 and is 12.*number of processes"),
        (lambda s: s["layout"].pop("seed"), "seed was None and is 3"),
        (lambda s: s["state"].update(starts=[0, -1]), "damaged"),
        (lambda s: s["state"].update(starts=[1, 3]), "damaged: versions start at"),
        (lambda s: s["state"].update(starts=[3, 0]), "damaged: versions start at"),
        (lambda s: s["state"].update(lengths=[0, 3]), "damaged"),
        (lambda s: s["state"].update(indices=np.array([1, 12])), "names row 12.*12 rows"),
        (lambda s: s["state"].update(indices=np.array([1.5, 2.0])), "damaged"),
        (lambda s: s["state"].update(starts=[], lengths=[], indices=np.zeros(0, np.int64)), "damaged"),
        (lambda s: s.update(state="x"), "damaged"),
        (
            lambda s: s.update(schedule="OnlineSchedule"),
            r"schedule OnlineSchedule .*, but this sampler has StagedSchedule",
        ),
        (lambda s: s.pop("schedule"), "damaged.*schedule"),
        (lambda s: s.pop("in_flight"), "damaged.*in_flight"),
        (lambda s: s.update(drawn=5), r"damaged: of 5 chunks, \[2, 3\] are in flight, with 2 x 3 rows"),
        (lambda s: s.update(drawn="4"), "damaged: of '4' chunks"),
        (lambda s: s["in_flight"].update(rows=np.zeros((2, 4), int)), "damaged.*2 x 4 rows"),
        (lambda s: s["in_flight"].update(rows=np.full((2, 3), 12)), "names row 12.*12 rows"),
        (lambda s: s.update(next=11), "damaged: 11 prompts were drawn for 4 chunks"),
        (lambda s: s["state"].update(drawn=-1), "damaged"),
    ],
)
def test_loading_is_strict(damage, message):
    sampler = bound()
    sampler.schedule.accept(3, [1, 2])
    sampler.chunk(3)
    state = sampler.stream.state_dict()
    load(bound(), state)
    damage(state)
    with pytest.raises(ValueError, match=message):
        load(bound(), state)
    with pytest.raises(ValueError, match="before the last one"):
        sampler.schedule.accept(2, [1])


@pytest.mark.parametrize("read_ahead", [1, 5])
@pytest.mark.parametrize("repeats", [1, 3])
def test_draws_in_flight_are_answered_from_the_checkpoint(repeats, read_ahead):
    """Whatever the schedule would say now, and with as many rows beside them as the rewards to come need."""
    sampler = bound(repeats=repeats, read_ahead=read_ahead)
    drawn = [sampler.chunk(i) for i in range(7)]
    state = sampler.stream.state_dict()
    trained = 7 - math.ceil((1 + read_ahead) / repeats)
    again = bound(repeats=repeats, read_ahead=read_ahead)
    load(again, state)
    again.schedule.choose = None  # asked, it would fail
    for i in range(4, 7):  # the epoch began with chunk 4
        found = again.chunk(i)
        assert len(found) == 3 and (found == drawn[i] or i < trained)
        if i >= trained:
            groups = again.stream.groups(again.stream.draws(i), np.zeros((12, 1)))
            assert [(group.number, group.row) for group in groups] == [*enumerate(drawn[i], 3 * i)]
    del again.schedule.choose
    assert again.chunk(7) == sampler.chunk(7)


@given(
    st.recursive(st.integers() | st.none(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
)
def test_a_state_is_the_same_after_it_was_split(state):
    state = {"values": state, "more": {"x": np.arange(3), "deep": {"y": np.zeros((2, 0))}, "z": 1}}
    values, arrays = split(state)
    assert set(arrays) == {"more/x", "more/deep/y"} and json.loads(json.dumps(values)) == values
    again = join(values, arrays)
    np.testing.assert_equal(again, state)


def test_drawing_a_chunk_sorts_nothing(monkeypatch):
    """A version is put in order once, and each pass over it once, however many chunks are drawn or skipped."""
    sampler, calls = bound(), []
    schedule = sampler.schedule
    indices = schedule._indices
    monkeypatch.setattr(schedule, "_indices", lambda number: calls.append(number) or indices(number))
    sampler.schedule.accept(3, [1, 4, 7, 9, 11])
    for i in range(60):
        sampler.chunk(i)
    assert calls == [0, 1]


@pytest.mark.parametrize("order", ["ranked", "folding"])
def test_ranks_reach_the_stream(order):
    folding = {"fold": 2} if order == "folding" else {}
    sampler = bound({"prompt_order": order, **folding})
    sampler.schedule.accept(2, [7, 1, 9, 4, 11])
    expected = [7, 1, 9, 4, 11] if order == "ranked" else [11, 9, 7, 4, 1]
    stream = [index for i in range(2, 12) for index in sampler.chunk(i)]
    assert stream == (expected * 6)[:30]
