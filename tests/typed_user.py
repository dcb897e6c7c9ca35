"""
Uses of the configuration and the trainer as an editor sees them: those above pass, and each of those below is an
error. mypy checks both in `make lint`: an ignored error that is none is reported. Nothing here is ever run.
"""

from pathlib import Path

import pandas as pd
from datasets import Dataset
from trl import GRPOConfig

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler


def short_first(table: pd.DataFrame) -> pd.Series:
    return -table["completion_length_mean"]


def right(rows: Dataset) -> list[LearnAlignConfig]:
    return [
        LearnAlignConfig(num_prompts=3, score="learnability", take="proportional"),
        LearnAlignConfig(score=short_first, score_measures=["rollouts"]),
        LearnAlignConfig(score="rewards.py:short_first", success_reward=["right", "short"]),
        LearnAlignConfig(score="target", target_dataset=rows),
        LearnAlignConfig(score="target", target_dataset="rows.jsonl"),
        LearnAlignConfig(schedule="online", group_column="source"),
    ]


def train(rows: Dataset) -> Path | None:
    args = GRPOConfig(output_dir="runs/first")
    sampler = LearnAlignSampler(LearnAlignConfig())
    trainer = LearnAlignGRPOTrainer("policy", len, args=args, train_dataset=rows, train_sampler=sampler)
    trainer.train()
    return trainer.learnalign.report()


def wrong(rows: Dataset) -> None:
    LearnAlignConfig(num_promts=3)  # type: ignore[call-arg]
    LearnAlignConfig(take="tpo")  # type: ignore[arg-type]
    LearnAlignConfig(score=3)  # type: ignore[arg-type]
    LearnAlignConfig().num_promts = 3  # type: ignore[attr-defined]
    LearnAlignGRPOTrainer("policy", train_datset=rows)  # type: ignore[call-arg]
    LearnAlignGRPOTrainer("policy", train_sampler=LearnAlignConfig())  # type: ignore[arg-type]
    LearnAlignGRPOTrainer("policy").learnalign.selection  # type: ignore[attr-defined]  # noqa: B018
