"""Every prompt of a pool: rewards, learnability, score; and the choice that follows."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset

from . import scoring
from .choice import draw_order
from .columns import dataset_columns
from .conditions import Condition
from .config import LearnAlignConfig
from .rows import read_dataset
from .scores import by_row
from .selection import SCORES_SCHEMA


@dataclass
class Pool:
    """The scorable prompts, by dataset index, with n groups of G rollouts."""

    indices: torch.Tensor  # (n,), sorted
    deciding: torch.Tensor  # (n, G), the reward that decides success
    success_rate: torch.Tensor  # (n,)
    learnability: torch.Tensor  # (n,)
    advantages: torch.Tensor  # (n, G)
    lengths: torch.Tensor  # (n, G), tokens
    unscorable: list[int]  # indices of the prompts left out

    @classmethod
    def of_rewards(cls, indices, rewards, penalties, lengths, config: LearnAlignConfig, host) -> "Pool":
        """
        Args:
            indices (`torch.Tensor` of shape `(n,)`): dataset indices in any order.
            rewards (`torch.Tensor` of shape `(n, G, F)`): NaN where a reward function gave none.
            penalties (`torch.Tensor` of shape `(n, G)`): see [`Group`].
            lengths (`torch.Tensor` of shape `(n, G)`): tokens of the completions.
            config ([`LearnAlignConfig`]): says what success and learnability are.
            host ([`Host`]): says how rewards become advantages.
        """
        order = indices.argsort()
        indices, rewards, penalties, lengths = (
            part[order] for part in (indices, rewards, penalties, lengths.double())
        )
        deciding = host.deciding(rewards, config)
        scorable = ~deciding.isnan().all(1)
        success_rate = scoring.success_rates(deciding, config.success_threshold)
        if config.learnability == "variance":
            learnability = scoring.reward_variance(deciding)
        else:
            learnability = scoring.learnability(success_rate)
        advantages = host.advantages(rewards, penalties)
        columns = (indices, deciding, success_rate, learnability, advantages, lengths)
        return cls(*(column[scorable] for column in columns), unscorable=indices[~scorable].tolist())

    def reward_range(self) -> list[float] | None:
        """The least and the greatest of the rewards that decide success; `None` without a scorable prompt."""
        known = self.deciding[~self.deciding.isnan()]
        return [known.min().item(), known.max().item()] if known.numel() else None

    def table(self) -> pd.DataFrame:
        """
        What the rollouts found out, a row per scorable prompt by dataset row: the columns of `scores.parquet` but for
        the score.
        """
        mean = self.deciding.double().nanmean(1)
        columns = {
            "success_rate": self.success_rate,
            "learnability": self.learnability,
            "reward_mean": mean,
            "reward_std": (self.deciding.double() - mean[:, None]).square().nanmean(1).sqrt(),
            "completion_length_mean": self.lengths.mean(1),
        }
        columns = {name: values.numpy() for name, values in columns.items()}
        return pd.DataFrame(columns, index=pd.Index(self.indices.numpy(), name="index"))


def load_target(dataset: Dataset, config: LearnAlignConfig) -> Dataset | None:
    """
    The rows of the target; `None` without one. `dataset` is the training dataset, whose columns it must have.

    Raises:
        `ValueError`: it cannot be read, is empty, or lacks a column.
    """
    if config.target_dataset is None:
        return None
    target = config.target_dataset
    target = read_dataset(target, "target_dataset") if isinstance(target, str) else target
    if not len(target):
        raise ValueError("`target_dataset` is empty. It needs prompts of the kind to improve on.")
    needed = {*dataset.column_names} | ({config.target_column} - {None})
    missing = sorted(needed - set(target.column_names))
    if missing:
        raise ValueError(
            f"`target_dataset` has no column {', '.join(map(repr, missing))}. Its columns are: "
            f"{', '.join(target.column_names)}. It needs those of the training dataset, for its prompts and the "
            "reward functions, and `target_column`."
        )
    return target


def scores_table(
    table: pd.DataFrame, ranked: "pd.DataFrame | pd.Series", dataset: Dataset, config: LearnAlignConfig, seed: int
) -> pa.Table:
    """
    The columns of `scores.parquet`, by dataset row, before anything is chosen. A prompt with V = 0 is never eligible,
    not even when there are fewer others than asked for; one with V > 0 may be chosen with a negative score.

    Args:
        table (`pandas.DataFrame`): what was measured, by dataset row.
        ranked (`pandas.DataFrame` or `pandas.Series`): what the [`Score`] returned for it.
        dataset (`Dataset`): with the columns of `where` and of the quotas.
        config ([`LearnAlignConfig`]): says what may be chosen.
        seed (`int`): of ties and draws.

    Raises:
        `ValueError`: the score is not a number for every prompt of the table.
    """
    table = _with_score(table, ranked)
    eligible = table["score"].notna()
    if "learnability" in table:
        eligible &= table["learnability"] > 0
    if config.where is not None:
        condition = Condition(config.where)
        more = dataset_columns(dataset, table.index, sorted(condition.columns - set(table.columns)))
        eligible &= condition(table.join(more))
    scores = table["score"].fillna(-np.inf).to_numpy(dtype=float)
    if config.take == "proportional":
        order = draw_order(np.where(eligible, scores, -np.inf), seed)
    else:
        order = scoring.ranking(torch.tensor(scores), torch.tensor(eligible.to_numpy(dtype=bool)), seed)
    rank = np.empty(len(table), dtype=np.int64)
    rank[order] = np.arange(len(table))
    table = table.assign(rank=rank, eligible=eligible, selected=False, index=table.index)
    if config.score == "random":
        table["score"] = np.nan
    schema = SCORES_SCHEMA
    if config.quota_column is not None:
        values = dataset_columns(dataset, table.index, [config.quota_column])[config.quota_column]
        table["quota_group"] = values.astype("string")
        schema = schema.append(pa.field("quota_group", pa.string()))
    arrays = [
        pa.array(table[field.name].to_numpy(), field.type, from_pandas=True)
        if field.name in table
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _with_score(table, ranked):
    columns = by_row(ranked, table.index)
    try:
        score = pd.to_numeric(columns["score"]).astype(float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The score is not a number for every prompt ({error}). Return numbers, or NaN to leave one out."
        ) from error
    return (
        table.drop(columns=columns.columns, errors="ignore")
        .join(columns)
        .assign(score=score.where(np.isfinite(score)))
    )


def draw_pool(rows: list[int], candidates: int | None, seed: int) -> list[int]:
    """Of the rows all, or a random part of that size; sorted."""
    if candidates is None or candidates >= len(rows):
        return rows
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:candidates].tolist()
    return sorted(rows[place] for place in places)
