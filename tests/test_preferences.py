"""Pairs of rollouts for preference learning, and TRL's DPOTrainer, which trains on them."""

import json

import pandas as pd
import pytest
from tiny import config, lora, make_dataset, make_model, make_tokenizer, make_trainer
from trl import DPOConfig, DPOTrainer

from trl_learnalign import Selection, select_prompts


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
