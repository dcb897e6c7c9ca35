"""Conditions, quotas and draws against slow and obvious ways to the same."""

import collections
from decimal import Decimal
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Value
from datasets.table import IndexedTableMixin
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_learnalign import LearnAlignConfig
from trl_learnalign.choice.choose import apportion, choose, draw_order
from trl_learnalign.data.columns import candidate_rows, check_columns, dataset_columns
from trl_learnalign.data.conditions import Condition
from trl_learnalign.selection.rehearsal import rehearse


TABLE = pd.DataFrame(
    {
        "length": [100.0, 900.0, None, 300.0],
        "source": ["forum", "book", "book", None],
        "level": [1, 2, 3, 4],
        "checked": [True, False, True, True],
        "problem-type": ["a", "b", "a", "b"],
        "class": [1.5, 2.5, None, 2.5],
        "extra.level": [1.0, None, 2.0, 3.0],
        "hard": pd.Series([True, None, False, True], dtype=object, index=[3, 5, 8, 9]),
        "day": pd.to_datetime(["2026-01-16T10:00", "2026-02-01T00:00", None, "2025-12-31T00:00"]),
        "mixed": [1, "1", None, 2],
        "nested": [{"a": 1}, None, {"a": 2}, {}],
        "empty": [None] * 4,
    },
    index=[3, 5, 8, 9],
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("length < 800", [True, False, False, True]),
        ("length is None", [False, False, True, False]),
        ("nested is not None and length < 800", [True, False, False, True]),
        ("length < 800 and source != 'forum'", [False, False, False, False]),
        ("not length < 800", [False, True, True, False]),
        ("source in ['book', 'web'] or level >= 4", [False, True, True, True]),
        ("source not in ('book',)", [True, False, False, False]),
        ("1 < level <= 3", [False, True, True, False]),
        ("checked == True and (level == 1 or level == 3)", [True, False, True, False]),
        ("level > -1.5", [True] * 4),
        ("`problem-type` == 'a'", [True, False, True, False]),
        ("`class` in [2.5] and source != 'a `b` c'", [False, True, False, False]),
        ("extra.level >= 2", [False, False, True, True]),
        ("`extra`.`level` == extra.level", [True, False, True, True]),
        ("checked", [True, False, True, True]),
        ("not checked or level < 2", [True, True, False, False]),
        ("hard", [True, False, False, True]),  # a missing value is false, as in `hard == True`
        ("not hard", [False, True, True, False]),
        ("day >= '2026-01-16'", [True, True, False, False]),
        ("day not in ['2026-02-01']", [True, False, False, True]),
        ("empty == 'a' or empty < 3", [False] * 4),
        ("level < 1e400", [True] * 4),
        ("not " * 40 + "checked", [True, False, True, True]),
    ],
)
def test_conditions(text, holds):
    condition = Condition(text)
    assert np.asarray(condition(TABLE)).tolist() == holds
    assert condition.columns <= set(TABLE.columns)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("single == 0.7", [True, False, False, False]),
        ("single in [0.7]", [True, False, False, False]),
        ("single not in [0.7]", [False, True, False, False]),
        ("id == 9007199254740993", [True, False, False, False]),
        ("id in [9007199254740993, 1]", [True, False, False, False]),
        ("id is None", [False, False, True, False]),
        ("extra.id > 9007199254740992", [True, False, False, False]),
        ("price == 0.1", [True, False, False, False]),
        ("price in [0.1, 3]", [True, True, False, False]),
        ("price <= double", [False, True, False, False]),
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_numbers_of_a_dataset_are_compared_as_they_are(text, holds, shuffled):
    """Single precision, whole numbers beside missing ones, which floats would round, and decimal ones."""
    ids = [2**53 + 1, 2**53, None, 5]
    rows = Dataset.from_dict(
        {
            "single": [0.7, 0.1, None, float("nan")],
            "double": [0.05, 3.5, 1.0, None],
            "id": ids,
            "extra": [{"id": one} for one in ids],
            "price": [Decimal("0.10"), Decimal("3.00"), None, Decimal("0.11")],
        }
    ).cast_column("single", Value("float32"))
    if shuffled:
        rows, holds = rows.select([2, 0, 1, 3]), [holds[place] for place in (2, 0, 1, 3)]
    config = LearnAlignConfig(score="random", where=text)
    assert candidate_rows(rows, config) == [row for row, holding in enumerate(holds) if holding]


def test_a_shuffled_dataset_is_read_at_once(monkeypatch):
    """`datasets` gathers the rows of one by themselves, which takes seconds for 300,000."""
    gathered = []
    gather = IndexedTableMixin.fast_gather
    monkeypatch.setattr(
        IndexedTableMixin, "fast_gather", lambda self, rows: gathered.append(len(rows)) or gather(self, rows)
    )
    rows = Dataset.from_dict({"prompt": [f"{row}" for row in range(2000)], "level": list(range(2000))})
    rows = rows.add_column("even", [row % 2 for row in range(2000)]).shuffle(seed=1)
    settings = {"score": lambda table: table["level"] * 1.0, "score_measures": ["rollouts"]}
    config = LearnAlignConfig(where="level > 9 and prompt != '3'", quota_column="even", **settings)
    check_columns(rows, config)
    rehearse(rows, config, 8, 100)
    assert not gathered
    levels = dataset_columns(rows, range(2000), ["level"])["level"].tolist()
    assert levels == rows["level"][:] and gathered  # which does


@pytest.mark.parametrize(
    "text",
    [
        "",
        "length <",
        "__import__('os').system('true')",
        "length.real() < 3",
        "length < f(3)",
        "length in source",
        "length is 3",
        "[x for x in source] == 1",
        "length < None",
        "source == b'a'",
        "length + 1 < 3",
    ],
)
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match="`where` is .* which cannot be read"):
        Condition(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("problem-type == 'a'", r"\(problem - type is neither a column .*calculated\).*put in backquotes"),
        ("class == 'a'", r"\(invalid syntax\).*put in backquotes"),
        ("len(source) < 10", r"\(len\(source\) is neither a column nor a number or a text, and nothing is calculated"),
        ("`problem-type` % 2 == 0", r"\(`problem-type` % 2 is neither"),
        ("not " * 100_000 + "checked", "nested too deeply"),
        ("(" * 300 + "checked" + ")" * 300, "too many nested parentheses"),
        ("1 == 1", "1 == 1 compares values without a column"),
        ("source == None", "None is compared by `is None` and `is not None`"),
        ("source is 'book'", "`is` and `is not` need None"),
    ],
)
def test_why_a_condition_cannot_be_read(text, reason):
    """Never an address such as `<ast.Name object at 0x...>`, and short even if the condition is not."""
    with pytest.raises(ValueError, match=reason) as error:
        Condition(text)
    assert "0x" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("source < 3", "`source` holds texts, and 3 is a number"),
        ("source != 3", "`source` holds texts, and 3 is a number"),  # would hold for every row
        ("source not in [3]", "`source` holds texts, and 3 is a number"),
        ("source in ['book', 3]", "`source` holds texts, and 3 is a number"),
        ("level != '3'", "`level` holds numbers, and '3' is a text"),
        ("level not in ['3']", "`level` holds numbers, and '3' is a text"),
        ("level == source", "`level` holds numbers, and the column `source` holds texts"),
        ("checked != 0", "`checked` holds True or False, and 0 is a number"),
        ("level != True", "`level` holds numbers, and True is True or False"),
        ("hard == 'yes'", "`hard` holds True or False, and 'yes' is a text"),
        ("day != 'forum'", "compares dates with 'forum'"),
        ("day < 3", "`day` holds dates, and 3 is a number"),
        ("mixed != 1", "`mixed` holds values of several kinds"),
        ("nested != 'a'", "`nested` holds nested values, which cannot be compared"),
        ("level", "`level` holds numbers, and only one of True and False is a condition by itself"),
        ("not source", "`source` holds texts, and only"),
    ],
)
def test_only_like_is_compared_with_like(text, reason):
    with pytest.raises(ValueError, match=reason):
        Condition(text)(TABLE)


def test_a_column_without_values_is_like_any():
    empty = TABLE.assign(source=None)
    assert not Condition("source != 3")(empty).any() and not Condition("source < 'a'")(empty).any()


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
    assert all(draw_order(scores, seed)[2:].tolist() == [2, 3] for seed in range(20))  # not drawn: the best first
    assert draw_order(np.array([-5.0, -0.01, -100.0, -np.inf, -1.0]), 3).tolist() == [1, 4, 0, 2, 3]
    assert {tuple(draw_order(np.zeros(3), seed).tolist()) for seed in range(40)} == {*permutations(range(3))}
