"""Columns of the dataset: measures that cost nothing."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset, Value

from .choice import Condition
from .config import LearnAlignConfig
from .reading import has_transform
from .scores import score_name


# Columns that a measure adds to the table
MEASURED = {
    "rollouts": ("success_rate", "learnability", "reward_mean", "reward_std", "completion_length_mean"),
    "gradients": ("alignment", "gradient_norm"),
    "target": (),
}


def dataset_columns(dataset: Dataset, rows: Sequence[int], names: Sequence[str] | None) -> pd.DataFrame:
    """
    Columns of the dataset by dataset row, as they are stored: a transform is not asked. `None`: all that hold numbers
    or text.
    """
    if names is None:
        names = [name for name, kind in dataset.features.items() if isinstance(kind, Value)]
    index = pd.Index(rows, name="index", dtype="int64")
    if not names:
        return pd.DataFrame(index=index)
    return dataset.select_columns(list(names)).select(rows).to_pandas().set_axis(index)


def check_columns(dataset: Dataset, config: LearnAlignConfig) -> None:
    """
    Raises:
        `ValueError`: `score`, `where` or `quota_column` name a column that there is not, a score that holds no
            numbers, `where` a column of the dataset that has the name of what is measured, or a function of the
            user's would find such a column.
    """
    wanted = {"score": config.ranking().columns or ()}
    if config.quota_column is not None:
        wanted["quota_column"] = (config.quota_column,)
    measured = {"score"}.union(*(MEASURED[measure] for measure in config.measures))
    if config.where is not None:
        named = Condition(config.where).columns
        for name in sorted(named & measured & set(dataset.column_names)):
            raise ValueError(
                f"`where` is {config.where!r}, but '{name}' is both a column of the training dataset and measured by "
                "the selection. Rename or remove the column."
            )
        wanted["where"] = named - measured
    if config.ranking().code is not None:
        for name in sorted((measured - {"score"}) & set(dataset.column_names)):
            raise ValueError(
                f"`score` is a function of yours ({score_name(config.score)}), but '{name}' is both a column of the "
                "training dataset and measured by the selection, so that it would find only one of them. Rename or "
                "remove the column."
            )
    for knob, names in wanted.items():
        more = f", and measured: {', '.join(sorted(measured))}" if knob == "where" and measured else ""
        check_named(dataset, knob, getattr(config, knob), names, more)
    for name in wanted["score"]:
        check_numbers(dataset, "score", config.score, name)


def check_named(dataset: Dataset, knob: str, value, names: Iterable[str], more: str = "") -> None:
    """
    Raises:
        `ValueError`: the value of the setting `knob` names a column that there is not; `more` ends the list of those
            that there are.
    """
    made = " (those that a transform makes are not seen: write them with `dataset.map`)" * has_transform(dataset)
    for name in sorted(set(names) - set(dataset.column_names)):
        raise ValueError(
            f"`{knob}` is {value!r}, but the training dataset has no column '{name}'. Its columns "
            f"are: {', '.join(dataset.column_names)}{more}{made}. Correct the name."
        )


def check_numbers(dataset: Dataset, knob: str, value, name: str) -> None:
    """
    Raises:
        `ValueError`: the column `name`, which the value of the setting `knob` names, holds no numbers.
    """
    kind = getattr(dataset.features[name], "dtype", "")
    if not kind.startswith(("int", "uint", "float", "bool")):
        raise ValueError(f"`{knob}` is {value!r}, but the column '{name}' holds no numbers ({kind or 'nested'}).")


def candidate_rows(dataset: Dataset, config: LearnAlignConfig) -> list[int]:
    """
    The rows that `where` holds for, as far as it needs columns of the dataset alone; all rows otherwise.

    Raises:
        `ValueError`: it holds for none.
    """
    rows = range(len(dataset))
    if config.where is None or (condition := Condition(config.where)).columns - set(dataset.column_names):
        return list(rows)
    found = np.flatnonzero(condition(dataset_columns(dataset, rows, sorted(condition.columns)))).tolist()
    if not found:
        raise ValueError(f"`where` is {config.where!r}, which holds for no row of the training dataset. Correct it.")
    return found
