"""What is left on disk, and that nothing else is read back."""

import json

import pyarrow.parquet as pq
import pytest
from tiny import config, digit_reward, make_dataset, make_trainer

from trl_learnalign import Selection, select_prompts
from trl_learnalign.choice.table import SCORES_SCHEMA
from trl_learnalign.ground.disk import rollouts_of
from trl_learnalign.selection.excerpt import ranking_ends


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    selection = select_prompts(make_trainer(path), config(save_rollouts=True))
    return selection, path / "learnalign" / "step-000000"


def test_what_is_written(saved):
    selection, path = saved
    assert sorted(file.name for file in path.iterdir()) == [*("scores.parquet", "selection.json", "texts.parquet")]
    table = pq.read_table(path / "scores.parquet").to_pandas()
    assert list(table.columns) == SCORES_SCHEMA.names and table["index"].tolist() == list(range(24))
    assert table.sort_values("rank")["index"].tolist()[:8] == selection.indices
    assert table["selected"].sum() == 8 and sorted(table["rank"]) == list(range(24))
    assert (
        table["alignment"].between(-1, 1).sum()
        == (table["learnability"] > 0).sum()
        == table["gradient_norm"].gt(0).sum()
    )
    assert (table["score"][table["learnability"] == 0] == 0).all()
    rollouts = pq.read_table(rollouts_of(path) / "rollouts.parquet").to_pandas()
    assert rollouts.groupby("index").size().tolist() == [8] * 24
    rate = rollouts["rewards"].map(lambda rewards: rewards[0] >= 1).groupby(rollouts["index"]).mean()
    assert rate.tolist() == table["success_rate"].tolist()
    length = rollouts["completion_ids"].map(len).groupby(rollouts["index"]).mean()
    assert length.tolist() == table["completion_length_mean"].tolist()
    provenance = json.loads((path / "selection.json").read_text())["provenance"]
    for name in ("config", "seed", "global_step", "dataset_fingerprint", "model", "versions", "seconds", "unscorable"):
        assert name in provenance
    assert set(provenance["seconds"]) == {"rollouts", "gradients", "scores"}


def test_cost_is_counted_in_tokens(saved):
    selection, path = saved
    rollouts = pq.read_table(rollouts_of(path) / "rollouts.parquet").to_pandas()
    prompts = [len(text) for text in make_dataset()["prompt"]]  # one token a character
    tokens = rollouts["completion_ids"].map(len) + rollouts["index"].map(prompts.__getitem__)
    cost = selection.provenance["cost"]
    assert cost["rollout_tokens"] == tokens.sum()
    assert cost["gradient_tokens"] == tokens[rollouts["advantage"] != 0].sum()
    assert cost["gradient_tokens"] <= cost["computed_tokens"] < 2 * cost["gradient_tokens"]
    assert cost["floor"] == 2 * cost["gradient_tokens"] / cost["rollout_tokens"]
    seconds = selection.provenance["seconds"]
    assert cost["of_rollouts"] == (seconds["gradients"] + seconds["scores"]) / seconds["rollouts"]
    assert f"took {cost['of_rollouts']:.2f} x the time of the rollouts" in selection.summary()


def test_load_reads_it_back(saved):
    selection, path = saved
    loaded = Selection.load(str(path))
    assert loaded.indices == selection.indices and loaded.scores.equals(selection.scores)
    assert loaded.provenance == selection.provenance
    rates = "{:.3f} (pool), {:.3f} (chosen)".format(*loaded.mean_success_rates())
    assert repr(loaded) == (
        f"Selection(8 of 24 prompts, score='learnalign', step=0, learnable={loaded.num_learnable()}, "
        f"success_rate={rates})"
    )
    assert loaded.summary() == selection.summary()


@pytest.mark.parametrize("score", ["random", "learnability"])
def test_scores_that_need_less_leave_nulls(tmp_path, score):
    selection = select_prompts(make_trainer(tmp_path), config(score=score))
    table = Selection.load(tmp_path / "learnalign/step-000000").scores
    assert table.equals(selection.scores)
    empty = {name for name in table.column_names if table[name].null_count == table.num_rows}
    gradients = {"alignment", "gradient_norm"}
    assert empty == (
        gradients if score == "learnability" else set(SCORES_SCHEMA.names) - {"index", "rank", "eligible", "selected"}
    )


def copy_of(path, tmp_path):
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / "selection.json").unlink(), FileNotFoundError, "no finished selection.*step-000038"),
        (lambda p: (p / "selection.json").write_text("{"), ValueError, "cannot be used"),
        (lambda p: (p / "selection.json").write_text('{"indices": []}'), ValueError, "cannot be used.*format_version"),
        (lambda p: (p / "selection.json").write_text("[]"), ValueError, "cannot be used"),
        (lambda p: (p / "scores.parquet").write_bytes(b"PAR1 nonsense"), ValueError, "not the one"),
        (lambda p: change(p, format_version=2), ValueError, "has format 2"),
        (lambda p: change(p, indices=[0, 1]), ValueError, "checksum"),
        (lambda p: change(p, indices=None), ValueError, "checksum"),
        (
            lambda p: pq.write_table(pq.read_table(p / "texts.parquet"), p / "scores.parquet"),
            ValueError,
            "not the one",
        ),
    ],
)
def test_damaged_files_are_refused(saved, tmp_path, damage, error, message):
    path = copy_of(saved[1], tmp_path)
    damage(path)
    with pytest.raises(error, match=message):
        Selection.load(path)


def change(path, **changes):
    document = json.loads((path / "selection.json").read_text())
    (path / "selection.json").write_text(json.dumps(document | changes))


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    from trl_learnalign.ground.disk import write_json

    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"a": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_no_more_is_generated_at_once_than_in_training(tmp_path):
    """A group of ten by fours, as a step of training has four rollouts."""
    calls = []

    def reward(completions, row, **kwargs):
        calls.append(row)
        return digit_reward(completions, row)

    def select(path, **changes):
        calls.clear()
        trainer = make_trainer(path, reward=reward, dataset=make_dataset(6), **changes)
        select_prompts(trainer, config(num_rollouts=10, save_rollouts=True))
        assert trainer.num_generations == 4
        return pq.read_table(path / "_learnalign/rollouts/step-000000/rollouts.parquet").to_pandas()

    table = select(tmp_path / "parts", per_device_train_batch_size=4)
    assert calls == [[index] * size for index in range(6) for size in (4, 4, 2)]
    for index, group in table.groupby("index"):
        assert len(group) == 10
        rewards = group["rewards"].str[0]
        assert rewards.tolist() == digit_reward(group["completion"].tolist(), [index] * 10)
        if rewards.std() > 0:  # advantages are those of the whole group
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            assert group["advantage"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    texts = [group["completion"].tolist() for _, group in table.groupby("index")]
    assert all(part[:4] != part[4:8] for part in texts)  # each part has its own seed
    assert table.equals(select(tmp_path / "again", per_device_train_batch_size=4))
    select(tmp_path / "whole", per_device_train_batch_size=12)
    assert calls == [[index] * 10 for index in range(6)]


def test_another_budget_without_new_rollouts(tmp_path):
    """The same as a selection of that size from the start."""
    settings = {"reward": digit_reward}
    large = select_prompts(make_trainer(tmp_path / "large", **settings), config(num_prompts=12))
    small = select_prompts(make_trainer(tmp_path / "small", **settings), config(num_prompts=5))
    derived = large.select(5)
    assert derived.indices == small.indices == large.indices[:5]
    assert derived.scores.equals(small.scores) and len(large.indices) > 5
    assert derived.provenance["config"] == small.provenance["config"] and "key" not in derived.provenance
    path = derived.save(tmp_path / "derived")
    assert Selection.load(path).indices == derived.indices
    everything = large.select(10**6)
    assert set(everything.indices) == set(large.to_pandas().query("learnability > 0").index)
    assert [index for indices in ranking_ends(large, 3) for index in indices] == everything.indices[
        :3
    ] + everything.indices[-3:]
    for wrong in (0, -1, 2.5, True, "5"):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            large.select(wrong)


def test_another_budget_at_random(tmp_path):
    selection = select_prompts(make_trainer(tmp_path), config(score="random"))
    assert selection.select(3).indices == selection.indices[:3]
    assert len(selection.select(100).indices) == 24


def test_in_a_notebook(saved):
    selection, _ = saved
    table = selection.to_pandas()
    assert table.index[:8].tolist() == selection.indices and table["rank"].tolist() == list(range(24))
    figure = selection.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Success rates", "Learnability and alignment", "Completion length"]
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(heights[:9]) == pytest.approx(1) == sum(heights[9:])  # pool, then choice
    rates = table["success_rate"]
    assert heights[:9] == pytest.approx([(rates == k / 8).mean() for k in range(9)])
