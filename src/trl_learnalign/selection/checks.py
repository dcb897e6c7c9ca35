"""Settings with which a selection would fail or be wrong, refused before anything is measured."""

import warnings
from dataclasses import replace

from datasets import Dataset

from ..choice.groups import check_made, is_made
from ..choice.table import load_target
from ..config import LearnAlignConfig
from ..data.columns import check_columns, check_groups, needs_measures
from ..ground.randomness import random_state, set_random_state
from ..host import Host
from ..host.names import GENERATES
from ..measures.registry import cost, needed
from ..scores.builtin import score_name
from .rehearsal import made_up, rehearse


_LONG = 1000  # tokens, where nothing limits a completion


def check_selection(host: Host, config: LearnAlignConfig) -> None:
    """
    Check the columns, the target, the score and the measures of a selection.

    Raises:
        `ValueError`: an unknown column or measure, a score, a condition or a target that cannot be used, or what one
            of the measures cannot work with, see [`Measure.check`].
        `RuntimeError`: a version of TRL that lacks what the score needs.
        [`UnseenParametersError`]: trainable tensors whose gradients would be missed.
    """
    dataset = host.dataset
    if config.num_prompts > len(dataset):
        warnings.warn(
            f"`num_prompts` is {config.num_prompts}, but the training dataset has {len(dataset)} rows: every "
            "prompt that may be chosen will be selected.",
            stacklevel=4,
        )
    for stage in stages_on(dataset, config):
        if cost(stage) >= cost(config):
            raise ValueError(
                f"`candidate_score` is {score_name(stage.score)!r}, which for each prompt takes as much as `score` "
                f"({score_name(config.score)!r}), so there is nothing to save. Choose candidates by a cheaper score, "
                "such as 'column:NAME' before 'confidence', and that before 'learnability'."
            )
        _check(host, stage)
    _check(host, config)


def stages_on(dataset: Dataset, config: LearnAlignConfig) -> list[LearnAlignConfig]:
    """Return the choices of candidates, see [`LearnAlignConfig.stages`], with `where` if that needs columns alone."""
    where = None if needs_measures(dataset, config) else config.where
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [replace(stage, where=where) for stage in config.stages()]


def _check(host, config):
    dataset = host.dataset
    measures = needed(config.ranking().measures)
    longest = getattr(host.args, "max_completion_length", None) or _LONG
    sizes = config.num_rollouts or host.group_size, longest
    randomness = random_state()  # a function of the user's may draw from it
    table, _ = made_up([0], [measure for measure in measures if measure.name != "columns"], *sizes)
    names = [name for measure in measures for name in measure.columns]
    check_columns(dataset, config, {name: table[name].iloc[0] if name in table else 0.0 for name in names})
    if config.quota_column is not None:
        if is_made(config.quota_column):
            check_made(dataset, config.quota_column)
        else:
            check_groups(dataset, "quota_column", config.quota_column)
    load_target(dataset, config)
    rehearse(dataset, config, *sizes)
    set_random_state(randomness)
    if any(measure.price in ("rollouts", "gradients") for measure in measures):
        host.require(GENERATES)
    for measure in measures:
        measure.check(host, config)
