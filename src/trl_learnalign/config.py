"""The settings of a selection, validated when they are set."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from datasets import Dataset

from .choice import QUOTAS, TAKES, Condition
from .scores import OWN_MEASURES, SCORES, find_score, score_name


ORDERS = ("shuffle", "ranked", "folding")
LEARNABILITIES = ("success_rate", "variance")
GRADIENT_ROLLOUTS = ("all", "one_correct")
AFTER_WARMUP = ("continue", "restart")
# What a resumed run may change. The first decides when prompts are selected again; none changes what a selection chooses
FREE_ON_RESUME = ("reselect_every", "max_tokens_per_batch", "save_rollouts", "write_report")
MAX_PROJECTION_DIM = 1 << 24


@dataclass
class LearnAlignConfig:
    r"""
    Configuration of [`LearnAlignSampler`] and [`select_prompts`].

    The defaults follow the LearnAlign paper (arXiv 2506.11480) on GSM8K. No field shares a name with one of
    `GRPOConfig`, `ModelConfig` or `ScriptArguments`, so that `TrlParser` can parse all of them together.

    Parameters:
        num_prompts (`int`, *optional*, defaults to `1000`):
            Number of prompts to select.
        warmup_prompts (`int`, *optional*, defaults to `300`):
            Number of random prompts to train on before the first selection. With `0` the selection runs before the
            first training step. Ignored by [`select_prompts`].
        num_rollouts (`int`, *optional*):
            Rollouts per pool prompt. Defaults to the trainer's `num_generations`.
        rollout_batch_prompts (`int`, *optional*):
            Prompts that a process generates for at once in a selection. By default as many as in training, doubled while the pool
            has 64 such batches and at most 64 times. More at once are faster: all processes wait for the longest completion
            of each round. The rollouts depend on it.
        score (`str` or `Callable`, *optional*, defaults to `"learnalign"`):
            What prompts are ranked on: `"learnalign"` (Eq. 8), `"learnability"` (V alone, no gradients are
            computed), `"alignment"` (Eq. 8 without V) or `"random"` (no rollouts); `"column:NAME"`, a column of numbers of the
            dataset (no rollouts); or a function of yours, as it is or as `"file.py:function"`. It takes a
            `pandas.DataFrame` with a row per prompt and returns a Series, higher is better, NaN never chosen.
        score_measures (`list[str]`, *optional*):
            What a function of yours needs: `["rollouts"]`, `["gradients"]` (which need rollouts), or nothing, the default.
        learnability (`str`, *optional*, defaults to `"success_rate"`):
            `"success_rate"`: V = p (1 - p). `"variance"`: V = the variance of a prompt's rewards after the rewards
            of the pool have been scaled to [0, 1], for graded rewards; equal to the former for rewards of 0 and 1.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout is a success if its reward is at least this value.
        success_reward (`str`, *optional*):
            Name of the reward function that decides success. Required with several reward functions.
        gradient_rollouts (`str`, *optional*, defaults to `"all"`):
            Rollouts of a group that enter its gradient: `"all"`, or `"one_correct"` (the first successful one).
        projection_dim (`int`, *optional*, defaults to `32768`):
            Length of a gradient feature. `None` computes the exact score, without projection.
        max_tokens_per_batch (`int`, *optional*):
            Largest number of tokens in a microbatch of the gradient pass, padding included. By default the trainer's
            `per_device_train_batch_size` times the length of the longest rollout, as in a training step.
        candidate_prompts (`int`, *optional*):
            Score a random part of the dataset of this size. By default all of it.
        reselect_every (`float`, *optional*):
            Select again after this many passes over the selection. By default a selection is made once.
        after_warmup (`str`, *optional*, defaults to `"continue"`):
            `"continue"` goes on from the warmed-up policy; `"restart"` goes back to the weights and the optimizer
            state that training started with.
        deduplicate (`bool`, *optional*, defaults to `False`):
            Of rows with the same prompt choose only the best-ranked one. Prompts are compared by their text or messages
            (and their images), not by their answers or other columns.
        target_dataset (`str` or `Dataset`, *optional*):
            Prompts of what the policy is to become good at, with the columns of the training dataset: a file, a name of the Hub, or
            a `datasets.Dataset`. Required by `score="target"` (V times the alignment with the target's mean gradient, the largest
            over subtasks: LESS, arXiv 2402.04333) and `"target_alignment"` (the same without V).
        target_column (`str`, *optional*):
            A column of the target dataset that names the subtask of each row. Without it there is one.
        where (`str`, *optional*):
            Choose only prompts for which this holds, a condition on columns of the dataset and of the scores such as
            `"completion_length_mean < 800 and source != 'forum'"`. If it needs columns of the dataset alone, other prompts are
            not rolled out.
        quota_column (`str`, *optional*):
            A column of the dataset whose values each get a quota of the chosen prompts.
        quota (`str`, *optional*, defaults to `"proportional"`):
            `"proportional"` to the share of a value in the pool, or `"equal"`. What a value without enough eligible prompts leaves
            over goes to the others.
        take (`str`, *optional*, defaults to `"top"`):
            `"top"`: the best prompts; `"proportional"`: a draw without replacement in proportion to the scores.
        prompt_order (`str`, *optional*, defaults to `"shuffle"`):
            The order of each epoch over the selection: `"shuffle"`, a new permutation; `"ranked"`, best first; `"folding"`,
            positions 0, L, 2 L, ... of the ranking, then 1, L + 1, ..., with L = `fold` (DELT, arXiv 2506.21545).
        fold (`int`, *optional*, defaults to `3`):
            See `prompt_order`.
        save_rollouts (`bool`, *optional*, defaults to `False`):
            Write `rollouts.parquet` next to `scores.parquet`.
        write_report (`bool`, *optional*, defaults to `True`):
            Write `report.html` and its figures after every selection, and log the figures where `report_to` says.
        selection_seed (`int`, *optional*):
            Seed of all that is random in a selection. Defaults to the trainer's `seed`.

    Raises:
        `ValueError`: a field has a value out of its range.
    """

    num_prompts: int = field(default=1000, metadata={"help": "Number of prompts to select."})
    warmup_prompts: int = field(
        default=300, metadata={"help": "Number of random prompts to train on before the first selection."}
    )
    num_rollouts: int | None = field(
        default=None, metadata={"help": "Rollouts per pool prompt. Defaults to the trainer's `num_generations`."}
    )
    rollout_batch_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Prompts that a process generates for at once in a selection. By default more than in training."
        },
    )
    score: str = field(
        default="learnalign",
        metadata={
            "help": f"What prompts are ranked on: {', '.join(SCORES)}, `column:NAME` for a column of the dataset, or "
            "`file.py:function` for a function of a table."
        },
    )
    score_measures: list[str] | None = field(
        default=None, metadata={"help": "What a function in `score` needs: rollouts, gradients, or nothing."}
    )
    learnability: str = field(
        default="success_rate",
        metadata={
            "help": "`success_rate`: p(1-p). `variance`: the variance of the reward scaled to its range.",
            "choices": list(LEARNABILITIES),
        },
    )
    success_threshold: float = field(
        default=1.0, metadata={"help": "A rollout is a success if its reward is at least this value."}
    )
    success_reward: str | None = field(
        default=None,
        metadata={"help": "Name of the reward function that decides success. Required with several."},
    )
    gradient_rollouts: str = field(
        default="all",
        metadata={
            "help": "Rollouts of a group that enter its gradient: all, or the first successful one.",
            "choices": list(GRADIENT_ROLLOUTS),
        },
    )
    projection_dim: int | None = field(
        default=32768, metadata={"help": "Length of a gradient feature. `None`: exact, without projection."}
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Largest number of tokens in a microbatch of the gradient pass, padding included."},
    )
    candidate_prompts: int | None = field(
        default=None, metadata={"help": "Score a random part of the dataset of this size."}
    )
    reselect_every: float | None = field(
        default=None, metadata={"help": "Select again after this many passes over the selection."}
    )
    after_warmup: str = field(
        default="continue",
        metadata={
            "help": "Go on from the warmed-up policy, or restart from the weights that training started with.",
            "choices": list(AFTER_WARMUP),
        },
    )
    deduplicate: bool = field(
        default=False, metadata={"help": "Of rows with the same prompt choose only the best-ranked one."}
    )
    target_dataset: str | None = field(
        default=None,
        metadata={"help": "Prompts of what the policy is to become good at: a file or a name of the Hub."},
    )
    target_column: str | None = field(
        default=None, metadata={"help": "A column of the target dataset that names the subtask of each row."}
    )
    where: str | None = field(
        default=None,
        metadata={
            "help": "Choose only prompts for which this condition on columns of the dataset and the scores holds."
        },
    )
    quota_column: str | None = field(
        default=None, metadata={"help": "A column of the dataset whose values each get a quota of the chosen prompts."}
    )
    quota: str = field(
        default="proportional",
        metadata={"help": "A quota in proportion to the pool, or equal ones.", "choices": list(QUOTAS)},
    )
    take: str = field(
        default="top",
        metadata={"help": "The best prompts, or a draw in proportion to the scores.", "choices": list(TAKES)},
    )
    prompt_order: str = field(
        default="shuffle",
        metadata={
            "help": "Order of each epoch over the selection: shuffled, best first, or every `fold`-th of the ranking.",
            "choices": list(ORDERS),
        },
    )
    fold: int = field(default=3, metadata={"help": "Step through the ranking with `prompt_order='folding'`."})
    save_rollouts: bool = field(default=False, metadata={"help": "Write rollouts.parquet next to scores.parquet."})
    write_report: bool = field(
        default=True, metadata={"help": "Write report.html and its figures after every selection."}
    )
    selection_seed: int | None = field(
        default=None, metadata={"help": "Seed of all that is random in a selection. Defaults to the trainer's seed."}
    )

    def __post_init__(self):
        _check_integer("num_prompts", self.num_prompts, 1, "Set it to the number of prompts to train on.")
        _check_integer("warmup_prompts", self.warmup_prompts, 0, "Set it to 0 for a selection before the first step.")
        for name, least, remedy in (
            ("num_rollouts", 2, "A success rate between 0 and 1 needs at least two rollouts."),
            ("rollout_batch_prompts", 1, "Use None for as many as the pool allows."),
            ("projection_dim", 16, "Leave the default, or use None for exact gradients."),
            ("max_tokens_per_batch", 1, "Use None for as many as a training step holds."),
            ("candidate_prompts", 1, "Use None to score the whole dataset."),
            ("selection_seed", 0, "Use None for the trainer's seed."),
        ):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), least, remedy)
        for name, choices in (
            ("quota", QUOTAS),
            ("take", TAKES),
            ("prompt_order", ORDERS),
            ("learnability", LEARNABILITIES),
            ("gradient_rollouts", GRADIENT_ROLLOUTS),
            ("after_warmup", AFTER_WARMUP),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
        if self.projection_dim is not None and self.projection_dim > MAX_PROJECTION_DIM:
            raise ValueError(
                f"`projection_dim` is {self.projection_dim}, but must be at most {MAX_PROJECTION_DIM}. Use None for exact "
                "gradients."
            )
        if self.success_reward is not None and not isinstance(self.success_reward, str):
            raise ValueError(
                f"`success_reward` must be the name of a reward function, but is {self.success_reward!r}. Use None if there "
                "is only one."
            )
        self._check_score()
        _check_integer("fold", self.fold, 1, "It is the step through the ranking.")
        self._check_target()
        for name in ("target_column", "where", "quota_column"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be a text, but is {getattr(self, name)!r}. Use None for none.")
        if self.where is not None:
            Condition(self.where)
        for name in ("deduplicate", "save_rollouts", "write_report"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, but is {getattr(self, name)!r}.")
        _check_number("success_threshold", self.success_threshold)
        if self.reselect_every is not None:
            _check_number("reselect_every", self.reselect_every)
            if self.reselect_every <= 0:
                raise ValueError(
                    f"`reselect_every` is {self.reselect_every}, but a number of passes over the selection must be "
                    "positive. Use None to select once."
                )
        if self.candidate_prompts is not None and self.candidate_prompts < self.num_prompts:
            raise ValueError(
                f"`candidate_prompts` ({self.candidate_prompts}) is smaller than `num_prompts` ({self.num_prompts}), "
                "so there would be nothing to choose from. Raise the first or lower the second."
            )

    def _check_score(self):
        if not isinstance(self.score, str | Callable):
            raise ValueError(
                f"`score` is {self.score!r}, but must be one of {', '.join(SCORES)}, `column:NAME`, or a function."
            )
        measures = self.score_measures
        if measures is not None and (not isinstance(measures, list | tuple) or set(measures) - set(OWN_MEASURES)):
            raise ValueError(f"`score_measures` must be a list of {', '.join(OWN_MEASURES)}, but is {measures!r}.")
        if measures is not None and isinstance(self.score, str) and (self.score in SCORES or ".py:" not in self.score):
            raise ValueError(
                f"`score_measures` is {measures!r}, but is for functions of yours, and `score` is {self.score!r}. Leave it out."
            )
        find_score(self.score, measures)

    def _check_target(self):
        if self.target_dataset is not None and not isinstance(self.target_dataset, str | Dataset):
            raise ValueError(
                f"`target_dataset` must be a path, a name of the Hub or a Dataset, but is a {type(self.target_dataset).__name__}."
            )
        if ("target" in self.measures) != (self.target_dataset is not None):
            have = "is not set" if self.target_dataset is None else "is set"
            raise ValueError(
                f"`score` is {score_name(self.score)!r}, but `target_dataset` {have}. The scores `target` and `target_alignment` need it, "
                "the others do not use it."
            )
        if self.target_column is not None and self.target_dataset is None:
            raise ValueError(
                "`target_column` is a column of the target dataset, but there is none. Set `target_dataset`."
            )

    @property
    def measures(self) -> tuple[str, ...]:
        """What the score needs: `"rollouts"`, `"gradients"`, both or nothing."""
        return find_score(self.score, self.score_measures).requires

    def changes(self, saved: dict) -> dict[str, tuple]:
        """Fields whose values differ from `saved`: the old value (the default, if `saved` lacks the field) and the new one."""
        was = {one.name: saved.get(one.name, one.default) for one in fields(self)}
        return {name: (was[name], value) for name, value in self.to_dict().items() if value != was[name]}

    def to_dict(self) -> dict:
        """The fields as a dictionary of plain values; a function by its name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        target = self.target_dataset
        if isinstance(target, Dataset):
            values["target_dataset"] = f"Dataset of {len(target)} rows"
        return values | {"score": score_name(self.score)}


def _check_integer(name, value, least, remedy):
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be an integer, but is {value!r}. {remedy}")
    if value < least:
        raise ValueError(f"`{name}` is {value}, but must be at least {least}. {remedy}")


def _check_number(name, value):
    # An integer too large for a float is not finite either
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")
