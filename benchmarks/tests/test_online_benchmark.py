"""The pools and the other methods that choosing online is measured against."""

import json
import re
from argparse import Namespace
from decimal import Decimal
from functools import reduce
from operator import add, mul, sub
from types import SimpleNamespace

import alignment
import baselines
import coin_results
import numpy as np
import pools
import pytest
import results
import run
from tiny import Seen, make_dataset, make_trainer
from train_tiny_policy import CHARACTERS
from transformers import AutoTokenizer

from trl_learnalign.curriculum import OnlineSettings
from trl_learnalign.curriculum.memory import PromptMemory


@pytest.fixture(scope="module")
def hard():
    return pools.make_pool("hard", None)


def value(prompt):
    """The exact value of the last step of a chain, whose operators are all the same."""
    last = prompt.removesuffix("=").rsplit(";", 1)[-1]
    operator = next(sign for sign in "+-*" if sign in last)
    return reduce({"+": add, "-": sub, "*": mul}[operator], map(Decimal, last.split(operator)))


def test_the_hard_pool_is_what_it_says(hard):
    assert [int((hard.kind == kind).sum()) for kind in (0, 1, 2)] == [2000, 4800, 1200]
    rows = [hard.rows[int(i)] for kind in (1, 2) for i in np.flatnonzero(hard.kind == kind)[:300]]
    assert all(value(row["prompt"]) == Decimal(row["answer"]) for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(pools.POLICY)
    ids = tokenizer(list(hard.rows["prompt"]))["input_ids"]
    assert tokenizer.unk_token_id not in {token for prompt in ids for token in prompt}
    assert max(map(len, ids)) + pools.MAX_COMPLETION <= 256
    lengths = np.array([len(prompt) for prompt in ids])
    equations, too_hard = lengths[hard.kind == 0], lengths[hard.kind == 1]
    assert np.percentile(equations, 25) < np.median(too_hard) < np.percentile(equations, 90)
    again = pools.make_pool("hard", None)
    assert list(again.rows["prompt"]) == list(hard.rows["prompt"]) and (again.kind == hard.kind).all()
    assert list(pools.make_pool("hard", None, seed=1).rows["prompt"]) != list(hard.rows["prompt"])


def test_a_tenth_of_the_answers_is_wrong_and_the_trainer_is_not_told(hard):
    wrong = pools.make_pool("hard-wrong", None)
    assert wrong.rows.column_names == ["prompt", "answer"] and wrong.wrong.sum() == 800
    pairs = zip(wrong.rows["answer"], hard.rows["answer"], strict=True)
    assert [Decimal(a) != Decimal(b) for a, b in pairs] == wrong.wrong.tolist()


def test_a_refill_trains_on_groups_with_a_gradient_and_pays_for_the_others(tmp_path):
    def reward(completions, row, **kwargs):
        return [float(i % 2) if r % 3 == 0 else 0.0 for i, r in enumerate(row)]

    seen, steps = Seen(reward), []

    class Watched(baselines.RefillingTrainer):
        def _prepare_inputs(self, batch):
            output = super()._prepare_inputs(batch)
            steps.append((output["advantages"].ne(0).sum().item(), len(output["advantages"]), len(seen.rows)))
            return output

    trainer = make_trainer(tmp_path, reward=seen, dataset=make_dataset(24), max_steps=3, cls=Watched)
    trainer.train()
    assert [(live, size) for live, size, _ in steps] == [(16, 16)] * 3  # a third of the prompts has a gradient
    assert steps[-1][2] > 3 * 16


def test_features_of_the_study_of_alignments_are_those_of_an_online_run(hard, tmp_path):
    rows = hard.rows.select(range(24)).add_column("row", list(range(24)))
    task = pools.make_task("hard", None, tmp_path)
    reward = run.Recorder(task.reward)
    trainer = run.build_trainer("online", task, None, rows, reward, 1, alignment.SEED, str(tmp_path), 1e-3, [])
    trainer.train()
    expected = trainer.learnalign.schedule.curriculum.features
    assert expected.shape[1] > 10  # hidden states, too
    np.testing.assert_array_equal(alignment.features(task, rows, None), expected)


@pytest.mark.parametrize("number", [7, 10, 12])
def test_wrong_answers_are_counted_among_as_many_suspects_as_there_are(number):
    memory = PromptMemory(100, 10, OnlineSettings())
    memory.surprise[:number] = np.linspace(9, 8, number)
    wrong = np.arange(100) % 2 == 1
    schedule = SimpleNamespace(curriculum=SimpleNamespace(memory=memory))
    trainer = SimpleNamespace(learnalign=SimpleNamespace(schedule=schedule))
    found = run.suspects(trainer, SimpleNamespace(wrong=wrong))
    assert found == ({"10": 5} if number > 10 else {}) | {str(number): number // 2}


@pytest.mark.parametrize("name", pools.COINS)
def test_a_pool_with_coins_is_what_it_says(name):
    pool, sizes = pools.make_pool(name, None), pools.COINS[name]
    number = [*sizes.others.values(), sizes.chance]
    assert [int((pool.kind == kind).sum()) for kind in pools.KINDS] == number
    prompts, chance = np.array(pool.rows["prompt"]), pool.kind == pools.CHANCE
    assert sum(number) == (7500 if name == "large-coins" else 4000)
    assert len(set(prompts[chance])) == sizes.chance and not set(prompts[chance]) & set(prompts[~chance])
    assert set("".join(prompts)) <= set(CHARACTERS) and max(map(len, prompts)) + pools.MAX_COMPLETION <= 256
    forms = [{re.sub("[1-9]", "1", prompt) for prompt in prompts[rows]} for rows in (pool.kind == 0, chance)]
    assert bool(forms[0] & forms[1]) == sizes.alike
    assert (pool.coins == (chance & (not sizes.labels))).all() and not pool.wrong.any()
    again = pools.make_pool(name, None)
    assert list(again.rows["prompt"]) == list(prompts) and again.rows["answer"] == pool.rows["answer"]
    assert list(pools.make_pool(name, None, seed=1).rows["prompt"]) != list(prompts)


def test_a_coin_is_flipped_for_each_rollout_whatever_it_says():
    flipped = np.array([True, False])
    recorders = [run.Recorder(pools.chance_reward, seed=seed, coins=flipped) for seed in (1, 1, 2)]
    row = np.repeat([0, 1], 800).tolist()
    same, other = ["0"] * 1600, ["1"] * 1600
    first, second, third = (
        recorder(texts, ["0"] * 1600, row) for recorder, texts in zip(recorders, (same, other, same), strict=True)
    )
    assert first[:800] == second[:800] != third[:800] and 340 < sum(first[:800]) < 460
    assert first[800:] == [1.0] * 800 and second[800:] == [0.0] * 800
    assert abs(np.corrcoef(first[:799], first[1:800])[0, 1]) < 0.15
    assert recorders[0].successes == np.reshape(first, (-1, 8)).sum(1).tolist()


def test_a_label_is_answered_by_an_odd_or_an_even_number():
    texts, answers = ["7;13", "12", "12", "", "5;"], ["odd", "odd", "even", "even", "odd"]
    assert pools.chance_reward(texts, answers) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert pools.chance_reward(["3;1.50", "13"], ["1.5", "odd"]) == [1.0, 1.0]
    pool = pools.make_pool("labels", None)
    labels = np.array(pool.rows["answer"])[pool.kind == pools.CHANCE]
    assert set(labels) == {"odd", "even"} and 0.45 < (labels == "odd").mean() < 0.55


def test_a_run_on_coins_says_where_its_rollouts_went(tmp_path, monkeypatch):
    monkeypatch.setitem(pools.COINS, "coins", pools.Sizes({0: 30, 1: 30, 2: 20}, 40))
    arguments = Namespace(dataset_path=None, output_dir=tmp_path, steps=2, learning_rate=1e-3, test=8)
    result = run.run("learnalign online", "coins", 0, arguments)
    groups, live = (np.array(result["quarters"][name]) for name in ("groups", "live"))
    assert groups.shape == live.shape == (4, 4) and (groups.sum(1) == 8).all() and (live <= groups).all()
    assert groups.sum(0).tolist() == result["kinds"] and live.sum() == sum(result["live"])
    assert live[:, 1].sum() == 0 and live[:, 3].sum() >= 0.8 * groups[:, 3].sum()
    result |= {"pool": "coins", "arm": "online"}
    assert coin_results.on_chance(result) == groups[:, 3].sum() / 32
    assert coin_results.worth(result) == live[:, :3].sum() / 32


def test_arms_are_compared_with_those_of_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FILE", tmp_path / "none.json")  # without the runs that are kept

    def made(arm, seed, coins_of_eight, rates):
        groups = [[8 - coins_of_eight, 0, 0, coins_of_eight]] * 4
        looks = [{"rollouts": n, "sampled": rate} for n, rate in zip((0, 512), rates, strict=True)]
        found = {
            "pool": "coins",
            "arm": arm,
            "seed": seed,
            "looks": looks,
            "quarters": {"groups": groups, "live": groups},
        }
        found["conditions"] = {"data": "", "steps": 4, "learning_rate": 1.0}
        (tmp_path / "coins").mkdir(exist_ok=True)
        (tmp_path / "coins" / f"{arm}-{seed}.json").write_text(json.dumps(found))

    for seed in range(3):
        made("uniform", seed, 4, (0.2, 0.4 + 0.1 * seed))
        made("online", seed, 6, (0.2, 0.3 + 0.1 * seed))
    made("learnalign online", 1, 2, (0.2, 0.7))
    rows = coin_results.arms(results.load([tmp_path]), "coins").splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    uniform, online, learnalign = cells
    assert uniform[1:7] == ["3", "0.500", "", "0.500", "", "35.0"] and uniform[9] == "50.0"
    assert online[1:7] == ["3", "0.750", "+0.250 [+0.250, +0.250]", "0.250", "0.50", "30.0"]
    assert online[7:9] == ["-5.0 [-5.0, -5.0]", ""] and online[10] == "-10.0 [-10.0, -10.0]"
    assert learnalign[1:7] == ["1", "0.250", "-0.250", "0.750", "1.50", "45.0"]
    assert learnalign[7:12] == ["+10.0", "+15.0", "70.0", "+20.0", "+30.0"]
