"""What a contributor writes for a new score: one function and one test. Nothing of the package is touched."""

import pytest
from tiny import config, make_trainer

from trl_learnalign import Selection, select_prompts


def shortest_first(table):
    """Learnable prompts with short completions and a large gradient first."""
    return table["learnability"] * table["gradient_norm"] / table["completion_length_mean"]


def test_shortest_first(tmp_path):
    choice = config(score=shortest_first, score_measures=["gradients"])
    selection = select_prompts(make_trainer(tmp_path), choice)
    table = selection.scores.to_pandas().set_index("index")
    expected = (table["learnability"] * table["gradient_norm"] / table["completion_length_mean"]).dropna()
    assert table.loc[expected.index, "score"].tolist() == pytest.approx(expected.tolist())
    assert selection.indices == expected.sort_values(ascending=False).index[:8].tolist()
    assert Selection.load(tmp_path / "learnalign/step-000000").indices == selection.indices
