"""Columns of the dataset, which cost nothing to measure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value
from pandas.api import types

from ..scores.builtin import score_name
from .conditions import Condition
from .reading import has_transform


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


_FEW = 0.05  # of all rows are read one by one
_EXACT = 1 << 53  # floats hold all whole numbers up to this one


def row_index(rows: "Sequence[int] | np.ndarray | pd.Index") -> pd.Index:
    """Return the index of a table of these rows of the dataset."""
    return pd.Index(np.asarray(rows, dtype=np.int64), name="index")


def dataset_columns(
    dataset: Dataset, rows: "Sequence[int] | pd.Index", names: Iterable[str] | None, as_stored: bool = False
) -> pd.DataFrame:
    """
    Read columns of the dataset, or fields of nested ones such as `extra.level`, as they are stored: no transform is
    asked.

    Args:
        dataset (`Dataset`): the dataset.
        rows (`Sequence[int]`): the rows to read, n.
        names (`Iterable[str]`, *optional*): columns; `None` for all that hold numbers or text.
        as_stored (`bool`, *optional*): whether whole numbers stay whole beside missing ones, which are `None` then.

    Returns:
        `pandas.DataFrame` of n rows, in the order of `rows` and named by them.
    """
    if names is None:
        names = [name for name, kind in dataset.features.items() if isinstance(kind, Value)]
    names, index = list(names), row_index(rows)
    if not names:
        return pd.DataFrame(index=index)
    whole = _taken(dataset.select_columns(sorted({root_of(dataset, name) for name in names})), index, as_stored)
    columns = {
        name: whole[name] if name in whole else _field(whole, root_of(dataset, name), name, as_stored)
        for name in names
    }
    return pd.DataFrame(columns).set_axis(index)


def _taken(dataset, index, as_stored):
    """
    Read rows of a dataset as a table. `Dataset.select` looks at every row by itself, which is too slow for a million:
    where many rows are wanted, all are read.
    """
    if len(index) < _FEW * len(dataset):
        return _frame(dataset.select(index).with_format("arrow")[:], as_stored)
    table = _frame(_whole(dataset), as_stored)
    return table if np.array_equal(index, np.arange(len(table))) else table.iloc[index].reset_index(drop=True)


def _whole(dataset) -> pa.Table:
    """
    Read all rows. `datasets` gathers the rows of a shuffled dataset one by one, which takes seconds; arrow does it at
    once.
    """
    order = getattr(dataset, "_indices", None)  # `datasets` has no public name for it
    if order is not None:
        try:
            return dataset.data.table.take(order.column(0))
        except (pa.ArrowException, AttributeError):  # texts of more than 2 GiB, or another version of `datasets`
            pass
    return dataset.with_format("arrow")[:]


def _frame(table: pa.Table, as_stored: bool) -> pd.DataFrame:
    """
    Convert a table. Whole numbers beside missing ones become floats, unless those have too few digits or `as_stored`.
    """
    frame = table.to_pandas()
    for name, column in zip(table.column_names, table.columns, strict=True):
        whole = pa.types.is_integer(column.type) and column.null_count
        fits = whole and all(end is None or abs(end) <= _EXACT for end in pc.min_max(column).as_py().values())
        if (whole and (as_stored or not fits)) or pa.types.is_nested(column.type):
            frame[name] = column.to_pandas(integer_object_nulls=True)
    return frame


def root_of(dataset: Dataset, name: str) -> str:
    """Name the column of the dataset that `name` is, or is a field of."""
    while name not in dataset.column_names and "." in name:
        name = name.rpartition(".")[0]
    return name


def _field(table, root, name, as_stored):
    """Read a field of a nested column. A row without it has a missing value."""
    values = table[root]
    for part in name.removeprefix(f"{root}.").split("."):
        values = [value.get(part) if isinstance(value, dict) else None for value in values]
    large = any(type(value) is int and abs(value) > _EXACT for value in values)
    kept = as_stored or (large and any(value is None for value in values))
    return pd.Series(values, dtype="object" if kept else None)


def _kind(dataset, name):
    """Return the feature of a column or of a field; `None` if there is none. A column of JSON may have any field."""
    root = root_of(dataset, name)
    kind = dataset.features.get(root)
    for part in name.removeprefix(root).split(".")[1:]:
        if type(kind).__name__ != "Json":  # by name: older versions of datasets have no such feature
            kind = kind.get(part) if isinstance(kind, dict) else None
    return kind


def check_columns(dataset: Dataset, config: "LearnAlignConfig", columns: Mapping[str, Any]) -> None:
    """
    Check the columns that the settings of a selection name. `columns` are those that are measured, by name a value of
    their kind.

    Raises:
        `ValueError`: `score` or `where` name a missing column, the column of a score holds no numbers, or a column of
            the dataset that `where` or a function of the user's reads has the name of a measure.
    """
    measured = {"score": 0.0, **columns}
    if config.ranking().code is not None:
        for name in sorted(columns.keys() & set(dataset.column_names)):
            raise ValueError(
                f"`score` is a function of yours ({score_name(config.score)}), but '{name}' is both a column of the "
                "training dataset and measured by the selection, so that it would find only one of them. Rename or "
                "remove the column."
            )
    for name in config.ranking().columns or ():
        check_named(dataset, "score", config.score, (name,))
        check_numbers(dataset, "score", config.score, name)
    if config.where is not None:
        check_condition(dataset, config.where, measured)


def check_condition(dataset: Dataset, where: str, measured: Mapping[str, Any] | None = None) -> None:
    """
    Evaluate a condition before anything is measured.

    Args:
        dataset (`Dataset`): the training dataset.
        where (`str`): the condition.
        measured (`Mapping[str, Any]`, *optional*): columns that will be measured, by name a value of their kind.

    Raises:
        `ValueError`: the condition names a missing column, or one that is both in the dataset and measured, or it
            compares values that cannot be compared.
    """
    condition, measured = Condition(where), measured or {}
    for name in sorted(condition.columns & set(measured) & set(dataset.column_names)):
        raise ValueError(
            f"`where` is {where!r}, but '{name}' is both a column of the training dataset and measured by the "
            "selection. Rename or remove the column."
        )
    names = sorted(condition.columns - set(measured))
    more = (
        f", and measured: {', '.join(sorted(measured))}" if measured else "; nothing is measured before an online run"
    )
    check_named(dataset, "where", where, names, more)
    condition(dataset_columns(dataset, range(len(dataset)), names).assign(**measured))


def check_named(dataset: Dataset, knob: str, value, names: Iterable[str], more: str = "") -> None:
    """
    Check that columns or fields exist which the value of the setting `knob` names.

    Raises:
        `ValueError`: a column does not exist. `more` ends the list of the existing columns.
    """
    made = " (those that a transform makes are not seen: write them with `dataset.map`)" * has_transform(dataset)
    for name in sorted(names):
        if _kind(dataset, name) is not None:
            continue
        kind = _kind(dataset, root := name.rpartition(".")[0])
        fields = f". The fields of '{root}' are: {', '.join(kind)}" if isinstance(kind, dict) else ""
        raise ValueError(
            f"`{knob}` is {value!r}, but the training dataset has no column '{name}'. Its columns "
            f"are: {', '.join(dataset.column_names)}{more}{made}{fields}. Correct the name."
        )


def check_numbers(dataset: Dataset, knob: str, value, name: str) -> None:
    """
    Check that the column `name`, which the value of the setting `knob` names, holds numbers.

    Raises:
        `ValueError`: the column holds no numbers.
    """
    kind = getattr(_kind(dataset, name), "dtype", None) or ""
    if not kind.startswith(("int", "uint", "float", "bool")):
        raise ValueError(f"`{knob}` is {value!r}, but the column '{name}' holds no numbers ({kind or 'nested'}).")


def check_flags(dataset: Dataset, knob: str, name: str) -> None:
    """
    Check that the column `name`, which the setting `knob` names, holds True or False in every row.

    Raises:
        `ValueError`: the column is missing, or holds something else.
    """
    check_named(dataset, knob, name, (name,))
    kind = getattr(_kind(dataset, name), "dtype", "nested")
    remedy = f"Make one with `dataset.map(lambda row: {{'is_target': ...}})`, and set `{knob}='is_target'`."
    if kind != "bool":
        raise ValueError(f"`{knob}` is {name!r}, but the column holds no True and False ({kind}). {remedy}")
    values = dataset_columns(dataset, range(len(dataset)), [name])[name]
    if values.isna().any():
        raise ValueError(
            f"`{knob}` is {name!r}, but the column has no value in row {values.index[values.isna()][0]}. {remedy}"
        )


def check_groups(dataset: Dataset, knob: str, name: str, most: int | None = None) -> None:
    """
    Check that the column `name`, which the setting `knob` names, divides the rows into groups.

    Raises:
        `ValueError`: the column is missing, is nested, holds fractions, has a value of its own in every row, or more
            than `most` values.
    """
    check_named(dataset, knob, name, (name,))
    kind = _kind(dataset, name)
    if not isinstance(kind, Value | ClassLabel):
        fields = f", or a field such as `{name}.{next(iter(kind))}`" if isinstance(kind, dict) and kind else ""
        raise ValueError(
            f"`{knob}` is {name!r}, which is nested, but its values are to be groups. Use a column of sources or kinds"
            f"{fields}."
        )
    values = dataset_columns(dataset, range(len(dataset)), [name])[name]
    if types.is_float_dtype(values.dtype) and (fractions := values[values % 1 > 0]).size:  # NaN and infinity are none
        raise ValueError(
            f"`{knob}` is {name!r}, which holds fractions such as {fractions.iloc[0]:g}, but its values are to be "
            "groups. Sort them into a few bins, or make them texts, with `dataset.map`."
        )
    number = values.nunique(dropna=False)
    if most is not None and number > most:
        raise ValueError(
            f"`{knob}` is {name!r}, which has {number:,} different values; at most {most} can be told apart. Use a "
            "column of sources or kinds."
        )
    if number == len(values) > 1:
        raise ValueError(
            f"`{knob}` is {name!r}, but each of the {number:,} rows has another value, so every prompt would be a "
            "group by itself. Use a column of sources or kinds."
        )


def candidate_rows(dataset: Dataset, config: "LearnAlignConfig") -> Sequence[int]:
    """
    Find the rows that `where` holds for, if it needs columns of the dataset alone; all rows otherwise.

    Raises:
        `ValueError`: the condition holds for none.
    """
    rows = range(len(dataset))
    if config.where is None or needs_measures(dataset, config):
        return rows
    condition = Condition(config.where)
    found = np.flatnonzero(condition(dataset_columns(dataset, rows, sorted(condition.columns)))).tolist()
    if not found:
        raise ValueError(f"`where` is {config.where!r}, which holds for no row of the training dataset. Correct it.")
    return found


def needs_measures(dataset: Dataset, config: "LearnAlignConfig") -> bool:
    """Tell whether `where` names more than columns of the dataset, so that it is decided only after the rollouts."""
    if config.where is None:
        return False
    return any(_kind(dataset, name) is None for name in Condition(config.where).columns)
