"""
What is said where nothing was chosen, or less than was asked for: the same in Python, in training and on the page.
"""

import logging
import re

import pandas as pd
import pytest
from tiny import config, make_dataset, make_trainer, parity_reward

from trl_learnalign import select_prompts
from trl_learnalign.selection.dry_run import _whole, plan_selection
from trl_learnalign.selection.result import Selection
from trl_learnalign.selection.warnings import selection_warning


def constant(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


def cycle(*values):
    """Rewards that differ within every group."""

    def reward(completions, **kwargs):
        return [values[i % len(values)] for i in range(len(completions))]

    return reward


def by_row(completions, row, **kwargs):
    """Always or never solved."""
    return [float(r % 2) for r in row]


def few(completions, row, **kwargs):
    return [float(i % 2) if r < 3 else 0.0 for i, r in enumerate(row)]


GRADED = (
    r"rewards of 24 of 24 prompts differ.*`success_threshold` \({}\), {} \(rewards are between {} and {}\)\. "
    "Use `learn"
)
CASES = {
    "graded": (cycle(0, 0.3, 0.7), {}, GRADED.format(1, "which no reward reaches", 0, 0.7)),
    "graded above": (cycle(2, 3), {}, GRADED.format(1, "which all rewards reach", 2, 3)),
    "never": (constant(0.0), {}, r"none was ever solved \(all rewards are 0\).*`success_threshold`.* easier prompts"),
    "always": (constant(1.0), {}, r"all were always solved \(all rewards are 1\).* or harder prompts"),
    "either": (
        by_row,
        {},
        r"every prompt was always or never solved \(rewards are between 0 and 1\).* easier or harder",
    ),
    "equal": (
        constant(0.1),
        {"learnability": "variance"},
        r"rollouts of every prompt had equal rewards \(all.* 0\.1\)",
    ),
    "unscorable": (
        constant(None),
        {},
        r"No prompt could be scored: the rewards of all 24 prompts were None, NaN or inf",
    ),
    "few": (
        few,
        {"num_prompts": 8},
        r"Only 3 prompts are learnable, fewer than `num_prompts` \(8\).*a larger `num_rollouts`",
    ),
    "all asked for": (few, {"num_prompts": 3}, None),
    "variance": (cycle(0, 0.3, 0.7), {"learnability": "variance"}, None),
    "random": (constant(None), {"score": "random"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_warning_names_the_reason_and_the_remedy(case, tmp_path, caplog, capsys):
    reward, changes, words = CASES[case]
    trainer = make_trainer(tmp_path, reward=reward, max_steps=1)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        selection = select_prompts(trainer, config(**({"score": "learnability"} | changes)))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("trl_learnalign")]
    assert selection_warning(selection) == selection_warning(Selection.load(next(tmp_path.glob("learnalign/step-*"))))
    assert said == ([] if words is None else [selection_warning(selection)])
    if words is not None:
        assert re.search(words, said[0]) and "\n" not in said[0]
        assert ("`learnability='variance'`" in said[0]) == case.startswith("graded")


def odd(completions, row, **kwargs):
    return [float(i % 2) if r % 2 else None for i, r in enumerate(row)]


def even(completions, row, **kwargs):
    return [None if r % 2 else float(i % 2) for i, r in enumerate(row)]


def selected(path, caplog, reward, choice, **changes):
    """The selection, and the warnings of it."""
    trainer = make_trainer(path, reward=reward, max_steps=1, **changes)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        selection = select_prompts(trainer, config(**({"score": "learnability"} | choice)))
    return selection, [one.getMessage() for one in caplog.records if one.name.startswith("trl_learnalign")]


def test_prompts_without_a_deciding_reward_are_left_out_with_a_warning(tmp_path, caplog):
    """A whole task, if `success_reward` names the function of the other."""
    selection, said = selected(tmp_path / "a", caplog, [odd, even], {"success_reward": "odd"})
    assert selection.provenance["unscorable"] == list(range(0, 24, 2)) and len(said) == 1
    assert "12 of 24 prompts (50%) are left out" in said[0] and "rows 0, 2, 4, 6, 8 and others" in said[0]
    assert "12 of them have other rewards" in said[0] and "name all that decide in `success_reward`" in said[0]
    caplog.clear()
    selection, said = selected(tmp_path / "b", caplog, [odd, even], {"success_reward": ["odd", "even"]})
    assert not selection.provenance["unscorable"] and not said and selection.num_learnable() == 24
    _, said = selected(tmp_path / "c", caplog, odd, {})
    assert len(said) == 1 and "Check what the reward function makes of these rows" in said[0]


@pytest.mark.parametrize("score", ["learnability", "learnalign"])
def test_what_has_no_token_in_the_loss_is_not_learnable(tmp_path, caplog, score):
    """By `mask_truncated_completions`: the trainer's own gradient of such groups is 0."""
    settings = {"mask_truncated_completions": True, "max_completion_length": 1}
    selection, said = selected(tmp_path, caplog, cycle(0, 1), {"score": score, "save_rollouts": True}, **settings)
    table = selection.to_pandas()
    ended = sum(  # groups with a completion that ended by itself
        any(ids[-1] in (0, 1) for ids in rows)
        for rows in read_rollouts(tmp_path).groupby("index")["completion_ids"].apply(list)
    )
    assert selection.num_learnable() == ended < 24
    if score == "learnalign":
        assert (table.loc[table["learnability"] > 0, "gradient_norm"] > 0).all()
    assert len([text for text in said if "leaves these out of the loss" in text]) == 1
    assert f"{24 - ended} of 24 prompts count as not learnable" in said[-1]
    assert not any("although the rewards of" in text and "success_threshold" in text for text in said)


def read_rollouts(path):
    (file,) = path.rglob("rollouts.parquet")
    return pd.read_parquet(file)


def test_a_success_that_has_no_weight_has_no_gradient(tmp_path, caplog):
    reward, form = cycle(0, 1), constant(1.0)
    form.__name__ = "form"
    settings = {"reward_weights": [0.0, 1.0]}
    selection, said = selected(tmp_path, caplog, [reward, form], {"success_reward": "reward"}, **settings)
    assert not selection.indices and len(said) == 1 and "a weight in `reward_weights`" in said[0]


def test_a_threshold_on_the_wrong_side_of_shaped_rewards_is_told(tmp_path, caplog):
    selection, said = selected(tmp_path, caplog, cycle(0, 0.95, 0, 0.9, 0, 0.97, 0, 1.0), {})
    assert selection.indices and len(said) == 1
    assert "75% of them, between 0.9 and 0.97" in said[0] and "`success_threshold` (1)" in said[0]


@pytest.mark.parametrize(("reward", "threshold"), [(0.9999999, 1.0), (0.7, 0.7), (0.9, 0.9), (0.95, 0.95)])
def test_a_reward_as_great_as_the_threshold_is_a_success(tmp_path, caplog, reward, threshold):
    """Up to the rounding of float32."""
    selection, said = selected(tmp_path, caplog, cycle(0, reward), {"success_threshold": threshold})
    assert not said and selection.mean_success_rates()[0] == 0.5


def test_messages_have_enough_digits(tmp_path, caplog):
    _, said = selected(tmp_path, caplog, cycle(0, 0.99999), {})
    assert "which no reward reaches (rewards are between 0 and 0.99999)" in said[0]


def test_plan_and_training_say_it_too(tmp_path, caplog):
    trainer = make_trainer(tmp_path, reward=cycle(0, 0.3, 0.7), max_steps=1)
    text, learnable = plan_selection(trainer, config())
    assert not learnable and "warning: No prompt is learnable, although the rewards of 16 of 16 prompts differ" in text
    text, learnable = plan_selection(make_trainer(tmp_path, reward=few, max_steps=1), config())
    # 3 of the 16 that are tried, if all of them are among these
    assert learnable and "prompts will be learnable, fewer than `num_prompts` (8)" in text
    trainer = make_trainer(tmp_path, config(), reward=cycle(0, 0.3, 0.7), max_steps=6)
    trainer.train()
    assert "No prompt is learnable, although the rewards" in caplog.text
    assert "Training goes on with random prompts" in caplog.text and trainer.state.global_step == 6


@pytest.mark.parametrize("score", ["learnability", "target"])
def test_a_dry_run_counts_what_the_selection_does(tmp_path, score):
    """Of 24 rows 22 meet the condition, of which 16 are tried. The target is rolled out whole in both."""
    target = {"target_dataset": make_dataset(12).select(range(6))} if score == "target" else {}
    choice = config(score=score, where="row < 22", **target)
    trainer = make_trainer(tmp_path, reward=parity_reward, max_steps=1)
    text, _ = plan_selection(trainer, choice)
    assert "pool: 22 prompts x 8 rollouts = 176\n" in text and "tried: 16 prompts" in text
    assert ("target: 6 prompts x 8 rollouts = 48\n" in text) == (score == "target")
    select_prompts(trainer, choice)
    found = {path.parent.name: 0 for path in tmp_path.glob("_learnalign/*/*/*.log")}
    for path in tmp_path.glob("_learnalign/*/*/*.log"):
        found[path.parent.name] += path.stat().st_size / 1e6
    measures = ["rollouts", "gradients", "target-rollouts", "target-gradients"] if target else ["rollouts"]
    assert set(found) == set(measures)
    for name, size in found.items():
        said = float(re.search(rf"[(,] ?{name.replace('-', ' ')} ([0-9.]+) MB", text)[1])
        assert said == pytest.approx(size, abs=0.006 if "rollouts" in name else 0.02), name


def test_only_the_phases_of_the_pool_are_scaled():
    seconds = {"rollouts": 2.0, "target rollouts": 3.0, "target gradients": 4.0, "gradients": 5.0, "scores": 1.0}
    whole = {"rollouts": 200.0, "target rollouts": 3.0, "target gradients": 4.0, "gradients": 500.0, "scores": 100.0}
    assert _whole(seconds, 100.0) == whole
    assert _whole({"rollouts": 8, "target-rollouts": 5}, 2.0) == {"rollouts": 16, "target-rollouts": 5}


def test_a_draw_that_was_none_is_told(tmp_path, caplog):
    """With scores of which none is above 0 the best are taken, not any."""
    choice = config(score=lambda table: -table["row"] - 1.0, take="proportional", num_prompts=5)
    selection = select_prompts(make_trainer(tmp_path, max_steps=1), choice)
    assert selection.indices == [0, 1, 2, 3, 4]
    assert "5 of the 5 chosen prompts were not drawn" in caplog.text and "use `take='top'`" in caplog.text
    caplog.clear()
    choice = config(score=lambda table: 3.0 - table["row"], take="proportional", num_prompts=5)
    selection = select_prompts(make_trainer(tmp_path / "some", max_steps=1), choice)
    assert sorted(selection.indices[:3]) == [0, 1, 2] and selection.indices[3:] == [3, 4]
    assert "2 of the 5 chosen prompts were not drawn" in caplog.text
