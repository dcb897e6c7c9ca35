"""Mistakes in a measure, refused with a name and a remedy before anything is measured, or once its result is there."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from ..choice.table import SCORES_SCHEMA
from .base import PRICES, Finding, Measure


_CHOICE = {*SCORES_SCHEMA.names, "quota_group"}  # columns of `scores.parquet` that no measure of another's may have


def check_measure(name: str, measure: Measure) -> None:
    """Raise a `ValueError` for an entry `name` of `MEASURES` that is no measure, or has a wrong name or price."""
    if not isinstance(measure, Measure):
        raise ValueError(
            f"`MEASURES` holds {measure!r} under {name!r}, which is no object of a subclass of Measure. Put such an "
            "object there: `MEASURES[name] = MyMeasure()`."
        )
    if getattr(measure, "name", None) != name:
        raise ValueError(
            f"`MEASURES` holds a {type(measure).__name__} under {name!r}, but its `name` is "
            f"{getattr(measure, 'name', None)!r}. Let both be the same."
        )
    if measure.price not in PRICES:
        raise ValueError(
            f"The price of the measure {name!r} is {measure.price!r}, but must be one of {', '.join(PRICES)}. Correct "
            "it."
        )
    for attribute in ("requires", "columns"):
        if isinstance(given := getattr(measure, attribute), str):
            raise ValueError(
                f"`{attribute}` of the measure {name!r} is the text {given!r}, but must hold several names. Write "
                f"`({given!r},)`."
            )


def check_apart(measures: Iterable[Measure], owners: Mapping[str, str]) -> None:
    """
    Raise a `ValueError` for a column of two measures, or one that the choice makes itself. `owners` are the measures
    of the package by their columns.
    """
    taken = dict.fromkeys(_CHOICE, "the choice") | {column: f"the measure {name!r}" for column, name in owners.items()}
    for measure in measures:
        for column in measure.columns:
            own = f"the measure {measure.name!r}"
            if taken.setdefault(column, own) != own:
                raise ValueError(
                    f"The measure {measure.name!r} has a column '{column}', which {taken[column]} has as well, so one "
                    "would replace the other. Rename it, in `columns` and in the table."
                )


def check_finding(measure: Measure, finding: Finding, before: Mapping[str, Finding], rows: Sequence[int]) -> None:
    """
    Raise a `ValueError` for a result that cannot be joined with the others.

    Args:
        measure ([`Measure`]): that returned it.
        finding ([`Finding`]): its result.
        before (`Mapping[str, Finding]`): the results of the measures before it, by their names.
        rows (`Sequence[int]`): that were to be measured.
    """
    table = finding.table if isinstance(finding, Finding) else finding
    if not isinstance(finding, Finding) or not (table is None or isinstance(table, pd.DataFrame)):
        raise ValueError(
            f"The measure {measure.name!r} returned a {type(table).__name__}, but must return a Finding of a "
            "DataFrame, or of `None`. Correct its `run` and `made_up`."
        )
    if table is None:
        return
    if table.index.has_duplicates:
        raise ValueError(
            f"The table of the measure {measure.name!r} has row {table.index[table.index.duplicated()][0]} twice, but "
            "must have one row for each prompt. Correct its `run` and `made_up`."
        )
    if len(others := table.index.difference(pd.Index(rows))):
        raise ValueError(
            f"The table of the measure {measure.name!r} has row {others[0]}, which was not asked for. Let the index "
            "hold rows of the dataset, those that `run` was given or some of them."
        )
    for name, other in before.items():
        if name == "columns" or other.table is None:  # columns of the dataset give way
            continue
        if len(both := table.columns.intersection(other.table.columns)):
            raise ValueError(
                f"The tables of the measures {name!r} and {measure.name!r} both have a column '{both[0]}'. Rename it "
                "in one of them."
            )
