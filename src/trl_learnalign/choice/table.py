"""Every prompt of a pool: rewards, learnability, score; and the choice that follows."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Value

from ..config import LearnAlignConfig
from ..data.columns import dataset_columns
from ..data.conditions import Condition
from ..data.prompts import check_prompts
from ..data.reading import columns_read
from ..data.rows import read_dataset
from ..scores import maths as scoring
from ..scores.builtin import Alignments, Score, by_row
from .choose import draw_order


_KINDS = {"index": pa.int64(), "rank": pa.int64(), "selected": pa.bool_(), "eligible": pa.bool_()}
_COLUMNS = (
    *("index", "success_rate", "learnability", "alignment", "score", "rank", "selected", "reward_mean", "reward_std"),
    *("completion_length_mean", "gradient_norm", "eligible"),
)
SCORES_SCHEMA = pa.schema([(name, _KINDS.get(name, pa.float64())) for name in _COLUMNS])


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
    scored_elsewhere: int  # how many of these have rewards that do not decide success
    masked: float  # share of the rollouts without a token in the loss
    without_gradient: int  # prompts whose rewards differ, but not those of rollouts in the loss
    doubt: tuple[float, float, float] | None  # of the threshold, see `scoring.doubtful_threshold`

    @classmethod
    def of_rewards(cls, indices, rewards, penalties, lengths, trained, config: LearnAlignConfig, host) -> "Pool":
        """
        Args:
            indices (`torch.Tensor` of shape `(n,)`): dataset indices in any order.
            rewards (`torch.Tensor` of shape `(n, G, F)`): NaN where a reward function gave none.
            penalties (`torch.Tensor` of shape `(n, G)`): see [`Group`].
            lengths (`torch.Tensor` of shape `(n, G)`): tokens of the completions.
            trained (`torch.Tensor` of shape `(n, G)`): how many of these are in the loss. What has no gradient is not
                learnable.
            config ([`LearnAlignConfig`]): says what success and learnability are.
            host ([`Host`]): says how rewards become advantages.
        """
        order = indices.argsort()
        indices, rewards, penalties, lengths, trained = (
            part[order] for part in (indices, rewards, penalties, lengths.double(), trained)
        )
        deciding = host.deciding(rewards, config)
        scorable = ~deciding.isnan().all(1)
        success_rate = scoring.success_rates(deciding, config.success_threshold)
        if config.learnability == "variance":
            learnability = scoring.reward_variance(deciding)
        else:
            learnability = scoring.learnability(success_rate)
        advantages = host.advantages(rewards, penalties)
        without_gradient = (learnability > 0) & ~scoring.has_gradient(advantages, trained > 0)
        learnability = learnability.masked_fill(without_gradient, 0.0)
        graded = config.learnability == "variance"
        columns = (indices, deciding, success_rate, learnability, advantages, lengths)
        return cls(
            *(column[scorable] for column in columns),
            unscorable=indices[~scorable].tolist(),
            scored_elsewhere=int((~scorable & ~rewards.isnan().all(2).all(1)).sum()),
            masked=(trained == 0).double().mean().item(),
            without_gradient=int(without_gradient.sum()),
            doubt=None if graded else scoring.doubtful_threshold(deciding.numpy(), config.success_threshold),
        )

    def provenance(self) -> dict:
        """What a selection notes of the rollouts of its pool."""
        known = self.deciding[~self.deciding.isnan()].numpy()
        return {
            "unscorable": self.unscorable,
            "scored_elsewhere": self.scored_elsewhere,
            "masked": self.masked,
            "without_gradient": self.without_gradient,
            "doubt": self.doubt,
            "reward_range": [known.min().item(), known.max().item()] if len(known) else None,
        }

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
        `ValueError`: it cannot be read, is empty, lacks a column, has a prompt that nothing can be generated for, or
            no names of subtasks in `target_column`.
    """
    if config.target_dataset is None:
        return None
    target = config.target_dataset
    target = read_dataset(target, "target_dataset") if isinstance(target, str) else target
    if not len(target):
        raise ValueError("`target_dataset` is empty. It needs prompts of the kind to improve on.")
    needed, names = {*columns_read(dataset)} | ({config.target_column} - {None}), columns_read(target)
    missing = sorted(needed - set(names))
    if missing:
        raise ValueError(
            f"`target_dataset` has no column {', '.join(map(repr, missing))}. Its columns are: "
            f"{', '.join(names)}. It needs those of the training dataset, for its prompts and the "
            "reward functions, and `target_column`."
        )
    check_prompts(target, "`target_dataset`")
    if config.target_column in target.features:  # else a transform makes it
        kind = target.features[config.target_column]
        if not isinstance(kind, Value | ClassLabel):
            raise ValueError(
                f"`target_column` is {config.target_column!r}, whose values are no names of subtasks: the column is "
                f"{kind}. Use a column of texts or of numbers."
            )
    return target


def rank(score: Score, table: pd.DataFrame, dataset: Dataset, align: Alignments | None) -> "pd.DataFrame | pd.Series":
    """
    What a score returns for a table of what was measured, by dataset row, to which the columns of the dataset that it
    needs are added.
    """
    more = dataset_columns(dataset, table.index, score.columns)
    return score.rank(more.drop(columns=table.columns, errors="ignore").join(table), align)


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
