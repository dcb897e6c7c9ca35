"""A funnel: candidates are chosen by cheaper scores, one after another."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from .groups import clusters_named


if TYPE_CHECKING:
    from ..config import LearnAlignConfig

# Settings of a choice of candidates, which is made from all rows that may be chosen
_STAGE: dict = {
    **dict.fromkeys(("candidate_prompts", "candidate_score", "score_measures", "where"), None),
    **dict.fromkeys(("target_dataset", "target_column", "target_checkpoints", "diversity", "review_every"), None),
    "gradient_direction": "plain",
    **{"rollouts": "all", "take": "top", "deduplicate": False, "save_rollouts": False, "write_report": False},
}


def check_candidates(config: "LearnAlignConfig") -> None:
    """
    Make one number or score of a list of one. Raise a `ValueError` unless the sizes are whole numbers that fall from
    stage to stage to at least `num_prompts`, one for each score.
    """
    for name in ("candidate_prompts", "candidate_score"):  # a command line makes a list of one
        if isinstance(value := getattr(config, name), list | tuple):
            setattr(config, name, value[0] if len(value) == 1 else list(value))
    sizes, scores = config.candidate_prompts, config.candidate_score
    numbers = sizes if isinstance(sizes, list) else [] if sizes is None else [sizes]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"`candidate_prompts` is {sizes!r}, but must be a whole number of at least 1, or a list of such. Use "
                "None to score the whole dataset."
            )
    if numbers and numbers[-1] < config.num_prompts:
        raise ValueError(
            f"`candidate_prompts` ({numbers[-1]}) is smaller than `num_prompts` ({config.num_prompts}), "
            "so there would be nothing to choose from. Raise the first or lower the second."
        )
    named = scores if isinstance(scores, list) else [] if scores is None else [scores]
    if any(not isinstance(one, str | Callable) for one in named):
        raise ValueError(
            f"`candidate_score` is {scores!r}, but must be a score such as 'confidence' or 'column:NAME', a function, "
            "or a list of such."
        )
    if (named or len(numbers) > 1) and len(named) != len(numbers):
        raise ValueError(
            f"`candidate_score` names {len(named)} scores and `candidate_prompts` {len(numbers)} sizes, but each "
            "score chooses one number of prompts. Give as many of both."
        )
    if any(later >= earlier for earlier, later in pairwise(numbers)):
        raise ValueError(
            f"`candidate_prompts` is {sizes!r}, but each choice must leave fewer prompts than the one before. Correct "
            "the numbers."
        )


def left_of(config: "LearnAlignConfig", rows: int) -> int:
    """Return how many of `rows` prompts are candidates in the end."""
    sizes = config.candidate_prompts
    return min(rows, (sizes[-1] if isinstance(sizes, list) else sizes) or rows)


def stages_of(config: "LearnAlignConfig") -> "list[LearnAlignConfig]":
    """
    Return a configuration for each choice of candidates, whose `score` and `num_prompts` are of that choice.

    Raises:
        `ValueError`: there is no such score.
    """
    scores, sizes = config.candidate_score, config.candidate_prompts
    if scores is None:
        return []
    by_cluster = clusters_named(config.quota_column) is not None  # which would take a forward over all rows
    numbers = cast("list[int]", sizes if isinstance(sizes, list) else [sizes])
    pairs = zip(scores if isinstance(scores, list) else [scores], numbers, strict=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that act on what comes after
            settings = _STAGE | {"quota_column": None, "quota": "proportional"} if by_cluster else _STAGE
            return [replace(config, **settings, score=one, num_prompts=size) for one, size in pairs]
    except ValueError as error:
        raise ValueError(f"`candidate_score`, as a score of its own: {error}") from error
