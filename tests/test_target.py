"""Alignment with a target set, against a slow way to the same: exact gradients of every group by plain loops."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import Seen, config, make_dataset, make_trainer, parity_reward
from trl import GRPOTrainer, RLOOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler, Selection, select_prompts
from trl_learnalign.measures import alignments, gradients
from trl_learnalign.measures import target as of_target


def target_rows(num=6):
    rows = [{"prompt": f"{i}=", "row": 100 + i, "task": "ab"[i % 2]} for i in range(num)]
    return Dataset.from_list(rows)


def table_of(selection):
    return selection.scores.to_pandas().set_index("index")


def select(path, monkeypatch=None, **settings):
    """A selection with exact gradients; and the features of the pool and of the target, by row."""
    features = {"pool": {}, "target": {}}
    if monkeypatch is not None:
        original = alignments.features_of

        def seen(context, rolled_out, log, *moments):
            source = original(context, rolled_out, log, *moments)
            kind = "target" if log.path.name == "target-gradients" else "pool"
            computed = source._computed

            def noted():
                for indices, part in computed():
                    features[kind].update(zip(indices, part.double().clone(), strict=True))
                    yield indices, part

            source._computed = noted
            return source

        for module in (alignments, of_target):
            monkeypatch.setattr(module, "features_of", seen)
    trainer = make_trainer(path, reward=parity_reward, dataset=make_dataset(12))
    return select_prompts(trainer, config(projection_dim=None, **settings)), features


@pytest.mark.parametrize("score", ["target", "target_alignment"])
@pytest.mark.parametrize("column", [None, "task"])
def test_scores_are_the_largest_cosines_with_the_mean_of_a_subtask(tmp_path, monkeypatch, score, column):
    target = target_rows()
    selection, features = select(tmp_path, monkeypatch, score=score, target_dataset=target, target_column=column)
    table = table_of(selection)
    subtasks = {}
    for index, phi in features["target"].items():
        name = "all" if column is None else target[index]["task"]
        subtasks.setdefault(name, []).append(phi / phi.norm())
    means = [torch.stack(units).mean(0) for units in subtasks.values()]
    assert len(means) == (1 if column is None else 2) and len(features["pool"]) >= 8
    for index, phi in features["pool"].items():
        cosine = max((phi @ mean / (phi.norm() * mean.norm())).item() for mean in means)
        weight = table.loc[index, "learnability"] if score == "target" else 1.0
        assert table.loc[index, "alignment"] == pytest.approx(cosine, abs=1e-6)
        assert table.loc[index, "score"] == pytest.approx(weight * cosine, abs=1e-6)
        assert table.loc[index, "gradient_norm"] == pytest.approx(phi.norm().item(), rel=1e-5)
    assert selection.indices == table[table["eligible"]].sort_values("rank").index[:8].tolist()
    assert selection.provenance["target"]["num_rows"] == 6


def test_subtasks_cost_no_more_gradients(tmp_path, monkeypatch):
    """Though exact gradients are too large to be kept: one pass over the target, whatever its subtasks."""
    monkeypatch.setattr(gradients, "EXACT_BYTES", 0)
    rows, collect = [], gradients.PromptGradients.collect

    def counted(self, counts, *args):
        rows[-1] += sum(counts)
        return collect(self, counts, *args)

    monkeypatch.setattr(gradients.PromptGradients, "collect", counted)
    target = target_rows().add_column("each", list(range(6)))
    for column in (None, "task", "each"):
        rows.append(0)
        select(tmp_path / str(column), score="target", target_dataset=target, target_column=column)
    assert rows[0] > 0 and rows[0] == rows[1] == rows[2]


def test_a_target_in_training_and_from_a_file(tmp_path):
    """Through training: the target is rolled out once, and never trained on."""
    target_rows().to_json(tmp_path / "target.jsonl")
    seen = Seen()
    settings = config(score="target", target_dataset=str(tmp_path / "target.jsonl"), warmup_prompts=0)
    trainer = make_trainer(tmp_path, settings, reward=seen, dataset=make_dataset(12), max_steps=3)
    trainer.train()
    of_target = [row for row in seen.rows if row >= 100]
    assert sorted(set(of_target)) == list(range(100, 106)) and all(row < 100 for row in seen.rows[-3 * 16 :])
    selection = Selection.load(tmp_path / "learnalign/step-000000")
    assert set(trainer._get_train_sampler().schedule.log[1].indices) == set(selection.indices) <= set(range(12))
    assert {"target rollouts", "target gradients"} <= set(selection.provenance["seconds"])


def test_a_target_is_part_of_what_a_selection_is_known_by(tmp_path, capsys):
    first, _ = select(tmp_path, score="target", target_dataset=target_rows())
    again, _ = select(tmp_path, score="target", target_dataset=target_rows())
    assert "Used again" in capsys.readouterr().out and again.scores.equals(first.scores)
    other, _ = select(tmp_path, score="target", target_dataset=target_rows(4))
    assert "Used again" not in capsys.readouterr().out
    assert not np.allclose(table_of(other)["score"], table_of(first)["score"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "target"}, "`target_dataset` is not set"),
        ({"score": "learnalign", "target_dataset": "rows.jsonl"}, "`target_dataset` is set"),
        ({"score": "learnalign", "target_column": "task"}, "`target_column` is a column of the target dataset"),
        ({"score": "target", "target_dataset": 3}, "must be a path, a name of the Hub or a Dataset, but is a int"),
        (
            {"score": "target", "target_dataset": "nowhere.jsonl"},
            "`target_dataset` is 'nowhere.jsonl', but there is no",
        ),
        ({"score": "target", "target_dataset": target_rows().remove_columns("row")}, "has no column 'row'"),
        (
            {"score": "target", "target_dataset": target_rows().remove_columns("row"), "target_column": "task"},
            "has no column 'row'",
        ),
        ({"score": "target", "target_dataset": target_rows(), "target_column": "kind"}, "has no column 'kind'"),
        ({"score": "target", "target_dataset": target_rows().select([])}, "`target_dataset` is empty"),
    ],
)
def test_targets_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        select(tmp_path, **settings)


def never_for_the_target(completions, row, **kwargs):
    return [0.0 if i >= 100 else r for i, r in zip(row, parity_reward(completions), strict=True)]


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_a_target_that_nothing_can_be_learned_from(tmp_path, caplog, capsys, kind):
    """Through training: it is rolled out first, and the selection is made by learnability, with one warning."""
    seen = Seen(never_for_the_target)
    settings = config(score="target", target_dataset=target_rows(), warmup_prompts=0, write_report=True)
    trainer = make_trainer(tmp_path, dataset=make_dataset(12), reward=seen, cls=kind, max_steps=2, beta=0.1)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(settings)))
    trainer.train()
    assert all(row >= 100 for row in seen.rows[: 6 * 8]) and all(row < 100 for row in seen.rows[6 * 8 :])
    assert caplog.text.count("No prompt of `target_dataset` is learnable: all 6") == 1
    assert "by learnability instead" in capsys.readouterr().out
    selection = Selection.load(tmp_path / "learnalign/step-000000")
    table, page = table_of(selection), (tmp_path / "learnalign/report.html").read_text()
    assert table["score"].equals(table["learnability"].rename("score")) and table["alignment"].isna().all()
    assert selection.measures == ("rollouts",) and len(selection.indices) == 8
    assert selection.provenance["target"] == {
        "num_rows": 6, "learnable": 0, "without": [], "instead": "learnability"
    }  # fmt: skip
    assert "by learnability instead, as no prompt of the target was learnable" in page


def test_rollouts_for_a_target_without_use_serve_another_score(tmp_path):
    """Though no gradient was taken of them."""
    seen, settings = Seen(never_for_the_target), {"dataset": make_dataset(12), "cls": RLOOTrainer, "beta": 0.1}
    trainer = make_trainer(tmp_path, reward=seen, **settings)
    select_prompts(trainer, config(score="target", target_dataset=target_rows()))
    before = len(seen.rows)
    found = select_prompts(trainer, config())
    other = make_trainer(tmp_path / "fresh", reward=never_for_the_target, **settings)
    assert len(seen.rows) == before and found.scores.equals(select_prompts(other, config()).scores)


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        ({"prompt": [None, "1="]}, None, r"`target_dataset` has prompts .*null: row 0"),
        ({"prompt": ["1=", ""]}, None, r"`target_dataset` has prompts .*empty: row 1"),
        ({"task": [["a"], ["b"]]}, "task", "`target_column` is 'task', whose values are no names of subtasks"),
        ({"task": [{"a": 1}, {"a": 2}]}, "task", "`target_column` is 'task', whose values are no names of subtasks"),
    ],
)
def test_a_target_is_looked_at_like_the_dataset(tmp_path, change, column, message):
    seen = Seen()
    target = Dataset.from_dict({"prompt": ["1=", "2="], "row": [100, 101], "task": ["a", "b"]} | change)
    settings = config(score="target", target_dataset=target, target_column=column)
    with pytest.raises(ValueError, match=message):  # when the trainer is made, long before the selection
        make_trainer(tmp_path, settings, reward=seen, dataset=make_dataset(12))
    assert not seen.rows


def test_a_subtask_may_have_no_name(tmp_path):
    target = target_rows(4).remove_columns("task").add_column("task", [1, None, None, 1])
    selection, _ = select(tmp_path, score="target", target_dataset=target, target_column="task")
    assert selection.provenance["target"]["without"] == [] and len(selection.indices) == 8


def test_a_pool_without_a_reward_is_told_so(tmp_path, caplog):
    """Only the target's rollouts can be scored."""

    def rewards_of_the_target(completions, row, **kwargs):
        return [r if i >= 100 else None for i, r in zip(row, parity_reward(completions), strict=True)]

    trainer = make_trainer(tmp_path, reward=rewards_of_the_target, dataset=make_dataset(12))
    selection = select_prompts(trainer, config(score="target", target_dataset=target_rows()))
    assert selection.indices == [] and "No prompt could be scored" in caplog.text


def test_a_subtask_without_a_gradient_is_named(tmp_path, caplog):
    def never_for_the_second(completions, row, **kwargs):
        return [0.0 if i == 101 else r for i, r in zip(row, parity_reward(completions), strict=True)]

    trainer = make_trainer(tmp_path, reward=never_for_the_second, dataset=make_dataset(12))
    settings = {"score": "target", "target_dataset": target_rows(2), "target_column": "task"}
    selection = select_prompts(trainer, config(**settings))
    assert (
        selection.provenance["target"]["without"] == ["b"] and "subtasks of the target are left out: b" in caplog.text
    )
    assert "is discarded" not in caplog.text  # its logs are new
