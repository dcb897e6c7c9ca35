"""Conditions, quotas and draws against slow and obvious ways to the same."""

import collections

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_learnalign.choice import apportion, choose, draw_order
from trl_learnalign.conditions import Condition


TABLE = pd.DataFrame(
    {
        "length": [100.0, 900.0, None, 300.0],
        "source": ["forum", "book", "book", None],
        "level": [1, 2, 3, 4],
        "checked": [True, False, True, True],
    },
    index=[3, 5, 8, 9],
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("length < 800", [True, False, False, True]),
        ("length < 800 and source != 'forum'", [False, False, False, False]),
        ("not length < 800", [False, True, True, False]),
        ("source in ['book', 'web'] or level >= 4", [False, True, True, True]),
        ("source not in ('book',)", [True, False, False, False]),
        ("1 < level <= 3", [False, True, True, False]),
        ("checked == True and (level == 1 or level == 3)", [True, False, True, False]),
        ("level > -1.5", [True] * 4),
    ],
)
def test_conditions(text, holds):
    condition = Condition(text)
    assert np.asarray(condition(TABLE)).tolist() == holds
    assert condition.columns <= set(TABLE.columns)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "length",
        "length <",
        "__import__('os').system('true')",
        "length.real < 3",
        "length < f(3)",
        "length in source",
        "length is None",
        "[x for x in source] == 1",
        "length < None",
        "source == b'a'",
        "length + 1 < 3",
    ],
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match="`where` is .* which cannot be read"):
        Condition(text)


def test_texts_and_numbers_are_not_compared():
    with pytest.raises(ValueError, match="cannot be compared"):
        Condition("source < 3")(TABLE)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(0, 40),
)
def test_quotas_are_spent_and_never_exceeded(groups, num):
    shares, available = (np.array(column) for column in zip(*groups, strict=True))
    given_ = apportion(num, shares.astype(float), available)
    assert given_.sum() == min(num, available.sum()) and (given_ <= available).all() and (given_ >= 0).all()
    exact = num * shares / shares.sum()
    if (available >= np.ceil(exact)).all():  # nothing is left over: each within one of its exact share
        assert (np.abs(given_ - exact) < 1).all()


def test_quotas_choose_the_best_of_each_group():
    groups = np.array(list("aaaaaabbbc"))
    eligible = np.array([True] * 9 + [False])
    ranking = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert choose(ranking, eligible, 5).tolist() == [0, 1, 2, 3, 4]
    proportional = choose(ranking, eligible, 5, groups, "proportional").tolist()
    assert collections.Counter(groups[proportional]) == {"a": 3, "b": 2} and proportional == [0, 1, 2, 6, 7]
    assert choose(ranking, eligible, 4, groups, "equal").tolist() == [0, 1, 6, 7]
    assert choose(ranking, eligible, 99, groups, "equal").tolist() == list(range(9))


def test_draws_are_in_proportion_to_the_scores():
    scores = np.array([1.0, 3.0, 0.0, -2.0])
    first = collections.Counter(int(draw_order(scores, seed)[0]) for seed in range(4000))
    assert set(first) == {0, 1} and 0.72 < first[1] / 4000 < 0.78
    assert all(set(draw_order(scores, seed)[2:].tolist()) == {2, 3} for seed in range(20))
    assert draw_order(scores, 5).tolist() == draw_order(scores, 5).tolist()
