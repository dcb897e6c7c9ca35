"""A trial of ranking and choice on made-up measurements, before anything is generated."""

import logging
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from ..choice.table import rank, scores_table
from ..config import LearnAlignConfig
from ..data.columns import candidate_rows, dataset_columns, row_index
from ..ground.user_code import last_line
from ..measures.base import Finding, Measure
from ..measures.contract import check_finding
from ..measures.registry import funnel, needed
from ..scores.builtin import score_name


logger = logging.getLogger(__name__)

MOST_ROWS = 50_000  # of a larger dataset so many rows, evenly spaced


def made_up(
    rows: list[int], measures: list[Measure], num_rollouts: int, longest: int
) -> tuple[pd.DataFrame, dict[str, Finding]]:
    """Return a table of made-up measurements, by dataset row, and the findings that it was made from."""
    found: dict[str, Finding] = {}
    table = pd.DataFrame(index=row_index(rows))
    for measure in measures:
        finding = measure.made_up(table, num_rollouts, longest)
        check_finding(measure, finding, found, rows)
        found[measure.name] = finding
        if finding.table is not None:
            table = table.join(finding.table)
    return table, found


def rehearse(dataset: Dataset, config: LearnAlignConfig, num_rollouts: int, longest: int) -> None:
    """
    Rank and choose as a selection will, with the dataset's own columns and made-up measurements: what `where`, a
    quota or a function of the user's cannot do is known before the rollouts. A function that cannot read a file, or
    that fails with a part of a large dataset, may be right later: that is a warning.

    Args:
        dataset (`Dataset`): of the training.
        config ([`LearnAlignConfig`]): of the selection.
        num_rollouts (`int`): of a prompt.
        longest (`int`): most tokens of a completion.

    Raises:
        `ValueError`: a function of the user's fails, or returns no scores; `where` compares what cannot be compared.
    """
    score = config.ranking()
    if score.code is None and config.where is None and config.quota_column is None:
        return
    rows = candidate_rows(dataset, config)
    size = funnel(config, len(rows))[1]
    part = min(size, MOST_ROWS)
    some = [rows[place * len(rows) // part] for place in range(part)]
    table, found = made_up(some, needed(score.requires), num_rollouts, longest)
    columns = dataset_columns(dataset, some, score.columns)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            ranked = rank(score, table, columns, found.get("gradients"))
            scores_table(table, ranked, dataset, config, seed=0)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
        if score.code is None or (ours and part == size):
            raise
        message = (
            f"The score {score_name(config.score)} failed with a table of made-up measurements, which it is tried "
            f"with before anything is generated{_place(error, score)}: {type(error).__name__}: {error}."
        )
        if part < size or isinstance(error, OSError):
            logger.warning(f"{message} If it will be right with the measurements of a selection, all is well.")
            return
        raise ValueError(f"{message} Correct it.") from error


def _place(error, score) -> str:
    """Return the place of an error in the user's file."""
    code = getattr(score.code, "__code__", None) or getattr(type(score.code).__call__, "__code__", None)
    if code is None or (line := last_line(error, code.co_filename)) is None:
        return ""
    return f" ({code.co_filename}, line {line})"
