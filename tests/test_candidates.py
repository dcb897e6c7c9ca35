"""The rows that are ranked at a time, where a pool is too large to rank all of it."""

import numpy as np
import pytest

from trl_learnalign.curriculum import Group, OnlineCurriculum, OnlineSettings
from trl_learnalign.curriculum.candidates import Candidates
from trl_learnalign.curriculum.memory import PromptMemory


def memory_of(size, visited=(), resting=()):
    memory = PromptMemory(size, size, OnlineSettings())
    memory.visits[list(visited)], memory.ready[list(resting)] = 3, 50
    return memory


def generator(seed=0):
    return np.random.default_rng(seed)


def test_all_of_a_small_pool_is_ranked():
    rows, random = Candidates(np.array([4, 2, 7]), 10, 3).draw(memory_of(10, visited=[2]), 5, generator())
    assert rows.tolist() == [4, 2, 7] and random == 3


@pytest.mark.parametrize("visited", [0, 3, 10, 60])
def test_half_of_the_candidates_were_visited_and_have_rested(visited):
    memory = memory_of(100, visited=range(visited), resting=range(2))
    rows, random = Candidates(np.arange(100), 100, 20).draw(memory, 40, generator())
    known = set(rows[random:].tolist())
    rested = set(range(2, visited))
    assert len(set(rows.tolist())) == len(rows) <= 20 and random == 20 - min(len(rested), 10)
    assert known <= rested
    if len(rested) <= 10:  # all of them are there, those drawn at random as well among the first
        assert rested <= set(rows.tolist())
    else:
        assert len(known | (rested & set(rows[:random].tolist()))) >= 10


def test_they_rest_until_the_draw_that_is_asked_for():
    memory = memory_of(100, visited=[5], resting=[5])
    draws = [Candidates(np.arange(100), 100, 2).draw(memory, at, generator(1)) for at in (50, 51)]
    assert [5 in rows for rows, _ in draws] == [False, True]


def test_rows_that_may_not_be_chosen_are_none():
    choosable = np.arange(0, 100, 2)
    candidates = Candidates(choosable, 100, 20)
    rows, random = candidates.draw(memory_of(100, visited=range(9)), 5, generator())
    assert set(rows.tolist()) <= set(choosable.tolist()) and random == 15
    assert {0, 2, 4, 6, 8} <= set(rows.tolist())


def test_random_ones_are_spread_over_the_pool():
    """However often it is drawn, each row comes as often as any other."""
    candidates, memory, random = Candidates(np.arange(100), 100, 20), memory_of(100), generator()
    counts = np.zeros(100)
    for _ in range(2000):
        rows, number = candidates.draw(memory, 5, random)
        counts[rows] += 1
        assert number == 20
    assert abs(counts - 400).max() < 5 * np.sqrt(400)


@pytest.mark.parametrize("known", [True, False])
def test_own_rewards_count_in_a_pool_of_any_size(known):
    """Nothing but a prompt's own rewards tells which prompts are live: one in twenty."""
    settings = OnlineSettings(
        candidates=400, cooldown_share=0.0, least_cooldown=16, begin_skill=-9.0, least_skill=-9.0, least_headroom=0.0
    )
    random, size = generator(1), 40_000
    curriculum = OnlineCurriculum(np.ones((size, 1), np.float32), group_size=8, settings=settings, seed=2)
    if not known:  # random candidates alone, for comparison
        none, draw = memory_of(size), curriculum.candidates.draw
        curriculum.candidates.draw = lambda memory, *args: draw(none, *args)
    is_live, live = random.random(size) < 0.05, []
    curriculum.judge.choosing = True
    for _ in range(150):
        draws = curriculum.choose(16)
        successes = random.random((16, 8)) < 0.5 * is_live[[draw.row for draw in draws]][:, None]
        curriculum.observe(
            [
                Group(draw.number, draw.row, own[:, None].astype(float))
                for draw, own in zip(draws, successes, strict=True)
            ]
        )
        curriculum.tick(1)
        live.append(np.mean([0 < own.sum() < 8 for own in successes]))
    assert (np.mean(live[75:]) > 0.2) == known
