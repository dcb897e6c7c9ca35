"""Scores: functions of what was measured, each with the measures that it needs, by which prompts are ranked."""

import functools
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..ground.user_code import load_file, partial_arguments


if TYPE_CHECKING:
    import pandas


class Alignments(Protocol):
    """The gradient features of the learnable prompts, where a score needs `"gradients"`."""

    def target(self) -> "pandas.DataFrame":
        """
        Align every learnable prompt with the target, where a score needs `"target"`: max_s cos(phi_i, g_s), with g_s
        the mean of phi_j / |phi_j| over the learnable target prompts j of subtask s (LESS, arXiv 2402.04333, section
        4.2). With `gradient_direction="adam"` phi_i is Adam's step; with `target_checkpoints` the cosine is the mean
        of theirs, weighted by learning rates, before the largest is taken.

        Returns:
            `pandas.DataFrame` of n rows: `alignment` and `gradient_norm` = |phi_i|; NaN for prompts with V = 0.
        """

    def influence(self) -> "pandas.DataFrame":
        """
        Find the influence of every learnable prompt on the mean gradient g of all of them, or of those of the target,
        where there is one: phi_i . (sum_j phi_j phi_j' / n + lambda I)^-1 g, with the features as they are (arXiv
        2504.13586, with the second moment of gradients as Hessian); the largest over subtasks. lambda is a tenth of
        the mean of the min(n, d) eigenvalues of the second moment that may be above 0.

        Returns:
            `pandas.DataFrame` of n rows: `score`, the largest cosine with a g as `alignment`, and `gradient_norm`. For
            prompts with V = 0 the first is 0, the others are NaN.
        """

    def __call__(self, weights: "pandas.Series") -> "pandas.DataFrame":
        """
        Align every learnable prompt with the weighted mean of all, mean_j z_j with z_j = w_j phi_j / |phi_j|.

        Args:
            weights (`pandas.Series` of n numbers): w, by dataset row.

        Returns:
            `pandas.DataFrame` of n rows: `score` = z_i . mean_j z_j, `alignment` = cos(phi_i, mean_j z_j) and
            `gradient_norm` = |phi_i|. For prompts with V = 0 the first is 0, the others are NaN.
        """


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        requires (`tuple[str, ...]`): names of the measures that it needs, with those that these require.
        rank (`Callable`):
            Takes the table of what was measured, a row per prompt by dataset row, and the [`Alignments`] (`None`
            without gradients). Returns the score of each prompt, higher is better, as a Series, or a DataFrame with
            the column `score` and other columns of `scores.parquet`, such as `alignment`; any more are left out. A
            prompt with a NaN is never chosen.
        code (`Callable`, *optional*): a function of the user's, whose source a selection depends on.
        columns (`tuple[str, ...]`): columns of the dataset that the table must hold; `None` for all that hold numbers
            or text.
        at_random (`bool`): whether the order of ties is the choice, and the score says nothing.
    """

    requires: tuple[str, ...]
    rank: Callable[["pandas.DataFrame", Any], "pandas.Series | pandas.DataFrame"]
    columns: tuple[str, ...] | None = ()
    code: Callable | None = None
    at_random: bool = False

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that it needs, the columns of the dataset among them."""
        return (*self.requires, "columns") if self.columns is None or self.columns else self.requires


def _to_target(table, align, weights):
    aligned = align.target()
    return aligned.assign(score=(weights * aligned["alignment"]).where(table["learnability"] > 0, 0.0))


def _confidence(table, align):
    likelihood = table["answer_likelihood"]
    return 1 - (likelihood - likelihood.mean()) ** 2


_TARGET = ("rollouts", "gradients", "target-gradients")
SCORES = {
    # Eq. 8 of the paper, and without V
    "learnalign": Score(("rollouts", "gradients"), lambda table, align: align(table["learnability"])),
    "alignment": Score(("rollouts", "gradients"), lambda table, align: align(table["learnability"] * 0 + 1)),
    "learnability": Score(("rollouts",), lambda table, align: table["learnability"]),
    "target": Score(_TARGET, lambda table, align: _to_target(table, align, table["learnability"])),
    "target_alignment": Score(_TARGET, lambda table, align: _to_target(table, align, 1.0)),
    "influence": Score(("rollouts", "gradients"), lambda table, align: align.influence()),
    # Density sampling of arXiv 2402.09668
    "density": Score(("density",), lambda table, align: 1 / table["density"]),
    "gradient_density": Score(
        ("rollouts", "gradients", "gradient_density"), lambda table, align: 1 / table["gradient_density"]
    ),
    "confidence": Score(("likelihood",), _confidence),  # UFO-RL, arXiv 2505.12457
    "pvi": Score(("likelihood", "likelihood_alone"), lambda table, align: table["prompt_information"]),
    "ask": Score(("ask",), lambda table, align: table["ask_yes"]),  # Ask-LLM, arXiv 2402.09668
    # Data Whisperer, arXiv 2505.12212
    "demonstration": Score(("demonstration",), lambda table, align: table["demonstration_value"]),
    "random": Score((), lambda table, align: table.index.to_series() * 0.0, at_random=True),  # all are tied
}
_COLUMN = "column:"
# By the setting `diversity`: measures, of which the last has a column of its name, the number of prompts like a prompt
DENSITIES = {"hidden_states": ("density",), "gradients": ("gradients", "gradient_density")}


def diverse(score: Score, diversity: str | None) -> Score:
    """Return a score that requires what a `diversity` needs as well, unless it is one at random."""
    if diversity is None or score.at_random:
        return score
    return replace(score, requires=tuple(dict.fromkeys((*score.requires, *DENSITIES[diversity]))))


def find_score(
    score: str | Callable, measures: Sequence[str] | None, diversity: str | None = None, has_target: bool = False
) -> Score:
    """
    Find the score of a configuration.

    Args:
        score (`str` or `Callable`): a name of `SCORES`; `"column:NAME"`, a column of numbers of the dataset; or a
            function of the table, as it is or as `"file.py:function"`.
        measures (`Sequence[str]`, *optional*): that a function needs.
        diversity (`str`, *optional*): of the configuration.
        has_target (`bool`): whether there is a target, which `"influence"` may do without.

    Raises:
        `ValueError`: there is no such score, file or function.
    """
    found = _named(score, measures)
    if has_target and score == "influence":
        found = replace(found, requires=_TARGET)
    return diverse(found, diversity)


def _named(score: str | Callable, measures: Sequence[str] | None) -> Score:
    if isinstance(score, str) and score in SCORES:
        return SCORES[score]
    if isinstance(score, str) and score.startswith(_COLUMN):
        name = score.removeprefix(_COLUMN)
        return Score((), lambda table, align: table[name], (name,))
    function = load_function(score) if isinstance(score, str) else score
    # Alignments are of what was rolled out
    needs = dict.fromkeys(["rollouts"] * ("gradients" in (measures or ())) + list(measures or ()))

    def rank(table, align):
        if align is None:
            return function(table)
        aligned = align(table["learnability"]).drop(columns="score")
        found = by_row(function(table.join(aligned)), table.index)
        return aligned.drop(columns=found.columns, errors="ignore").join(found)

    return Score(tuple(needs), rank, None, function)


def by_row(returned, index: "pandas.Index") -> "pandas.DataFrame":
    """
    Return what a score returned, with the column `score`, by dataset row: a Series or a DataFrame of these rows in any
    order, or as many values in their order.

    Raises:
        `ValueError`: it is none of these.
    """
    import pandas as pd

    if isinstance(returned, pd.DataFrame):
        if "score" not in returned:
            raise ValueError(
                f"The score returned a DataFrame without a column `score`, but with {', '.join(map(str, returned))}. "
                "Return a Series, or name the column `score`."
            )
        columns = returned
    elif isinstance(returned, str) or not isinstance(returned, Sized):
        raise ValueError(
            f"The score returned {returned!r}, but must return a number for each row of the table. Return a Series."
        )
    else:
        columns = pd.DataFrame({"score": returned})
    if len(columns) != len(index):
        raise ValueError(
            f"The score returned {len(columns)} values for {len(index)} prompts. Return one for each row of the table."
        )
    named = isinstance(returned, pd.Series | pd.DataFrame) and not columns.index.equals(index)
    if named and set(columns.index) == set(index):
        return columns.reindex(index)  # by row, whatever the order
    return columns.set_axis(index)


def score_name(score: str | Callable) -> str:
    """Name a score for people and for files: a function by its name, an object by its class."""
    if isinstance(score, str):
        return score
    if isinstance(score, functools.partial):
        return score_name(score.func) + partial_arguments(score)
    named = score if hasattr(score, "__qualname__") else type(score)
    return f"{named.__module__}.{named.__qualname__}"


def manner(score: str | Callable) -> str:
    """Say how a score, or its name, chooses prompts."""
    return "at random" if is_random(score) else f"by {score_name(score)}"


def is_random(score: str | Callable) -> bool:
    """Tell whether a score of a configuration, or its name in a file, chooses prompts at random."""
    return isinstance(score, str) and score in SCORES and SCORES[score].at_random


def load_function(name: str) -> Callable:
    """
    Load a function by `file.py:function`.

    Raises:
        `ValueError`: no such file or function, or the file failed.
    """
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(
            f"`score` is {name!r}, but must be one of {', '.join(SCORES)}, `column:NAME` for a column of the dataset, "
            "or `file.py:function` for a function of yours."
        )
    if not Path(file).is_file():
        raise ValueError(
            f"`score` is {name!r}, but there is no file '{file}'. Paths are relative to the working directory."
        )
    module = load_file(file, f"score {name!r}")
    if not callable(getattr(module, function, None)):
        raise ValueError(f"`score` is {name!r}, but there is no function '{function}' in '{file}'.")
    return getattr(module, function)
