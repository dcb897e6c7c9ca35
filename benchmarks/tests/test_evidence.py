"""The benchmark of docs/evidence.md: what each arm trains on, what is kept, and the arithmetic of the page."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import collect
import evidence
import grid
import numpy as np
import pandas as pd
import pytest
import studies
import torch
from datasets import Dataset
from equations import generate_chains
from safetensors.torch import load_file
from train_tiny_policy import generate


FOLDER = Path(__file__).parents[1] / "gsm8k_equations"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """
    One directory, so that the warm-up and the scores of the pool are made once, as the benchmark itself makes them
    once.
    """
    path = tmp_path_factory.mktemp("evidence")
    return Namespace(output_dir=path, learning_rate=1e-3, passes=2, sizes=[16], dataset_path=None)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(grid, "WARMUP_STEPS", 1)
    monkeypatch.setattr(grid, "SIZES", (16,))


@pytest.fixture(scope="module")
def pool():
    return generate_chains(48, seed=1)


@pytest.mark.slow
def test_arms_and_what_they_train_on(arguments, short, pool, monkeypatch):
    test = generate_chains(6, seed=2)
    table = grid.scores(0, False, pool, arguments).scores.to_pandas()
    learnable = set(table[(table.success_rate > 0) & (table.success_rate < 1)]["index"])
    chosen = {arm: grid.choose(arm, 16, 0, pool, arguments) for arm in evidence.COMPARED}
    for arm, indices in chosen.items():
        assert len(set(indices)) == 16
        assert arm == "random" or set(indices) <= learnable
    rows = table.set_index("index")
    for arm, column in (("learnalign", "score"), ("alignment", "alignment"), ("learnability", "learnability")):
        others = sorted(learnable - set(chosen[arm]))
        assert rows.loc[chosen[arm], column].min() >= rows.loc[others, column].max()
    assert (
        chosen["random"]
        == grid.choose("random", 16, 0, pool, arguments)
        != grid.choose("random", 16, 1, pool, arguments)
    )

    seen = set()
    reward = grid.equations_reward

    def watched(completions, answer, prompts=None, **kwargs):
        seen.update(prompts or ())
        return reward(completions, answer)

    monkeypatch.setattr(grid, "equations_reward", watched)
    build, built = grid.build_trainer, []
    monkeypatch.setattr(grid, "build_trainer", lambda *args: built.append(build(*args)) or built[-1])
    result = grid.run(0, "learnalign", 16, pool, test, arguments)
    assert seen == set(pool.select(chosen["learnalign"])["prompt"])
    assert result["steps"] == 2 and [look["step"] for look in result["looks"]] == [1, 2]
    for look in result["looks"]:
        assert len(look["sampled"]) == len(look["greedy"]) == 6 and max(look["sampled"]) <= 8
    # The same at a fifth of the learning rate
    grid.run(0, "learnalign slow", 16, pool, test, arguments)
    fast, slow = built
    assert slow.args.learning_rate == pytest.approx(fast.args.learning_rate / 5) == pytest.approx(2e-4)
    assert slow.state.log_history[0]["learning_rate"] == pytest.approx(2e-4)
    assert slow.train_dataset["prompt"] == fast.train_dataset["prompt"]
    full = grid.run(0, "full", 16, pool, test, arguments)
    staged = grid.run(0, "staged", 16, pool, test, arguments)
    assert full["steps"] == staged["steps"] == 2


def test_cells_of_the_slow_arms():
    arguments = Namespace(sizes=[100, 500], seeds=[0], arms=["random", "random slow"])
    assert list(grid.cells(arguments)) == [(100, 0, "random"), (500, 0, "random"), (500, 0, "random slow")]


@pytest.mark.slow
def test_persistence_of_a_ranking(arguments, short, pool, monkeypatch):
    monkeypatch.setattr(studies, "PROMPTS", 24)
    monkeypatch.setattr(studies, "STEPS", (1, 2))
    monkeypatch.setattr(studies, "CURVES_AT", 16)
    monkeypatch.setattr(studies, "BEST", 8)
    rows = studies.rows_of(0, pool, arguments)
    assert [(row["rate"], row["step"]) for row in rows] == [(0.0, 0), (1.0, 1), (1.0, 2), (0.2, 1), (0.2, 2)]
    assert all(0 <= row["jaccard"] <= 1 and 0 < row["learnable"] < 1 for row in rows)
    folder = arguments.output_dir / "seed-0"
    warm = load_file(folder / "warm/adapter_model.safetensors")

    def moved(rate, step):
        weights = load_file(folder / f"persistence-{rate}/step-{step}/adapter_model.safetensors")
        return sum((weights[name] - warm[name]).abs().sum().item() for name in warm)

    assert 0 < moved(0.2, 1) < moved(0.2, 2) < moved(1.0, 2) and moved(0.2, 1) < 0.5 * moved(1.0, 1)


def test_agreement_of_two_tables(monkeypatch):
    monkeypatch.setattr(studies, "BEST", 2)
    base = pd.DataFrame(
        {
            "learnability": [0.25, 0.2, 0.1, 0.0, 0.2],
            "alignment": [0.4, 0.3, 0.2, 0.0, 0.1],
            "score": [0.9, 0.8, 0.7, 0.0, 0.6],
        }
    )
    later = base.assign(score=[0.6, 0.7, 0.8, 0.0, 0.9], alignment=[0.0, 0.1, 0.2, 0.0, 0.3])
    found = studies.agreement(later, base)
    assert found["spearman_score"] == found["spearman_alignment"] == -1 and found["spearman_learnability"] == 1
    assert found["jaccard"] == 0 and found["learnable"] == 0.8
    assert found["alignment_of_best"] == 0.35 and found["alignment_of_best_seen_again"] == 0.05
    assert found["alignment_of_all"] == 0.15
    assert studies.agreement(base, base)["jaccard"] == 1


def test_no_step_twice():
    pool = {"prompt": ["1+1=;2+2=", "3+3=;1+1=", "5+5=;6+6=", "6+6=", "7+7="]}
    pool = [{"prompt": prompt.replace("=", "") + "="} for prompt in pool["prompt"]]
    assert grid.without_repeated_steps([0, 1, 2, 3, 4], 5, pool) == [0, 2, 4]
    assert grid.without_repeated_steps([3, 2, 1, 0, 4], 2, pool) == [3, 1]


def test_redundancy_of_the_best():
    """Four prompts in every pool, two best: counted by hand."""
    pool = Dataset.from_dict({"prompt": ["1+1;2+2=", "3+3;2+2=", "5+5;1+1=", "1+1;3+4;5+6="]})
    scores = pd.DataFrame(
        {
            "index": [0, 1, 2, 3],
            "success_rate": [0.5, 0.5, 0.25, 1.0],
            "alignment": [0.9, 0.8, 0.5, 0.0],
            "score": [0.5, 0.4, 0.3, 0.0],
            "gradient_norm": [1.0, 1.0, 9.0, 1.0],
            "seed": 0,
            "cold": False,
        }
    )
    rows = {row.pop("chosen_by"): row for row in collect.redundancy(scores, pool, best=2)}
    together = {"steps": 2.0, "distinct_steps": 0.75, "shared_last_step": 1.0, "distinct_numbers": 3}
    for name in ("score", "alignment", "learnability"):
        assert rows[name] == together  # the first two, which end alike
    assert (
        rows["inner"]["shared_last_step"] == 0 and rows["inner"]["distinct_steps"] == 0.75
    )  # the first and the third
    # The third shares a step with the first, so after the first and nothing else the list is at its end
    assert rows["distinct"]["steps"] == 1.0 and rows["distinct"]["distinct_steps"] == 1.0


@pytest.mark.slow
def test_looking_leaves_the_policy_as_it_is(arguments, short):
    pool, test = generate_chains(16, seed=1), generate_chains(12, seed=2)
    trainer = grid.build_trainer(None, pool, 1, 0, arguments)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    looked = grid.successes(trainer.model, test)
    assert torch.equal(state, torch.get_rng_state())
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # The adapter is merged for speed; beside it, the adapter as it is trained
    trainer.model.eval()
    torch.manual_seed(0)
    prompts = [prompt for prompt in test["prompt"] for _ in range(grid.SAMPLES)]
    answers = [answer for answer in test["answer"] for _ in range(grid.SAMPLES)]
    completions = generate(trainer.model, trainer.processing_class, prompts, do_sample=True)
    rewards = torch.tensor(grid.equations_reward(completions, answers)).view(len(test), -1).sum(1)
    assert looked["sampled"] == rewards.int().tolist()


@pytest.mark.slow
def test_runs_are_kept_and_left_out(arguments, short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results")

    def call(*flags, of=grid):
        monkeypatch.setattr(sys, "argv", ["", "--output_dir", str(tmp_path / "runs"), *flags])
        of.main()
        return capsys.readouterr().out

    small = ("--pool", "32", "--test", "4", "--sizes", "16", "--seeds", "0", "--arms")
    output = call(*small, "random")
    value = output.partition("seed 0, random, 16 prompts, 2 steps: ")[2].split()[0]
    assert f"16 prompts, random: {value}, mean over 1 seeds" in output
    assert "seed 0" not in call(*small, "random")
    with pytest.raises(SystemExit, match="random-16.json' was made under other conditions"):
        call(*small, "random", "--learning_rate", "2e-3")
    assert "1 runs" in call(of=collect)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert "seed 0" not in call(*small, "random")  # the results hold it
    assert "seed 0" in call(*small, "random", "--learning_rate", "2e-3")  # but not under these conditions
    (tmp_path / "runs").rename(tmp_path / "other conditions")
    assert "seed 0, none" in call(*small, "none")
    assert "2 runs" in call(of=collect)
    summary = json.loads((tmp_path / "results/runs.json").read_text())
    assert summary["cells"] == [[0, 0, "none"], [16, 0, "random"]]
    looks = pd.read_parquet(tmp_path / "results/looks.parquet")
    assert sorted(looks.arm) == ["none", "random", "random"] and set(looks.samples) == {8}


def test_more_prompts_than_the_pool_holds(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grid.py", "--pool", "10", "--sizes", "16"])
    with pytest.raises(SystemExit, match="--sizes 16 are more prompts than the pool's 10"):
        grid.main()


def test_interval_of_a_paired_difference():
    rng = np.random.default_rng(3)
    rows, seeds = rng.normal(0, 0.3, 50), rng.normal(0, 0.1, 6)
    theirs = {seed: rng.random(50) for seed in range(6)}
    ours = {seed: theirs[seed] + 0.05 + rows + seeds[seed] for seed in reversed(range(6))}
    middle, low, high, count = evidence.difference(ours, theirs | {9: theirs[0]})
    table = np.stack([ours[seed] - theirs[seed] for seed in range(6)])
    draws = [
        table[np.ix_(rng.integers(0, 6, 6), rng.integers(0, 50, 50))].mean() for _ in range(3000)
    ]  # the definition
    assert count == 6 and middle == pytest.approx(table.mean())
    assert [low, high] == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.01)
    constant = evidence.difference({0: theirs[0] + 0.1}, {0: theirs[0]})
    assert constant == pytest.approx((0.1, 0.1, 0.1, 1))
    assert evidence.difference({0: rows}, {1: rows}) is None
