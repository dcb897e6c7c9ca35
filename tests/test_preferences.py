"""Pairs of rollouts for preference learning, and TRL's DPOTrainer, which trains on them."""

import json

import pandas as pd
import pytest
from tiny import config, lora, make_dataset, make_model, make_tokenizer, make_trainer, online
from trl import DPOConfig, DPOTrainer

from trl_learnalign import Selection, preference_pairs, select_prompts


def half(completions, row, **kwargs):
    """Of each group: rewards that differ, but of every fifth row all are equal."""
    return [0.5 if r % 5 == 0 else float(i % 4) for i, r in enumerate(row)]


@pytest.mark.parametrize("conversational", [False, True])
def test_the_best_against_the_worst_rollout_of_each_chosen_prompt(tmp_path, conversational):
    dataset = make_dataset(24)
    if conversational:
        dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make_trainer(tmp_path, dataset=dataset, reward=half)
    choice = config(score="learnability", learnability="variance", save_rollouts=True, num_prompts=12)
    selection = select_prompts(trainer, choice)
    folder = tmp_path / "_learnalign" / "rollouts" / "step-000000"
    pairs = Selection.load(tmp_path / "learnalign/step-000000").preference_pairs(dataset, folder)
    kept = pd.concat(map(pd.read_parquet, folder.glob("*.parquet")))
    assert list(pairs["index"]) == selection.indices and len(pairs) == 12
    for pair in pairs:
        group = kept[kept["index"] == pair["index"]]
        best, worst = group.loc[group["advantage"].idxmax()], group.loc[group["advantage"].idxmin()]
        assert best["rewards"][0] == 3 and worst["rewards"][0] == 0
        texts = [json.loads(one["completion"]) if conversational else one["completion"] for one in (best, worst)]
        assert [pair["chosen"], pair["rejected"]] == texts and pair["prompt"] == dataset[pair["index"]]["prompt"]
        assert pair["margin"] == pytest.approx(best["advantage"] - worst["advantage"])
    args = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    model, tokenizer = make_model(), make_tokenizer()
    rows = pairs.select_columns(["prompt", "chosen", "rejected"])
    learner = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
    learner.train()
    assert learner.state.global_step == 2


def test_what_is_missing_is_named(tmp_path):
    dataset = make_dataset(12)
    choice = config(score="random", num_prompts=4, warmup_prompts=0)
    selection = select_prompts(make_trainer(tmp_path, dataset=dataset, reward=half), choice)
    with pytest.raises(ValueError, match="has no file of rollouts. Pass the directory OUTPUT_DIR/_learnalign"):
        selection.preference_pairs(dataset, tmp_path)
    pd.DataFrame({"index": [99], "completion": ["a"], "advantage": [0.0]}).to_parquet(tmp_path / "rollouts.parquet")
    with pytest.raises(ValueError, match="has no rollouts of 4 of 4 chosen prompts, such as row"):
        selection.preference_pairs(dataset, tmp_path)
    tied = pd.DataFrame({"index": range(12), "completion": ["a"] * 12, "advantage": [0.0] * 12})
    tied.to_parquet(tmp_path / "rollouts.parquet")
    assert len(selection.preference_pairs(dataset, tmp_path)) == 0
    with pytest.raises(ValueError, match="not the one that the selection was made from"):
        selection.preference_pairs(make_dataset(11), tmp_path)


# Of an online run ---------------------------------------------------------------------------------------------------


def run(path, noted, resume=None, conversational=False, **changes):
    """Two chunks of four prompts an epoch, each over two steps; notes what every call of the reward is given."""

    def reward(completions, completion_ids, row, **kwargs):
        rewards = [float((sum(map(ord, str(text))) + place) % 3) for place, text in enumerate(completions)]
        noted.append((trainer.state.global_step, row, completions, completion_ids, rewards))
        return rewards

    settings = {"steps_per_generation": 2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    choice = online(save_rollouts=changes.pop("save_rollouts", True))
    dataset = make_dataset(8, conversational)
    trainer = make_trainer(path, choice, reward=reward, dataset=dataset, **(settings | {"max_steps": 6} | changes))
    trainer.train(resume_from_checkpoint=resume and str(path / f"checkpoint-{resume}"))
    return trainer


def kept(path):
    files = sorted((path / "_learnalign/rollouts/training").iterdir())
    assert all(file.name.startswith("rollouts-") for file in files)
    return [pd.read_parquet(file) for file in files]


@pytest.mark.parametrize("conversational", [False, True])
def test_all_rollouts_of_an_online_run(tmp_path, conversational):
    """As the reward function got them, and after kills as in the run that was never killed."""
    whole = []
    trainer = run(tmp_path, whole, conversational=conversational)
    tables = kept(tmp_path)
    assert len(tables) == len(whole) == 3
    for number, (table, (step, rows, completions, ids, rewards)) in enumerate(zip(tables, whole, strict=True)):
        assert table["index"].tolist() == rows and set(table["step"]) == {step}
        assert table["draw"].tolist() == [4 * number + place // 4 for place in range(16)]
        assert [list(one) for one in table["completion_ids"]] == [list(one) for one in ids]
        assert [json.loads(text) if conversational else text for text in table["completion"]] == completions
        assert [list(one) for one in table["rewards"]] == [[one] for one in rewards]
        groups = table.assign(reward=rewards).groupby("draw")["reward"]
        expected = (pd.Series(rewards) - groups.transform("mean")) / (groups.transform("std") + 1e-4)
        assert table["advantage"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    # Pairs of every group that is not tied
    pairs = preference_pairs(trainer.train_dataset, tmp_path / "_learnalign/rollouts/training")
    groups = [group for table in tables for _, group in table.groupby("draw") if group["advantage"].nunique() > 1]
    assert 0 < len(pairs) == len(groups)
    for pair, group in zip(pairs, groups, strict=True):
        best, worst = group.loc[group["advantage"].idxmax()], group.loc[group["advantage"].idxmin()]
        texts = [json.loads(one["completion"]) if conversational else one["completion"] for one in (best, worst)]
        assert [pair["index"], pair["chosen"], pair["rejected"]] == [best["index"], *texts]
        assert pair["prompt"] == trainer.train_dataset[int(best["index"])]["prompt"]
    if conversational:
        return
    # Killed after step 5 and resumed at a chunk's end: the same files
    again = []
    run(tmp_path, again, resume=2)
    assert len(again) == 2 and all(map(pd.DataFrame.equals, kept(tmp_path), tables))
    # Resumed within a chunk, of which the rest is generated once more; the run ends before the last chunk
    again = []
    run(tmp_path, again, resume=3, max_steps=4)
    found = kept(tmp_path)
    assert [one["step"][0] for one in found] == [0, 2, 3] and all(map(pd.DataFrame.equals, found[:2], tables[:2]))
    assert found[2]["completion"].tolist() == again[0][2] and found[2]["draw"].equals(found[1]["draw"])
    # A new run in the same directory has none of these
    run(tmp_path, [], save_rollouts=False, max_steps=1)
    assert kept(tmp_path) == []


def test_groups_on_several_processes_and_other_datasets(tmp_path):
    rows = {"index": [3, 3], "completion": ["a", "b"], "advantage": [0.5, -0.5], "draw": [7, 7]}
    pd.DataFrame(rows).to_parquet(tmp_path / "rollouts-00000004-00000-of-00002.parquet")
    rows |= {"completion": ["c", "d"], "advantage": [0.0, 1.0]}
    pd.DataFrame(rows).to_parquet(tmp_path / "rollouts-00000004-00001-of-00002.parquet")
    pd.DataFrame(rows | {"draw": [9, 9]}).to_parquet(tmp_path / "rollouts-00000006-00000-of-00002.parquet")
    pairs = preference_pairs(make_dataset(4), tmp_path).to_list()
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs] == [("d", "b", 1.5), ("d", "c", 1.0)]
    with pytest.raises(ValueError, match="has rollouts of row 3, but the dataset has 3 rows"):
        preference_pairs(make_dataset(3), tmp_path)
