"""Every prompt of a pool with its score, and the order in which prompts may be chosen."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Value

from ..data.columns import dataset_columns
from ..data.conditions import Condition
from ..data.prompts import check_prompts
from ..data.reading import columns_read
from ..data.rows import read_dataset
from ..scores import maths as scoring
from ..scores.builtin import DENSITIES, Score, by_row
from .choose import draw_order
from .groups import groups_of


if TYPE_CHECKING:
    from ..config import LearnAlignConfig

_KINDS = {"index": pa.int64(), "rank": pa.int64(), "selected": pa.bool_(), "eligible": pa.bool_()}
_COLUMNS = (
    *("index", "success_rate", "learnability", "alignment", "score", "rank", "selected", "reward_mean", "reward_std"),
    *("completion_length_mean", "gradient_norm", "eligible"),
)
SCORES_SCHEMA = pa.schema([(name, _KINDS.get(name, pa.float64())) for name in _COLUMNS])


def load_target(dataset: Dataset, config: "LearnAlignConfig") -> Dataset | None:
    """
    Return the rows of the target; `None` without one. `dataset` is the training dataset, whose columns it must have.

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
    needed, names = {*columns_read(dataset)} | set(filter(None, [config.target_column])), columns_read(target)
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


def rank(score: Score, table: pd.DataFrame, columns: pd.DataFrame | None, align: Any) -> "pd.DataFrame | pd.Series":
    """
    Return what a score returns for a table of what was measured, by dataset row, to which `columns` of the dataset are
    added.
    """
    if columns is not None:
        table = columns.drop(columns=table.columns, errors="ignore").reindex(table.index).join(table)
    return score.rank(table, align)


def scores_table(
    table: pd.DataFrame,
    ranked: "pd.DataFrame | pd.Series",
    dataset: Dataset,
    config: "LearnAlignConfig",
    seed: int,
    measured: Iterable[str] = (),
) -> pa.Table:
    """
    Return the columns of `scores.parquet`, by dataset row, before anything is chosen. A prompt with V = 0 is never
    eligible, not even when there are fewer others than asked for; one with V > 0 may be chosen with a negative score.
    With `diversity` a score above 0 is divided by the number of prompts like the prompt, its density; one below 0 is
    multiplied, so that a near-duplicate falls as well.

    Args:
        table (`pandas.DataFrame`): what was measured, by dataset row.
        ranked (`pandas.DataFrame` or `pandas.Series`): what the [`Score`] returned for it.
        dataset (`Dataset`): with the columns of `where` and of the quotas.
        config ([`LearnAlignConfig`]): says what may be chosen.
        seed (`int`): of ties and draws.
        measured (`Iterable[str]`, *optional*): columns of the table to keep besides those of `SCORES_SCHEMA`.

    Raises:
        `ValueError`: the score is not a number for every prompt of the table.
    """
    table = _with_score(table, ranked)
    if config.diversity is not None and (name := DENSITIES[config.diversity][-1]) in table:
        own, density = table["score"], table[name].fillna(1.0)
        table["score"] = (own * density).where(own < 0, own / density)
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
    places = np.empty(len(table), dtype=np.int64)
    places[order] = np.arange(len(table))
    table = table.assign(rank=places, eligible=eligible, selected=False, index=table.index)
    if config.ranking().at_random:
        table["score"] = np.nan
    schema = SCORES_SCHEMA
    for name in measured:
        if name in table and name not in schema.names:
            schema = schema.append(pa.field(name, pa.Array.from_pandas(table[name]).type))
    if config.quota_column is not None:
        table["quota_group"], more = groups_of(table, dataset, config, seed)
        schema = schema.append(pa.field("quota_group", pa.string()))
        for column in more:
            table[column] = more[column]
            schema = schema.append(pa.field(str(column), pa.float64()))
    empty = pa.nulls(len(table), pa.float64())  # one for all columns that were not measured
    arrays = [
        pa.array(table[field.name].to_numpy(), field.type, from_pandas=True) if field.name in table else empty
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


def draw_pool(rows: Sequence[int], candidates: int | None, seed: int) -> Sequence[int]:
    """Return all rows, or a random part of that size; sorted."""
    if candidates is None or candidates >= len(rows):
        return rows
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:candidates].tolist()
    return sorted(rows[place] for place in places)
