"""Ranking and choice tried on made-up measurements, before anything is generated."""

import logging
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from ..config import LearnAlignConfig
from ..data.columns import candidate_rows
from ..ground.user_code import last_line
from ..scores.builtin import score_name
from .table import rank, scores_table


logger = logging.getLogger(__name__)

MOST_ROWS = 50_000  # of a larger dataset so many rows, evenly spaced


class _Alignments:
    """Stands in for gradients, see [`~trl_learnalign.scores.builtin.Alignments`]."""

    def __init__(self, learnability: pd.Series):
        self.learnability = learnability

    def __call__(self, weights: pd.Series) -> pd.DataFrame:
        aligned = self.target()
        return aligned.assign(score=(weights * aligned["alignment"]).fillna(0.0))

    def target(self) -> pd.DataFrame:
        places = np.arange(len(self.learnability))
        known = self.learnability.to_numpy() > 0
        columns = {"alignment": np.cos(places), "gradient_norm": 1 + places % 7}
        return pd.DataFrame(
            {name: np.where(known, values, np.nan) for name, values in columns.items()}, index=self.learnability.index
        )


def made_up(rows: list[int], config: LearnAlignConfig, num_rollouts: int, longest: int) -> pd.DataFrame:
    """
    A table of measurements as [`Pool.table`] makes it, by dataset row, with success rates from 0 to 1 and lengths up
    to `longest` tokens; without columns where the score needs no rollouts.
    """
    index, places = pd.Index(rows, name="index", dtype="int64"), np.arange(len(rows))
    if "rollouts" not in config.measures:
        return pd.DataFrame(index=index)
    rates = (7 * places + 1) % (num_rollouts + 1) / num_rollouts
    columns = {
        "success_rate": rates,
        "learnability": rates * (1 - rates),
        "reward_mean": rates,
        "reward_std": np.sqrt(rates * (1 - rates)),
        "completion_length_mean": 1 + (13 * places) % max(longest, 1) * 1.0,
    }
    return pd.DataFrame(columns, index=index)


def rehearse(dataset: Dataset, config: LearnAlignConfig, num_rollouts: int, longest: int) -> None:
    """
    Ranks and chooses as a selection will, with the dataset's own columns and made-up measurements: what `where`, a
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
    size = min(len(rows), config.candidate_prompts or len(rows))
    part = min(size, MOST_ROWS)
    table = made_up([rows[place * len(rows) // part] for place in range(part)], config, num_rollouts, longest)
    align = _Alignments(table["learnability"]) if "gradients" in config.measures else None
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            ranked = rank(score, table, dataset, align)
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
    """Where in the user's file."""
    code = getattr(score.code, "__code__", None) or getattr(type(score.code).__call__, "__code__", None)
    line = last_line(error, code.co_filename) if code is not None else None
    return "" if line is None else f" ({code.co_filename}, line {line})"
