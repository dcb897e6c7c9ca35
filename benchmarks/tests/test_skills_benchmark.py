"""The testbeds of many skills and of a target."""

import random
import re
from argparse import Namespace
from decimal import Decimal
from fractions import Fraction
from math import gcd, lcm, prod

import numpy as np
import pools
import pytest
import results
import run
import skills
import skills_policy
from skills import LEVELS, SPLITS, TASKS
from train_tiny_policy import build_model, build_tokenizer, save

from trl_learnalign.curriculum import OnlineSettings


@pytest.fixture(scope="module", params=SPLITS)
def parts(request):
    return request.param, skills.split(request.param)


def test_no_prompt_is_in_two_parts_and_all_tasks_and_levels_are_there(parts):
    name, (pool, test, target) = parts
    number, held_out, tasks = SPLITS[name]
    prompts = [*pool["prompt"], *test["prompt"], *target["prompt"]]
    assert len(set(prompts)) == len(prompts)
    cells = [LEVELS * task + level for task, level in zip(pool["task"], pool["level"], strict=True)]
    assert np.bincount(cells).tolist() == [number] * len(TASKS) * LEVELS
    wanted = {TASKS[task].name for task in test["task"]}
    assert wanted == {*(tasks or [task.name for task in TASKS])} == {TASKS[task].name for task in target["task"]}
    assert len(test) == len(target) == held_out * LEVELS * len(wanted)
    if tasks:  # a fifth of the pool is of the kind that the test asks for
        assert 0.15 < np.isin(pool["task"], test["task"]).mean() < 0.25


def right(task, body):
    """The answer, by other means than those of reasoning-gym; None for tasks that are not worked out here."""
    if task in ("chain_sum", "products"):
        return str(eval(body))
    if task == "decimal_chain_sum":
        return str(sum(map(Decimal, re.findall(r"[+-]?[\d.]+", body))))
    if task in ("gcd", "lcm"):
        return str((gcd if task == "gcd" else lcm)(*map(int, body.split(","))))
    if task == "count_bits":
        return str(int(body).bit_count())
    if task == "spell_backward":
        return body[::-1]
    if task == "fraction_simplification":
        value = Fraction(*map(int, body.split("/")))
        return f"{value.numerator}/{value.denominator}"
    if task == "number_sorting":
        numbers, order = body.split(":")
        return ",".join(sorted(numbers.split(","), key=int, reverse=order == "d"))
    if task == "simple_equations":  # linear in x
        left, value = body.split("=")
        at = [eval(left, {"x": Fraction(x)}) for x in (0, 1)]
        return str((int(value) - at[0]) / (at[1] - at[0]))
    if task == "complex_arithmetic":
        value = eval(body.replace("i", "j"))
        return f"{int(value.real)}{int(value.imag):+d}i"
    return None


def test_the_answers_are_right_and_so_are_the_prompts_made_of_the_questions(parts):
    checked = set()
    for row in parts[1][0]:
        task = TASKS[row["task"]].name
        body = row["prompt"][1:].removesuffix("=")
        if task == "prime_factorization":
            factors = [int(factor) for factor in row["answer"].split("*")]
            assert prod(factors) == int(body) and all(all(f % d for d in range(2, f)) for f in set(factors) if f < 999)
        elif task == "base_conversion":
            text, first, second = body.split(":")
            assert int(text, int(first)) == int(row["answer"], int(second))
        elif (value := right(task, body)) is not None:
            assert row["answer"] == value, row
        else:
            continue
        checked.add(task)
    assert len(checked) == len(TASKS) - 1  # not the sequences


def test_spoilt_answers_are_wrong():
    rows, rng = skills_policy.practice_rows(0, 30), random.Random(0)
    assert len(rows) == 3 * len(TASKS)
    for (number, _), found in rows.items():
        for _, answer in found:
            wrong = skills_policy.spoilt(answer, number, rng)
            assert wrong != answer and len(wrong) == len(answer)


def test_copies_say_the_same_in_other_words():
    pool = pools.make_pool("hard-copies", None)
    assert pool.wrong.sum() == 1600
    prompts, answers = list(pool.rows["prompt"]), list(pool.rows["answer"])
    known = {(prompts[row], answers[row]) for row in np.flatnonzero(~pool.wrong)}
    for row in np.flatnonzero(pool.wrong)[:200]:
        original = pools.exchanged(prompts[row])
        assert original != prompts[row] and (original, answers[row]) in known
    assert pools.exchanged("24+48;72/2=") == "48+24;72/2=" and pools.exchanged("5-3;2*4=") == "5-3;4*2="
    assert pools.exchanged("1+2+3=") == "1+2+3="


def test_of_failed_rollouts_a_share_is_rewarded_and_no_other():
    recorder = run.Recorder(skills.exact_reward, 0.25, seed=1)
    rewards = recorder(["1"] * 800 + ["2"] * 800, ["1"] * 1600, list(range(1600)))
    assert rewards[:800] == [1.0] * 800 and 150 < sum(rewards[800:]) < 250
    assert sum(recorder.successes) == sum(rewards)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A pool of 56 prompts for a policy that knows nothing, rewarded for the parity of a completion's length."""
    monkeypatch.setitem(SPLITS, "skills-target", (1, 1, skills.TARGET))
    monkeypatch.setattr(skills, "exact_reward", lambda texts, answer, **_: [float(len(text) % 2) for text in texts])
    monkeypatch.setattr(run, "CHOSEN", 20)
    skills.split.cache_clear()
    tokenizer = build_tokenizer(skills.CHARACTERS)
    save(build_model(tokenizer, 32, 1), tokenizer, tmp_path / "skills-policy")
    yield Namespace(dataset_path=None, output_dir=tmp_path, steps=7, learning_rate=1e-3, test=99)
    skills.split.cache_clear()


@pytest.mark.parametrize("arm", ["filter", "target", "target then online", "online with groups", "target online"])
def test_what_a_selection_rolls_out_is_part_of_the_runs_rollouts(small, arm):
    result = run.run(arm, "skills-target", 0, small)
    before = {"filter": 56, "online with groups": 0, "target online": 0}
    selected = before.get(arm, 56 + 12)  # the pool and the target set
    # Whole batches are generated
    assert 0 <= result["selection_rollouts"] - run.GROUP * selected <= 2 * run.CHUNK * run.GROUP
    trained = sum(result["groups"])
    assert result["rollouts"] == result["selection_rollouts"] + run.GROUP * trained and trained % run.CHUNK == 0
    assert 0 <= result["rollouts"] - 7 * run.CHUNK * run.GROUP < run.CHUNK * run.GROUP
    assert sum(result["kinds"]) == trained and result["distinct"] <= {
        "filter": 20,
        "target": 20,
        "target then online": 28,
    }.get(arm, 56)
    assert [look["step"] for look in result["looks"]][-1] == trained // run.CHUNK
    tasks = set(skills.split("skills-target")[1]["task"])
    assert len(result["looks"][-1]["tasks"]) == len(tasks) == 3
    kinds = np.reshape(result["kinds"] + [0] * (LEVELS * len(TASKS) - len(result["kinds"])), (-1, LEVELS)).sum(1)
    assert result["target_share"] == pytest.approx(kinds[sorted(tasks)].sum() / trained, abs=1e-4)


def measured(rollouts, rates, seed=0, **more):
    looks = [{"rollouts": a, "sampled": b} for a, b in zip(rollouts, rates, strict=True)]
    conditions = {"data": "", "steps": 1, "learning_rate": 1} | more.pop("conditions", {})
    return {"pool": "hard", "seed": seed, "looks": looks, "conditions": conditions, **more}


def test_means_over_runs_and_what_runs_share():
    often, seldom = measured([0, 100, 200, 400], [0, 0.4, 0.6, 0.6]), measured([0, 190, 400], [0, 0.2, 0.6])
    assert [[look["rollouts"] for look in looks] for looks in results.shared([often, seldom])] == [
        [0, 200, 400],
        [0, 190, 400],
    ]
    # (200 x .3 + 200 x .6) / 400 = .45; (190 x .1 + 210 x .4) / 400 = .2575
    assert results.area_gains([(often, seldom)]) == pytest.approx([100 * (0.45 - 0.2575)])
    # After a selection of 200 rollouts: .2 before it ends, of 400 in all, then on the mean of .2 and .8
    late = measured([200, 400], [0.2, 0.8], selection_rollouts=200)
    assert results.area_gains([(late, seldom)]) == pytest.approx([100 * (0.35 - 0.2575)])


def test_runs_under_other_conditions_are_not_compared():
    one, two = measured([0], [0], arm="online"), measured([0], [0], arm="uniform", conditions={"learning_rate": 2})
    with pytest.raises(ValueError, match="online was run with"):
        results.paired([one, two], "hard", "online")


def test_an_ablation_has_the_settings_of_its_name_and_all_others_as_they_are(tmp_path):
    changed = {"online without fading": {"half_life_steps": 1e9}, "online without longer rests": {"longest_rest": 0}}
    task = pools.make_task("hard", None, tmp_path)
    rows = pools.make_pool("hard", None).rows.select(range(24)).add_column("row", list(range(24)))
    for arm in ("online", "online without features", *changed):
        reward = run.Recorder(task.reward)
        trainer = run.build_trainer(arm, task, None, rows, reward, 1, 0, str(tmp_path / arm), 1e-3, [])
        assert trainer.learnalign.schedule.settings == OnlineSettings(**changed.get(arm, {}))
