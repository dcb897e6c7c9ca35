"""The questions of the runs of a real chat model, and the tables of its runs."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "chat"))

from questions import GUESSED, HELD_OUT, KINDS, POOLS, SHARES, held_out, is_right, pool
from results import collect, differences, interval, table_of_shares, table_of_steps, table_of_success


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_has_its_kinds_and_nothing_that_is_held_out(name):
    rows, test = pool(name, 3), held_out()
    assert rows["kind"].value_counts().to_dict() == POOLS[name]
    texts = [messages[-1]["content"] for messages in rows["prompt"]]
    assert len(set(texts)) == len(rows)
    assert not {messages[-1]["content"] for messages in test["prompt"]} & set(texts)
    assert set(test["kind"].value_counts()) == {HELD_OUT} and "product 2" not in set(test["kind"])
    assert pool(name, 3).equals(rows) and not pool(name, 4).equals(rows)


def test_answers_are_right_and_guesses_are_balanced():
    rows = pool("guessed", 0)
    for messages, answer, kind in zip(rows["prompt"], rows["answer"], rows["kind"], strict=True):
        numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in messages[-1]["content"]).split()]
        if kind.startswith("sum"):
            assert sum(numbers) == int(answer)
        elif kind == "largest":
            assert max(numbers) == int(answer)
        elif kind == "prime":
            assert (answer == "yes") == all(numbers[0] % i for i in range(2, int(numbers[0] ** 0.5) + 1))
    for kind in GUESSED:
        assert 0.4 < (rows["answer"][rows["kind"] == kind] == "yes").mean() < 0.6


def test_the_last_number_or_the_first_yes_or_no_counts():
    for text, answer, right in (
        ("3 + 4 = 7.", "7", True),
        ("7 is 3 + 4", "7", False),
        ("1,204", "1204", True),
        ("No. Or yes", "yes", False),
        ("Yes!", "yes", True),
        ("", "7", False),
    ):
        assert is_right(text, answer) is right


def test_the_tables_of_made_up_runs(tmp_path):
    for arm, gain in (("random", 0.0), ("learnalign-online", 0.1)):
        for seed in range(3):
            folder = tmp_path / "short" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            looks = [{"step": step, "kl": 0.1, "mean": 0.1 + gain * step, "sum 1": 0.5} for step in (0, 1, 2)]
            (folder / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
            step = {"kinds": [0, 0, KINDS.index("sum 2"), 3], "successes": [4, 8, 0, 1], "update_norm": 0.5}
            (folder / "steps.jsonl").write_text(2 * (json.dumps(step) + "\n"))
    arms = collect(tmp_path)["short"]
    assert table_of_success(arms).loc["learnalign-online"].tolist() == [0.1, 0.2, 0.3]
    assert table_of_shares(arms, "short").loc["random", ["sum 1", "sum 2"]].tolist() == [0.5, 0.5]
    assert table_of_steps(arms).loc["random", ["live, first half", "guessed"]].tolist() == [0.5, 0.0]
    assert differences(arms, "random").loc["learnalign-online", "at the end"] == "+0.200 [+0.200, +0.200]"
    assert interval([0.1, 0.3]) == "+0.100, +0.300" and set(SHARES) < set(KINDS)
