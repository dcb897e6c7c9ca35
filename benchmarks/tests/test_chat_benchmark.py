"""The questions of the runs of a real chat model, and the tables of its runs."""

import json
import os
import subprocess
import sys

import chat_results
import harness
import pytest
from chat_results import load, tables
from harness import ROOT
from questions import GUESSED, HELD_OUT, KINDS, POOLS, held_out, is_right, pool
from results import gains, of, paired
from tiny import make_model, make_tokenizer


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_has_its_kinds_and_nothing_that_is_held_out(name):
    if name == "gym":
        pytest.importorskip("reasoning_gym")
    rows, test = pool(name, 3), held_out(name)
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
    for text, answer, right in (
        ("4 - 5 = -1", "-1", True),
        ("It was a Friday.", "Friday", True),
        ("Monday, or Friday", "Friday", False),
        ("False", "True", False),
        ("dud", "dud", True),
        ("The name is Tayo.", "Tayo", True),
    ):
        assert is_right(text, answer, "gym") is right


def test_the_tables_of_made_up_runs(tmp_path, monkeypatch):
    for arm, gain in (("random", 0.0), ("learnalign-online", 0.1)):
        for seed in range(3):
            folder = tmp_path / "short" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            looks = [{"step": step, "kl": 0.1, "mean": 0.1 + gain * step, "sum 1": 0.5} for step in (0, 1, 2)]
            (folder / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
            step = {"kinds": [0, 0, KINDS.index("sum 2"), 3], "successes": [4, 8, 0, 1], "update_norm": 0.5}
            step |= {"seconds": 20.5 + seed} | ({"tokens": 900} if arm == "random" else {})
            (folder / "steps.jsonl").write_text(2 * (json.dumps(step) + "\n"))
    (tmp_path / "short" / "online-7").mkdir()  # which has not begun
    (tmp_path / "short" / "online-8").mkdir()
    for name in ("steps.jsonl", "looks.jsonl"):  # the first step is under way
        (tmp_path / "short" / "online-8" / name).touch()
    monkeypatch.setattr(chat_results, "FILE", tmp_path / "none.json")
    assert load([tmp_path]) == []
    runs = load([tmp_path], unfinished=True)
    success, _, shares, steps = ([*map(cells_of, text.splitlines()[2:])] for text in tables(runs, "short"))
    cells = {row[0]: row for row in success}
    assert cells["LearnAlign online"][1:5] == ["0, 1, 2", "0.100", "0.200", "0.300"]
    assert cells["LearnAlign online"][5:] == ["+0.200 [+0.200, +0.200]", "+0.150 [+0.150, +0.150]", "", "43"]
    assert cells["random prompts"][4:] == ["0.100", "", "", "2", "43"]
    assert gains(paired(runs, "short", "random", "learnalign-online"), 1) == pytest.approx([-0.2] * 3)
    assert shares[0][:3] == ["the pool", "0.07", "0.05"]
    assert shares[1][1] == "0.50 (0.50)" and shares[1][1 + KINDS.index("product 1")] == "0.00"
    assert steps[0][1:6] == ["0.50", "0.50", "0.00", "0.50", "0.50"]


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_results, "FILE", tmp_path / "chat.json")
    for seed, done in ((0, True), (1, False)):
        folder = tmp_path / "guessed" / f"random-{seed}"
        folder.mkdir(parents=True)
        (folder / "looks.jsonl").write_text(json.dumps({"step": 0, "kl": 0.0, "mean": 0.1, "sum 1": 0.5}) + "\n")
        step = {"kinds": [KINDS.index("prime"), 0], "successes": [4, 8], "update_norm": 0.5}
        (folder / "steps.jsonl").write_text(json.dumps(step) + "\n")
        if done:
            logged = {"grad_norm": [0.5, None, 0.7], "entropy": [1.0, 2.0]}
            (folder / "done.json").write_text(json.dumps({"steps": 1, "logged": logged}))
    monkeypatch.setattr(sys, "argv", ["", "--runs", str(tmp_path), "--collect"])
    chat_results.main()
    (run,) = of(load(), "guessed", "random")
    assert run["seed"] == 0 and run["conditions"] == {"steps": 1}
    assert run["grad_norm"] == 0.6 and chat_results.on_guesses(run) == 0.5


def test_a_cell_is_run_once_goes_on_and_has_its_conditions(tmp_path):
    done, lock, begun = (tmp_path / name for name in ("a/done.json", "a/lock", "a/conditions.json"))

    def work(value):
        if value is None:
            raise KeyboardInterrupt
        return {"value": value}

    with pytest.raises(KeyboardInterrupt):
        harness.cell(done, {"steps": 1}, work, None, lock=lock, begun=begun)
    assert harness.read(begun) == {"steps": 1} and not done.exists()
    with pytest.raises(SystemExit, match="'.*conditions.json' was made under other conditions"):
        harness.cell(done, {"steps": 2}, work, 1, lock=lock, begun=begun)
    with harness.claimed(lock) as free:
        assert free and harness.cell(done, {"steps": 1}, work, 1, lock=lock, begun=begun) is None
    assert harness.cell(done, {"steps": 1}, work, 1, lock=lock, begun=begun) == {"value": 1, "steps": 1}
    assert harness.cell(done, {"steps": 1}, work, 2, lock=lock, begun=begun) is None
    assert harness.read(done) == {"value": 1, "steps": 1}


def cells_of(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_at_toy_size(tmp_path):
    """Without a GPU as well: all but what needs one, with a tiny policy; a second call finds all done."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    toy = {"PYTHON": sys.executable, "MODEL": str(tmp_path / "model"), "SEEDS": "1", "STEPS": "1", "PAIRS": "1"}
    toy |= {"ARMS": "random,learnalign online", "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        command = [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
        done = subprocess.run(command, env=os.environ | toy, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "out" / "taps.json").read_text())["cases"]) == 4
    assert len([*(tmp_path / "out" / "chat").glob("*/*/done.json")]) == 4
    assert "| LearnAlign online | 1 |" in done.stdout and "4. Asynchronous training" in done.stdout
    assert "step 1:" not in done.stdout
