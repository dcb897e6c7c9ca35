"""Settings that must agree with each other, or be of a kind: checks of a configuration."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from datasets import Dataset

from ..scores.builtin import SCORES, score_name
from .idle import missing


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


def check_success_reward(config: "LearnAlignConfig") -> None:
    """Make one name of a list of one; raise a `ValueError` unless it is a name, a list of names or `None`."""
    names = config.success_reward
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        # A command line makes a list of one name
        config.success_reward = names[0] if len(names) == 1 else list(names)
    elif names is not None and not isinstance(names, str):
        raise ValueError(
            f"`success_reward` must be the name of a reward function, or a list of names, but is {names!r}. Use "
            "None if there is only one."
        )


def check_score(config: "LearnAlignConfig") -> None:
    """Raise a `ValueError` for a score of another kind, and for measures of a score that names its own."""
    if not isinstance(config.score, str | Callable):
        raise ValueError(
            f"`score` is {config.score!r}, but must be one of {', '.join(SCORES)}, `column:NAME`, or a function."
        )
    measures, score = config.score_measures, config.score
    if measures is not None and not (isinstance(measures, list) and all(isinstance(one, str) for one in measures)):
        raise ValueError(f"`score_measures` must be a list of names of measures, but is {measures!r}.")
    if measures is not None and isinstance(score, str) and (score in SCORES or ".py:" not in score):
        raise ValueError(
            f"`score_measures` is {measures!r}, but is only for your own functions, and `score` is "
            f"{score!r}. Leave it out."
        )


def check_schedule(config: "LearnAlignConfig") -> None:
    """
    Refuse settings that would have no effect, and a score that the schedule cannot use. Settings that only the
    score makes idle cause a warning.
    """
    for one in fields(config):
        value, lacks = getattr(config, one.name), missing(config, one.name)
        if value != one.default and lacks is not None:
            idle = lacks.idle.format(
                score=score_name(config.score), prompt_order=config.prompt_order, schedule=config.schedule
            )
            text = f"`{one.name}` is {value!r}, but has no effect {idle}. Leave it out, or {lacks.remedy}."
            if lacks.refused:
                raise ValueError(text)
            warnings.warn(text, stacklevel=4)
    if config.schedule in ("sec", "dump") and config.group_column is None:
        raise ValueError(
            f"`schedule` is {config.schedule!r}, which draws among groups, but `group_column` is not set. "
            "Name a column with the source or kind of each prompt."
        )
    if config.schedule == "online" and config.score not in ("learnalign", "learnability", "target"):
        raise ValueError(
            f"`score` is {score_name(config.score)!r}, but `schedule='online'` chooses by predicted learnability. "
            "Leave `score` out, or train online on the rows of a selection that was made with that score before."
        )


def check_densities(config: "LearnAlignConfig") -> None:
    """Raise a `ValueError` for a diversity that the score cannot have, and for gradients that would not be kept."""
    score, diversity = score_name(config.score), config.diversity
    if diversity is not None and config.score in ("density", "gradient_density"):
        raise ValueError(
            f"`diversity` is {diversity!r}, but `score={score!r}` is an inverse density by itself, so prompts that "
            "are alike would be held back twice. Leave `diversity` out."
        )
    if diversity == "gradients" and not ("rollouts" in config.measures or config.ranking().at_random):
        raise ValueError(
            f"`diversity` is 'gradients', but `score` is {score!r}, which needs no rollouts, and gradients are of "
            "rollouts. Use `diversity='hidden_states'`, or a score from rollouts, such as 'learnability'."
        )
    if config.projection_dim is None and ("gradient_density" in config.measures or config.score == "influence"):
        needs = "`diversity='gradients'`" if diversity == "gradients" else f"`score={score!r}`"
        raise ValueError(
            f"`projection_dim` is None, with which gradients may be too large to be kept, but {needs} reads them more "
            "than once. Leave `projection_dim` at its default."
        )


_WITHOUT_V = ("alignment", "target_alignment", "influence", "gradient_density")


def check_racing(config: "LearnAlignConfig") -> None:
    """Raise a `ValueError` for a race together with settings that do not choose the prompts of greatest V."""
    if config.rollouts != "racing" or "rollouts" not in config.measures:
        return
    for name, wrong, why in (
        ("score", config.score in _WITHOUT_V, "ranks without V, by which a race leaves out"),
        ("learnability", config.learnability != "success_rate", "is no success rate, which a race counts"),
        ("diversity", config.diversity is not None, "changes the ranking, by which a race leaves out"),
        ("take", config.take != "top", "may draw any prompt, and a race rolls out the best ones alone"),
        ("quota_column", config.quota_column is not None, "takes others than the best, which a race leaves out"),
    ):
        if wrong:
            raise ValueError(
                f"`rollouts` is 'racing', but `{name}={getattr(config, name)!r}` {why}. Leave one of them out."
            )


def check_target(config: "LearnAlignConfig") -> None:
    """Raise a `ValueError` for a target that the score lacks, or does not look at."""
    if config.target_dataset is not None and not isinstance(config.target_dataset, str | Dataset):
        raise ValueError(
            "`target_dataset` must be a path, a name of the Hub or a Dataset, but is a "
            f"{type(config.target_dataset).__name__}."
        )
    paths = config.target_checkpoints
    texts = isinstance(paths, list) and all(isinstance(one, str) for one in paths)
    if paths is not None and not (texts and 0 < len(paths) == len({*paths})):
        raise ValueError(
            f"`target_checkpoints` must be a list of one or more directories, each once, but is {paths!r}. Use None "
            "for the policy as it is."
        )
    if config.schedule == "online":
        _target_online(config)
        return
    if ("target-gradients" in config.measures) != (config.target_dataset is not None):
        have = "is not set" if config.target_dataset is None else "is set"
        raise ValueError(
            f"`score` is {score_name(config.score)!r}, but `target_dataset` {have}. The scores `target` and "
            "`target_alignment` need it, `influence` may have it, the others do not use it."
        )
    if config.target_column is not None and config.target_dataset is None:
        raise ValueError("`target_column` is a column of the target dataset, but there is none. Set `target_dataset`.")


def _target_online(config: "LearnAlignConfig") -> None:
    if config.target_dataset is not None:
        raise ValueError(
            "`target_dataset` is set, but with `schedule='online'` the target must be rows of the training "
            "dataset, as its gradients are those of training. Mark the rows of both, concatenate them, and set "
            "`score='target'` and `target_column='is_target'`: `parts = train.add_column('is_target', [False] * "
            "len(train)), target.add_column('is_target', [True] * len(target))`, then `train_dataset="
            "concatenate_datasets(parts)`."
        )
    if config.score == "target_alignment":
        raise ValueError(
            "`score` is 'target_alignment', but with `schedule='online'` alignment alone cannot choose: a prompt "
            "that is always or never solved has no gradient, whatever is predicted of it. Use `score='target'`, "
            "which multiplies by learnability."
        )
    if config.score == "target" and config.target_column is None:
        raise ValueError(
            "`score` is 'target', but `target_column` is not set. With `schedule='online'` it names a column of "
            "True and False of the training dataset, which marks the rows of the target."
        )
    if config.target_column is not None and config.score in ("learnalign", "learnability"):
        raise ValueError(
            f"`target_column` is {config.target_column!r}, but `score={config.score!r}` does not look at a target. "
            "Set `score='target'`, or leave `target_column` out."
        )
