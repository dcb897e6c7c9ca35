"""Columns of the dataset, as a measure that costs nothing."""

from collections.abc import Sequence
from typing import Any

from ..data.columns import dataset_columns
from .base import Context, Finding, Measure


class Columns(Measure):
    """The columns of the dataset that the score names, or all that hold numbers or text."""

    name = "columns"
    price = "none"

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Read the columns as they are stored; a transform is not asked."""
        return Finding(dataset_columns(context.host.dataset, rows, context.score.columns))
