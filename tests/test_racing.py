"""A race: the rule against a slow count, and selections by rounds, killed ones too."""

import itertools
import math
import zlib
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tiny import Seen, config, fixed_reward, make_dataset, make_trainer

from trl_learnalign import LearnAlignConfig, select_prompts
from trl_learnalign.host import generation
from trl_learnalign.measures import racing
from trl_learnalign.selection.dry_run import plan_selection


def beta_binomial(successes, tries, a, b):
    """Chance of so many successes: an integral over the rate, by small steps."""
    rates = (np.arange(20_000) + 0.5) / 20_000
    density = rates ** (a - 1) * (1 - rates) ** (b - 1)
    chance = math.comb(tries, successes) * rates**successes * (1 - rates) ** (tries - successes)
    return (chance * density).sum() / density.sum()


def test_the_rule_is_that_of_every_outcome_counted_one_by_one():
    random = np.random.default_rng(0)
    rates = random.beta(1.2, 2.1, 300)
    tries = random.choice([0, 1, 2], 300, p=[0.05, 0.1, 0.85])  # a reward may be missing
    successes = random.binomial(tries, rates)
    prior = racing.fit_prior(successes, tries)
    # Moments of the prior are those of the counts and of three prompts more
    k, n = np.append(successes, [0, 1, 2]), np.append(tries, [2, 2, 2])
    a, b = prior
    assert a / (a + b) == pytest.approx(k.sum() / n.sum())
    pairs = [
        pair
        for one, all_ in zip(k, n, strict=True)
        for pair in itertools.permutations([1] * one + [0] * (all_ - one), 2)
    ]
    assert a * b / ((a + b) * (a + b + 1)) == pytest.approx(np.mean([first * (1 - second) for first, second in pairs]))

    def value(k, n):
        if k in (0, n):
            return 0.0
        rates = (np.arange(20_000) + 0.5) / 20_000
        density = rates ** (a + k - 1) * (1 - rates) ** (b + n - k - 1)
        return (rates * (1 - rates) * density).sum() / density.sum()

    left, states = 6, sorted(set(zip(successes.tolist(), tries.tolist(), strict=True)))
    ends = {
        (k, n): [(value(k + j, n + left), beta_binomial(j, left, a + k, b + n - k)) for j in range(left + 1)]
        for k, n in states
    }
    for num, share in ((40, 0.9), (290, 1.0)):
        found = racing.contenders(successes, tries, left, num, prior)
        outcomes = sorted(
            (
                (round(one, 9), chance)
                for k, n in zip(successes.tolist(), tries.tolist(), strict=True)
                if n
                for one, chance in ends[k, n]
            ),
            reverse=True,
        )
        cut, total = min(one for one, _ in outcomes if one > 0), 0.0
        for one, chance in outcomes:
            total += chance
            if total >= num:
                cut = max(cut, one)
                break
        for place, state in enumerate(zip(successes.tolist(), tries.tolist(), strict=True)):
            chance = sum(chance for one, chance in ends[state] if round(one, 9) >= cut)
            assert found[place] == (state[1] > 0 and chance >= racing.LEAST_CHANCE)
        assert 0.3 < found.mean() <= share
    expected = racing.expected_learnability(np.array([0, 1, 2]), np.array([2, 2, 2]), prior)
    np.testing.assert_allclose(expected, [0, value(1, 2), 0], rtol=1e-4)
    assert racing.rounds_of(4) == [2, 4] and racing.rounds_of(8) == [2, 4, 8] and racing.rounds_of(16) == [2, 6, 16]


SETTINGS = {"rollouts": "racing", "num_prompts": 6, "num_rollouts": 8}
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


def by_chance(completions, row, **kwargs):
    """A success as often as the prompt's rate says, whatever was written."""
    chances = (zlib.crc32(f"{r} {text}".encode()) / 2**32 for r, text in zip(row, completions, strict=True))
    return [float(chance < RATES[r % len(RATES)]) for chance, r in zip(chances, row, strict=True)]


def test_few_rollouts_for_most_prompts(tmp_path, monkeypatch):
    """What was made, what is measured of it, and that a killed race goes on to the same end."""
    seen = Seen(by_chance)
    dataset = make_dataset(40)
    made = make_trainer(tmp_path / "whole", reward=seen, dataset=dataset)
    selection = select_prompts(made, config(**SETTINGS, save_rollouts=True))
    whole, rows = selection.scores.to_pandas().set_index("index"), list(seen.rows)
    about = selection.provenance["race"]
    kept = pq.read_table(tmp_path / "whole/_learnalign/rollouts/step-000000/rollouts.parquet").to_pandas()
    counts = kept.groupby("index").size()
    assert {2, 8} <= set(counts) <= {2, 4, 8} and counts.sum() == about["rollouts"] < 0.8 * about["of"]
    assert about["of"] == 320
    assert [prompts for prompts, _ in about["rounds"]] == [40, (counts > 2).sum(), (counts > 4).sum()]
    assert counts.reindex(selection.indices).eq(8).all() and len(rows) >= counts.sum()
    # Rates and expected learnability of the rollouts that were made
    successes = kept.assign(success=kept["rewards"].str[0] >= 1).groupby("index")["success"].sum()
    np.testing.assert_allclose(whole["success_rate"], successes / counts)
    lengths = kept["completion_ids"].str.len().groupby(kept["index"]).mean()
    np.testing.assert_allclose(whole["completion_length_mean"], lengths)
    a, b = about["prior"]
    expected = (a + successes) * (b + counts - successes) / ((a + b + counts) * (a + b + counts + 1))
    mixed = (successes > 0) & (successes < counts)
    np.testing.assert_allclose(whole["learnability"], expected.where(mixed, 0.0))
    assert whole["gradient_norm"].notna().equals(mixed)
    calls, stop, original = [], 0, generation.generate_groups

    def killed(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(generation, "generate_groups", killed)
    for stop in (2, 9, 0):  # in the first round, in a later one, never
        calls.clear()
        trainer = make_trainer(tmp_path / "killed", reward=by_chance, dataset=dataset)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            again = select_prompts(trainer, config(**SETTINGS))
    pd.testing.assert_frame_equal(again.scores.to_pandas().set_index("index"), whole)
    assert again.indices == selection.indices and calls


def test_a_race_that_nobody_goes_on_in_is_a_selection_of_two_rollouts(tmp_path, monkeypatch):
    """Gradients are those of the smaller group, and so are success rates and lengths."""
    monkeypatch.setattr(racing, "LEAST_CHANCE", 2.0)
    tables = []
    for name, settings in (("race", SETTINGS), ("two", {"num_rollouts": 2})):
        trainer = make_trainer(tmp_path / name, reward=by_chance)
        tables.append(select_prompts(trainer, config(**settings, save_rollouts=True)).scores.to_pandas())
    names = ["success_rate", "reward_std", "completion_length_mean", "gradient_norm", "alignment", "eligible"]
    pd.testing.assert_frame_equal(*(table[names] for table in tables))
    assert tables[0]["eligible"].sum() > 3
    learnable = tables[0]["learnability"][tables[0]["eligible"]]
    assert learnable.nunique() == 1 and 0 < learnable.iloc[0] < 0.25  # expected, where 1 of 2 says .25


def test_price_and_plan_of_a_race(tmp_path):
    text, possible = plan_selection(make_trainer(tmp_path), config(**SETTINGS))
    assert possible and "24 prompts x 2 to 8 rollouts = 48 to 192" in text
    assert "of the rollouts are made" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "alignment"}, "`score='alignment'` ranks without V"),
        ({"learnability": "variance"}, "`learnability='variance'` is no success rate"),
        ({"take": "proportional"}, "`take='proportional'` may draw any prompt"),
        ({"quota_column": "row"}, "`quota_column='row'` takes others"),
        ({"num_rollouts": 3}, "only 3 rollouts.*at least 4"),
        ({"where": "completion_length_mean < 5"}, "names what is measured"),
    ],
)
def test_what_a_race_is_refused_with(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"`rollouts` is 'racing', but .*{message}"):
        select_prompts(make_trainer(tmp_path, reward=fixed_reward), LearnAlignConfig(**SETTINGS | changes))
