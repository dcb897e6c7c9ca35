"""Quotas on groups that no column holds: grades by several success rates, and clusters of hidden states."""

import numpy as np
import pytest
from tiny import config, make_dataset, make_trainer

from trl_learnalign import select_prompts
from trl_learnalign.selection.dry_run import plan_selection


def never_called(completions, **kwargs):
    raise AssertionError("nothing is to be rolled out")


def rated(num=24):
    random = np.random.default_rng(3)
    small, large = random.random(num).round(2).tolist(), random.random(num).round(2).tolist()
    small[3] = large[4] = small[5] = large[5] = None
    small[6] = large[6] = 1.0
    small[7] = large[7] = 0.0
    return make_dataset(num).add_column("small", small).add_column("large", large)


def test_quotas_over_grades_by_the_mean_of_several_models(tmp_path):
    dataset = rated()
    trainer = make_trainer(tmp_path, dataset=dataset, reward=never_called)
    choice = config(score="column:row", quota_column="grade:small, large", quota="equal", num_prompts=6)
    selection = select_prompts(trainer, choice)
    table = selection.scores.to_pandas().set_index("index")
    for row in dataset:
        rates = [row[name] for name in ("small", "large") if row[name] is not None]
        found = table.loc[row["row"]]
        if not rates:
            assert not isinstance(found["quota_group"], str) and np.isnan(found["rate_mean"])
            continue
        mean = sum(rates) / len(rates)
        spread = (sum((rate - mean) ** 2 for rate in rates) / len(rates)) ** 0.5
        assert found[["rate_mean", "rate_spread"]].tolist() == pytest.approx([mean, spread])
        assert found["rate_variation"] == pytest.approx(spread / mean if mean else np.nan, nan_ok=True)
        low, high = (float(word) for word in found["quota_group"].removeprefix("rate ").split(" to "))
        assert low <= mean + 1e-9 and (mean < high or high == 1.0) and high - low == pytest.approx(0.2)
    counts = table.loc[selection.indices, "quota_group"].value_counts(dropna=False)
    assert len(counts) == table["quota_group"].nunique(dropna=False) >= 5 and counts.max() <= 2


def test_quotas_over_clusters_of_hidden_states(tmp_path):
    """A forward over each prompt is all that they take, and `scores.parquet` names them."""
    seen = {}

    def by_row(table):
        seen["hidden"] = table.filter(like="hidden_").to_numpy()
        return table["row"] * 1.0

    choice = config(score=by_row, quota_column="clusters:3", quota="equal", num_prompts=6)
    trainer = make_trainer(tmp_path, reward=never_called)
    selection = select_prompts(trainer, choice)
    table = selection.scores.to_pandas().set_index("index")
    labels = table["quota_group"].str.removeprefix("cluster ").astype(int).to_numpy()
    hidden = seen["hidden"]
    assert len(set(labels)) == 3 and hidden.shape[1] > 3 and np.bincount(labels).argmax() == 0
    centres = np.stack([hidden[labels == one].mean(0) for one in range(3)])
    nearest = ((hidden[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).mean() > 0.9  # k-means has come to rest
    assert table.loc[selection.indices, "quota_group"].value_counts().tolist() == [2, 2, 2]
    text, possible = plan_selection(trainer, config(score="column:row", quota_column="clusters:3"))
    assert possible and "pool: 24 prompts, a forward over each\n" in text and "hidden states" in text


@pytest.mark.parametrize(
    ("quota_column", "message"),
    [
        ("clusters:many", "must name 2 to 256 clusters"),
        ("clusters:1", "must name 2 to 256 clusters"),
        ("grade:", "names no column of success rates"),
        ("grade:small,medium", "no column 'medium'"),
        ("grade:prompt", "'prompt' holds no numbers"),
        ("grade:small,row", r"row 2 holds \[.*, 2.0\], and success rates are between 0 and 1"),
    ],
)
def test_groups_that_are_refused(tmp_path, quota_column, message):
    with pytest.raises(ValueError, match=message):
        choice = config(score="column:row", quota_column=quota_column)
        select_prompts(make_trainer(tmp_path, dataset=rated(), reward=never_called), choice)
