"""Rows as the trainer reads them: through a transform of the user's, if the dataset has one."""

from collections.abc import Sequence
from contextlib import nullcontext

from datasets import Dataset

from ..ground.randomness import repeatable


def has_transform(dataset: Dataset) -> bool:
    """Tell whether a function makes the rows whenever they are read (`with_transform`), perhaps others each time."""
    return dataset.format["type"] == "custom"


def columns_read(dataset: Dataset) -> list[str]:
    """Name the columns that the trainer reads: those of the first row where a transform makes them."""
    if not has_transform(dataset) or not len(dataset):
        return dataset.column_names
    (first,) = read_rows(dataset, [0])
    return list(first)


def read_rows(dataset: Dataset, rows: Sequence[int]) -> list[dict]:
    """
    Read rows as a dataloader gets them, each whole: a transform may make a column from any other. A transform that
    draws random numbers makes the same rows each time and on every process, and takes no number from training.
    """
    with repeatable() if has_transform(dataset) else nullcontext():
        return dataset.__getitems__([int(row) for row in rows])


def read_prompts(dataset: Dataset, rows: Sequence[int]) -> list:
    """
    Read the prompts of rows. Without a transform they are Python objects, whatever the format of the dataset, and no
    other column is read.
    """
    if has_transform(dataset):
        return [row["prompt"] for row in read_rows(dataset, rows)]
    stored = dataset.with_format(None).select_columns(["prompt"])
    return stored[[int(row) for row in rows]]["prompt"]
