"""Groups that quotas are put on and that no column holds: grades by several success rates, clusters of prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from datasets import Dataset

from ..curriculum.clusters import clusters
from ..data.columns import check_named, check_numbers, dataset_columns


if TYPE_CHECKING:
    from ..config import LearnAlignConfig

GRADES = 5  # of equal width, from 0 to 1
_GRADE, _CLUSTERS = "grade:", "clusters:"
_MOST_CLUSTERS = 256


def rates_named(quota_column: str | None) -> list[str]:
    """Return the columns of `"grade:A,B"`; none of anything else."""
    named = (quota_column or "").removeprefix(_GRADE) if (quota_column or "").startswith(_GRADE) else ""
    return [name.strip() for name in named.split(",") if name.strip()]


def clusters_named(quota_column: str | None) -> int | None:
    """
    Return the number of `"clusters:N"`; `None` of anything else.

    Raises:
        `ValueError`: it is no number of 2 to 256.
    """
    if quota_column is None or not quota_column.startswith(_CLUSTERS):
        return None
    number = quota_column.removeprefix(_CLUSTERS)
    if not number.isdecimal() or not 2 <= int(number) <= _MOST_CLUSTERS:
        raise ValueError(
            f"`quota_column` is {quota_column!r}, but must name 2 to {_MOST_CLUSTERS} clusters. Write `clusters:8`."
        )
    return int(number)


def is_made(quota_column: str) -> bool:
    """Tell whether the groups are made here, and are no column."""
    return quota_column.startswith((_GRADE, _CLUSTERS))


def check_made(dataset: Dataset, quota_column: str) -> None:
    """Raise a `ValueError` for a grade of no columns, or of columns that hold no success rates."""
    if not quota_column.startswith(_GRADE):
        return
    names = rates_named(quota_column)
    if not names:
        raise ValueError(
            f"`quota_column` is {quota_column!r}, but names no column of success rates. Write `grade:rate_a,rate_b`."
        )
    check_named(dataset, "quota_column", quota_column, names)
    for name in names:
        check_numbers(dataset, "quota_column", quota_column, name)
    rates = dataset_columns(dataset, range(len(dataset)), names).astype(float)
    wrong = (rates < 0) | (rates > 1) | np.isinf(rates)
    if wrong.any(axis=None):
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise ValueError(
            f"`quota_column` is {quota_column!r}, but row {row} holds {rates.loc[row].to_list()}, and success rates "
            "are between 0 and 1. Divide them, or leave the rows out."
        )


def groups_of(
    table: pd.DataFrame, dataset: Dataset, config: "LearnAlignConfig", seed: int
) -> tuple[pd.Series, pd.DataFrame]:
    """
    Return the group of each prompt, and columns that tell more of it.

    A grade is the fifth of [0, 1] in which the mean of a prompt's success rates lies, with `rate_mean`, `rate_spread`
    (the standard deviation between them) and `rate_variation`, the coefficient of variation, spread by mean
    (DeepDistill, arXiv 2504.17565); missing rates do not count. Clusters are found by k-means over hidden states
    (InfiAlign, arXiv 2508.05496), the largest is 0.

    Args:
        table (`pandas.DataFrame`): what was measured, n rows by dataset row.
        dataset (`Dataset`): with the columns that `quota_column` names.
        config ([`LearnAlignConfig`]): of the selection, with a `quota_column`.
        seed (`int`): of the clusters.
    """
    name, none = str(config.quota_column), pd.DataFrame(index=table.index)
    if (number := clusters_named(name)) is not None:
        hidden = table[[column for column in table if str(column).startswith("hidden_")]].to_numpy()
        found = clusters(hidden, number, seed)
        return pd.Series([f"cluster {one}" for one in found], table.index, dtype="string"), none
    if not is_made(name):
        return dataset_columns(dataset, table.index, [name])[name].astype("string"), none
    rates = dataset_columns(dataset, table.index, rates_named(name)).astype(float)
    mean, spread = rates.mean(axis=1), rates.std(axis=1, ddof=0)
    more = pd.DataFrame({"rate_mean": mean, "rate_spread": spread, "rate_variation": spread / mean.where(mean > 0)})
    return pd.Series(_grades(mean), table.index, dtype="string"), more


def _grades(means: pd.Series) -> Sequence[str | None]:
    places = np.minimum(np.floor(means * GRADES + 1e-9), GRADES - 1)
    return [None if np.isnan(one) else f"rate {one / GRADES:.1f} to {(one + 1) / GRADES:.1f}" for one in places]
