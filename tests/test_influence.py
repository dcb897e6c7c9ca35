"""Influence, densities and diversity, against dense solves and loops over pairs."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import config, make_dataset, make_trainer, parity_reward

from trl_learnalign import LearnAlignConfig, select_prompts
from trl_learnalign.measures import alignments
from trl_learnalign.measures import target as of_target
from trl_learnalign.scores import density, influence
from trl_learnalign.selection.dry_run import _whole, plan_selection


def table_of(selection):
    return selection.scores.to_pandas().set_index("index")


def pair_by_pair(points):
    """The number of points like each: the width from all distances, the kernel one pair at a time."""
    points = np.asarray(points, np.float64)
    n = len(points)
    squares = np.array([[((a - b) ** 2).sum() for b in points] for a in points])
    apart = [squares[i, j] for i in range(n) for j in range(i) if squares[i, j] > 1e-6 * squares.max()]
    h = sorted(apart)[(len(apart) - 1) // 2] / np.log(n)
    return np.array([sum(np.exp(-squares[i, j] / h) for j in range(n)) for i in range(n)])


def test_densities_are_sums_over_pairs(monkeypatch):
    """In blocks of a few rows; those of copies and of near-copies are larger by their number."""
    monkeypatch.setattr(density, "_PAIRS", 300)
    torch.manual_seed(0)
    points = torch.randn(60, 20) + 30
    points[40:50] = points[40]
    points[50:] = points[50] + 0.01 * torch.randn(10, 20)
    h = density.width(points)
    found = density.densities(points, h)
    np.testing.assert_allclose(found, pair_by_pair(points), rtol=1e-4)
    assert 1 < found[:40].mean() < 4 and (found[40:] > 9.9).all()
    np.testing.assert_array_equal(density.densities(points, h, torch.arange(1, 60, 2)), found[1::2])
    for number in (5, 1, 0):
        same = torch.ones(number, 3)
        assert density.densities(same, density.width(same)).tolist() == [number] * number


def test_conjugate_gradients_solve_as_a_dense_matrix_does():
    torch.manual_seed(0)
    features = torch.randn(30, 300) * torch.logspace(-2, 2, 30)[:, None]
    right = torch.stack([features.double().mean(0), torch.zeros(300).double()])
    batches = [(list(range(part.start, part.stop)), features[part]) for part in (slice(0, 9), slice(9, 30))]
    moment = features.double().T @ features.double()
    torch.testing.assert_close(influence.second_moment_times(batches, right), right @ moment)
    damping = 0.1 * moment.trace() / 30
    solved, iterations, residual = influence.solve(
        lambda vectors: influence.second_moment_times(batches, vectors) + damping * vectors, right
    )
    expected = torch.linalg.solve(moment + damping * torch.eye(300), right.T).T
    torch.testing.assert_close(solved, expected, rtol=1e-5, atol=1e-7 * expected.abs().max().item())
    assert 1 < iterations < 60 and residual < 1e-8


def target_rows():
    return Dataset.from_list([{"prompt": f"{i}=", "row": 100 + i, "task": "ab"[i % 2]} for i in range(6)])


@pytest.fixture
def features(monkeypatch):
    """The features of the pool and of the target, by row, as selections compute or read them."""
    found = {"pool": {}, "target": {}}

    def seen(context, rolled_out, log, original=alignments.features_of):
        source = original(context, rolled_out, log)
        kind = "target" if log.path.name == "target-gradients" else "pool"

        def noted(computed=source._computed):
            for indices, part in computed():
                found[kind].update(zip(indices, part.double().clone(), strict=True))
                yield indices, part

        source._computed = noted
        return source

    for module in (alignments, of_target):
        monkeypatch.setattr(module, "features_of", seen)
    return found


@pytest.mark.parametrize("column", ["no target", None, "task"])
def test_influence_is_that_of_a_dense_solve(tmp_path, features, column):
    target = {} if column == "no target" else {"target_dataset": target_rows(), "target_column": column}
    trainer = make_trainer(tmp_path, reward=parity_reward, dataset=make_dataset(12))
    selection = select_prompts(trainer, config(score="influence", projection_dim=64, **target))
    table, phi = table_of(selection), torch.stack(list(features["pool"].values()))
    means = [phi.mean(0)]
    if target:
        names = ["all" if column is None else target_rows()[row]["task"] for row in features["target"]]
        rows = torch.stack(list(features["target"].values()))
        means = [rows[[name == one for name in names]].mean(0) for one in sorted(set(names))]
    moment = phi.T @ phi / len(phi)
    damping = 0.1 * moment.trace() / min(phi.shape)
    inverse = torch.linalg.inv(moment + damping * torch.eye(64))
    assert len(means) == 1 + (column == "task") and 8 <= len(phi) <= 12
    for row, one in features["pool"].items():
        assert table.loc[row, "score"] == pytest.approx(max((one @ inverse @ g).item() for g in means), rel=1e-4)
        cosine = max((one @ g / one.norm() / g.norm()).item() for g in means)
        assert table.loc[row, "alignment"] == pytest.approx(cosine, abs=1e-6)
    assert selection.indices == table[table["eligible"]].sort_values("score").index[::-1][:8].tolist()
    assert selection.provenance["influence"]["damping"] == pytest.approx(damping.item(), rel=1e-6)


def alike(num=24):
    """Twelve prompts of their own, and twelve that are one and the same prompt, or nearly; with grades."""
    texts = [f"{i}+{7 * i % 10}*{3 * i % 8}=" for i in range(12)] + ["88:88="] * 9 + ["88:88:"] * 3
    grades = [1.0 + i / 10 for i in range(12)] + [2.5] * 9 + [-1.0, None, 0.0]
    return Dataset.from_dict({"prompt": texts[:num], "row": range(num), "grade": grades[:num]})


def never_called(completions, **kwargs):
    raise AssertionError("nothing is to be rolled out")


def test_near_duplicates_share_their_score(tmp_path, caplog, capsys):
    trainer, seen = make_trainer(tmp_path, reward=never_called, dataset=alike()), {}

    def states(table):
        seen["states"] = table.filter(like="hidden_")
        return table["grade"]

    select_prompts(trainer, config(score=states, score_measures=["hidden_states"]))
    expected = pair_by_pair(seen["states"].to_numpy())
    assert (expected[12:21] > 8.9).all() and expected[:12].max() < 7
    settings = config(score="column:grade", diversity="hidden_states", write_report=True)
    plan, possible = plan_selection(trainer, settings)
    assert possible and "pool: 24 prompts, a forward over each\n" in plan and "rollouts: none" in plan
    assert _whole({"density": 2.0, "hidden states": 2.0}, 3) == {"density": 18.0, "hidden states": 6.0}
    plain = select_prompts(trainer, config(score="column:grade"))
    assert set(plain.indices) <= set(range(12, 21))
    selection = select_prompts(trainer, settings)
    assert len(set(selection.indices) & set(range(12))) == 8
    table, grades = table_of(selection), np.array(alike()["grade"], float)
    np.testing.assert_allclose(table["density"], expected, rtol=1e-4)
    np.testing.assert_allclose(table["score"], np.where(grades < 0, grades * expected, grades / expected), rtol=1e-4)
    assert table.loc[21, "score"] < -1 and not table.loc[22, "eligible"] and table.loc[23, "score"] == 0
    for _ in range(2):
        again = select_prompts(trainer, config(score="density", num_prompts=12))
        np.testing.assert_allclose(table_of(again)["score"], 1 / expected, rtol=1e-4)
        assert set(again.indices) == set(range(12))
    assert capsys.readouterr().out.count("Used again:") == 1 and "the same hidden states" not in caplog.text


@pytest.mark.parametrize(("dim", "tolerance"), [(64, 1e-4), (2048, 0.3)])
def test_near_duplicates_by_the_directions_of_gradients(tmp_path, features, dim, tolerance):
    """Exact, or of directions that are sketched once more."""
    trainer = make_trainer(tmp_path, reward=parity_reward, dataset=make_dataset(12))
    selection = select_prompts(trainer, config(score="learnability", diversity="gradients", projection_dim=dim))
    table, rows = table_of(selection), sorted(features["pool"])
    expected = pair_by_pair(np.stack([features["pool"][row] / features["pool"][row].norm() for row in rows]))
    np.testing.assert_allclose(table.loc[rows, "gradient_density"], expected, rtol=tolerance)
    assert table.loc[table["learnability"] == 0, "gradient_density"].isna().all()
    shared = table["learnability"] / table["gradient_density"]
    np.testing.assert_allclose(table.loc[rows, "score"], shared[rows], rtol=1e-12)
    if dim == 64:
        again = table_of(select_prompts(trainer, config(score="gradient_density", projection_dim=dim)))
        np.testing.assert_allclose(again.loc[rows, "score"], 1 / table.loc[rows, "gradient_density"], rtol=1e-12)
        assert {"gradients", "gradient density"} <= set(selection.provenance["seconds"])


def test_a_target_without_use_leaves_the_diversity(tmp_path):
    def never_for_the_target(completions, row, **kwargs):
        return [one * (r < 100) for one, r in zip(parity_reward(completions), row, strict=True)]

    trainer = make_trainer(tmp_path, reward=never_for_the_target, dataset=make_dataset(12))
    settings = config(score="influence", target_dataset=target_rows(), diversity="hidden_states")
    table = table_of(select_prompts(trainer, settings))
    np.testing.assert_allclose(table["score"], table["learnability"] / table["density"], rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"score": "density", "diversity": "hidden_states"},
            "is an inverse density by itself.* Leave `diversity` out",
        ),
        ({"score": "pvi", "answer_column": "a", "diversity": "gradients"}, "'pvi', which needs no rollouts.* Use"),
        ({"score": "influence", "projection_dim": None}, "`score='influence'` reads them more than once. Leave"),
        ({"diversity": "gradients", "projection_dim": None}, "`diversity='gradients'` reads them more than once"),
        ({"score": "gradient_density", "projection_dim": None}, "`score='gradient_density'` reads them"),
        ({"diversity": "prompts"}, "`diversity` must be one of hidden_states, gradients, but is 'prompts'"),
        ({"score": "influence", "schedule": "online"}, "`schedule='online'` chooses by predicted learnability"),
    ],
)
def test_what_cannot_be_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(**settings)


def test_one_prompt_and_prompts_that_are_all_the_same(tmp_path, caplog):
    dataset = alike().select(range(12, 18))
    trainer = make_trainer(tmp_path, reward=never_called, dataset=dataset)
    with pytest.raises(ValueError, match="at least two prompts, but the pool has 1. Leave `diversity` out"):
        select_prompts(trainer, config(score="column:grade", diversity="hidden_states", where="row == 12"))
    table = table_of(select_prompts(trainer, config(score="density")))
    assert table["score"].tolist() == [pytest.approx(1 / 6)] * 6
    assert "All 6 prompts have the same hidden states" in caplog.text
