"""The settings of a run, checked when they are set, and explained only in the docstring of the class."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

from datasets import Dataset

from .choice.agreement import check_schedule, check_score, check_success_reward, check_target
from .choice.idle import missing
from .data.conditions import Condition
from .data.rows import dataset_fingerprint
from .ground.knobs import check, explain
from .scores.builtin import Score, find_score, score_name


if TYPE_CHECKING:  # for editors and type checkers; a TrlParser takes one simple type for a field
    import pandas

    ScoreOrFunction: TypeAlias = str | Callable[[pandas.DataFrame], pandas.Series]
    PathOrDataset: TypeAlias = str | Dataset
else:
    ScoreOrFunction = PathOrDataset = str

# Settings that a resumed run may always change: the time of selections, the amount computed at once, and the files
# written. None changes the rule that a selection chooses by
FREE_ON_RESUME = ("reselect_every", "rollout_batch_prompts", "max_tokens_per_batch", "save_rollouts", "write_report")
# Settings of the coming selection, which may change as long as none has chosen a prompt
FREE_BEFORE_SELECTION = (
    *("num_rollouts", "score", "score_measures", "answer_column", "learnability", "success_threshold"),
    *("success_reward", "gradient_rollouts", "projection_dim", "candidate_prompts", "deduplicate"),
    *("target_dataset", "target_column", "where", "quota_column", "quota", "take", "prompt_order", "fold"),
    "selection_seed",
)
# Settings that may change after a selection that fell back to learnability, as nothing could be learnt from the target
FREE_WITHOUT_TARGET = ("num_rollouts", "score", "score_measures", "target_dataset", "target_column")
MAX_PROJECTION_DIM = 1 << 24
# The least value of each integer, and a remedy
_LEAST = {
    "num_prompts": (1, "Set it to the number of prompts to train on."),
    "warmup_prompts": (0, "Set it to 0 for a selection before the first step."),
    "num_rollouts": (2, "A success rate between 0 and 1 needs at least two rollouts."),
    "rollout_batch_prompts": (1, "Use None for as many as the pool allows."),
    "projection_dim": (16, "Leave the default, or use None for exact gradients."),
    "max_tokens_per_batch": (1, "Use None for as many as a training step holds."),
    "candidate_prompts": (1, "Use None to score the whole dataset."),
    "fold": (1, "It is the step through the ranking."),
    "selection_seed": (0, "Use None for the trainer's seed."),
}


@explain
@dataclass
class LearnAlignConfig:
    r"""
    Configuration of [`LearnAlignSampler`] and [`select_prompts`].

    The defaults follow the LearnAlign paper (arXiv 2506.11480) on GSM8K. No field shares a name with one of
    `GRPOConfig`, `ModelConfig` or `ScriptArguments`, so that `TrlParser` can parse all of them together.

    Parameters:
        num_prompts (`int`, *optional*, defaults to `1000`):
            Number of prompts to select, at least 1. If fewer are learnable, all learnable ones are selected, with a
            warning.
        warmup_prompts (`int`, *optional*, defaults to `300`):
            Number of random prompts to train on before the first selection. 0 selects before the first training step.
            Ignored by `select_prompts`; on the command line the default is 0.
        num_rollouts (`int`, *optional*):
            Rollouts for each prompt of the pool, at least 2. By default the trainer's `num_generations`.
        rollout_batch_prompts (`int`, *optional*):
            Prompts that a process generates for at once in a selection, at least 1. By default as many as in training,
            doubled up to six times while the pool has 64 such batches (not with a reward model or sharded weights). In
            every round all processes wait for the longest completion, so fewer, larger rounds are faster. If memory is
            full, generation goes on in halves, unless the weights are sharded. Another batch size gives other
            rollouts.
        score (`str` or `Callable`, *optional*, defaults to `"learnalign"`):
            The number that prompts are ranked by: `"learnalign"` (Eq. 8), `"learnability"` (V alone; no gradients),
            `"alignment"` (Eq. 8 without V), `"random"` (no rollouts), `"target"` (V times the alignment with the mean
            gradient of `target_dataset`, the largest over subtasks: LESS, arXiv 2402.04333), `"target_alignment"` (the
            same without V), `"confidence"` (the nearness of the likelihood of the answer in `answer_column` to the
            mean over the pool: UFO-RL, arXiv 2505.12457; one forward over each prompt, no rollouts), `"pvi"` (the
            bits that the prompt tells of it: arXiv 2507.00038; two forwards), `"column:NAME"`
            (a column of numbers of the dataset; no rollouts), or your own function, as an object or as
            `"file.py:function"`. The function takes a `pandas.DataFrame` with a row per prompt and returns a Series.
            Higher is better; a prompt with NaN is never chosen. Online: `"learnalign"`, `"learnability"`, or
            `"target"`, for which the target is the rows that `target_column` marks.
        score_measures (`list[str]`, *optional*):
            Measures that your own function in `score` needs: `["rollouts"]`, `["gradients"]` (which need rollouts),
            `["likelihood"]` (of the answers), `["hidden_states"]`, or none (the default).
        answer_column (`str`, *optional*):
            Column of the dataset with the right answer to each prompt, texts or numbers, as the policy should write
            it after the prompt. Required by `score="confidence"` and `"pvi"`. On the command line reward functions
            also get the column as `solution`.
        learnability (`str`, *optional*, defaults to `"success_rate"`):
            `"success_rate"`: V = p (1 - p). `"variance"`, for graded rewards: V = the variance of a prompt's rewards,
            scaled to their range over the pool; for rewards of 0 and 1 the two are equal.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout is a success if its reward is at least this value, up to the rounding of float32 (one part in a
            million).
        success_reward (`list[str]` or `str`, *optional*):
            Name of the reward function that decides success. Required with several reward functions. If each task has
            a function of its own, which returns `None` for rows of other tasks, name several: the first that gave a
            rollout a reward decides.
        gradient_rollouts (`str`, *optional*, defaults to `"all"`):
            Rollouts of a group that enter its gradient: `"all"`, or only the first successful one, `"one_correct"`, as
            the paper does on DAPO-MATH-17K to save time.
        projection_dim (`int`, *optional*, defaults to `32768`):
            Length of a gradient feature, 16 to 16,777,216. `None` computes the exact score, without projection.
        max_tokens_per_batch (`int`, *optional*):
            Largest number of tokens in a microbatch when gradients are computed, padding included. By default the
            trainer's `per_device_train_batch_size` times the length of the longest rollout, as in a training step.
        candidate_prompts (`int`, *optional*):
            Score a random part of the dataset of this size, at least `num_prompts`. Each selection of a run draws a
            new one. By default the complete dataset.
        reselect_every (`float`, *optional*):
            Select again after this many passes over the selection (staged RL). More than 0; may be a fraction. By
            default a selection is made once.
        after_warmup (`str`, *optional*, defaults to `"continue"`):
            `"continue"`: training goes on from the policy after the warm-up. `"restart"`: it goes back to the weights
            and the optimizer state that training started with.
        deduplicate (`bool`, *optional*, defaults to `False`):
            Choose only the best-ranked one of all rows with the same prompt. Texts (or messages) and images are
            compared, not answers or other columns: two rows with the same prompt and different answers count as the
            same. All rows are scored, and the warm-up may use any of them. Online: only the first of these rows that
            meets `where` is used.
        target_dataset (`str` or `Dataset`, *optional*):
            For the scores `"target"` and `"target_alignment"`: prompts of the kind that the policy should become good
            at, with the columns of the training dataset. A file, a name of the Hub, or a `datasets.Dataset`. Online
            the target are rows of the training dataset, see `target_column`.
        target_column (`str`, *optional*):
            A column of the target dataset that names the subtask of each row. By default all rows are one task.
            Online, where `score="target"` requires it: a column of True and False of the training dataset, which marks
            the prompts of the kind that the policy should become good at.
        where (`str`, *optional*):
            Choose only prompts that meet this condition on columns of the dataset, on what is measured and on `score`,
            such as `"completion_length_mean < 800 and source != 'forum'"`. A field of a nested column is named
            `extra.level`; `answer is not None` leaves out missing values. If it names only columns of the dataset,
            other prompts are not rolled out.
        quota_column (`str`, *optional*):
            A column of the dataset, or a field such as `extra.split`. Each of its values gets a quota of the chosen
            prompts. A missing value counts as one. Not a column of lists, of fractions, or with another value in every
            row.
        quota (`str`, *optional*, defaults to `"proportional"`):
            `"proportional"`: to the share of a value in the pool. `"equal"`: the same for all values. If a value has
            too few eligible prompts, the others get the rest of its quota.
        take (`str`, *optional*, defaults to `"top"`):
            `"top"`: the best prompts. `"proportional"`: a random draw without replacement, in proportion to the
            scores. Prompts whose score is not above 0 are taken only where others are too few: by rank, with a
            warning.
        prompt_order (`str`, *optional*, defaults to `"shuffle"`):
            The order of prompts in each pass over the selection: `"shuffle"`, a new permutation; `"ranked"`, best
            first; `"folding"`, positions 0, L, 2 L, ... of the ranking, then 1, L + 1, ..., with L = `fold` (DELT,
            arXiv 2506.21545).
        fold (`int`, *optional*, defaults to `3`):
            The step of `prompt_order="folding"`, at least 1.
        save_rollouts (`bool`, *optional*, defaults to `False`):
            Keep all rollouts (online: of training), in `_learnalign/rollouts/`, which is never uploaded.
        write_report (`bool`, *optional*, defaults to `True`):
            Write `report.html` and its figures after every selection, and log the figures to TensorBoard, W&B and
            trackio if `report_to` names them.
        selection_seed (`int`, *optional*):
            Seed of everything random in a selection: rollouts, projection, probe, candidates, ties, the random score.
            By default the trainer's `seed`.
        schedule (`str`, *optional*, defaults to `"staged"`):
            The way prompts are fed to training. `"staged"`: random prompts as a warm-up, then those of a selection.
            `"online"`: every chunk is chosen by learnability, predicted from the rewards of training so far, and, with
            `score="learnalign"`, by the alignment of gradients, predicted from those that training takes. Online
            needs no extra rollouts, and the settings of a selection do not apply. Others: see docs/methods.md.
        prompt_features (`bool`, *optional*, defaults to `True`):
            Online: also use the policy's hidden states of the prompts, to predict the success of prompts not trained
            on yet. This takes one forward through half of the layers when training begins, over the pool or over a
            random part of a large one. Images and prompts that an environment supplies have no such features.
        group_column (`str`, *optional*):
            Online: a column of the dataset, such as a source or a kind, that the prediction may use as a category (or
            `"sec"` and `"dump"` draw from). At most 256 values, no fractions, and not another one in every row.
        pass_rate_column (`str`, *optional*):
            Online: a column with success rates in [0, 1], such as another model's. The prediction begins with it, and
            choosing with the first chunk; both are corrected by the rewards of training.
        drop_dead_groups (`bool`, *optional*, defaults to `True`):
            Asynchronous trainer: leave groups without a gradient out before training gets them.

    Raises:
        `ValueError`: a field has a value out of its range, or one that has no effect together with the others.
    """

    num_prompts: int = 1000
    warmup_prompts: int = 300
    num_rollouts: int | None = None
    rollout_batch_prompts: int | None = None
    score: ScoreOrFunction = "learnalign"
    score_measures: list[str] | None = None
    answer_column: str | None = None
    learnability: Literal["success_rate", "variance"] = "success_rate"
    success_threshold: float = 1.0
    success_reward: list[str] | None | str = None  # noqa: RUF036 in this order the parser takes it for a list
    gradient_rollouts: Literal["all", "one_correct"] = "all"
    projection_dim: int | None = 32768
    max_tokens_per_batch: int | None = None
    candidate_prompts: int | None = None
    reselect_every: float | None = None
    after_warmup: Literal["continue", "restart"] = "continue"
    deduplicate: bool = False
    target_dataset: PathOrDataset | None = None
    target_column: str | None = None
    where: str | None = None
    quota_column: str | None = None
    quota: Literal["proportional", "equal"] = "proportional"
    take: Literal["top", "proportional"] = "top"
    prompt_order: Literal["shuffle", "ranked", "folding"] = "shuffle"
    fold: int = 3
    save_rollouts: bool = False
    write_report: bool = True
    selection_seed: int | None = None
    schedule: Literal["staged", "online", "mopps", "insight", "dps", "greso", "pools", "sec", "dump", "lfr"] = "staged"
    prompt_features: bool = True
    group_column: str | None = None
    pass_rate_column: str | None = None
    drop_dead_groups: bool = True

    # The ranking that was found last, after the settings it was found by; no annotation, so this is no field
    _found = None

    def __post_init__(self) -> None:
        if isinstance(self.score_measures, tuple):  # equal to the list of a command line
            self.score_measures = list(self.score_measures)
        check_success_reward(self)
        for one in fields(self):
            if one.name not in ("score", "target_dataset", "success_reward"):  # each has a check of its own
                check(one, type(self).__annotations__[one.name], getattr(self, one.name), _LEAST)
        if self.projection_dim is not None and self.projection_dim > MAX_PROJECTION_DIM:
            raise ValueError(
                f"`projection_dim` is {self.projection_dim}, but must be at most {MAX_PROJECTION_DIM}. Use None for "
                "exact gradients."
            )
        check_score(self)
        self._found = None  # a file is read anew by every configuration
        self.ranking()
        check_target(self)
        check_schedule(self)
        if self.where is not None:
            Condition(self.where)
        if self.reselect_every is not None and self.reselect_every <= 0:
            raise ValueError(
                f"`reselect_every` is {self.reselect_every}, but a number of passes over the selection must be "
                "positive. Use None to select once."
            )
        if self.candidate_prompts is not None and self.candidate_prompts < self.num_prompts:
            raise ValueError(
                f"`candidate_prompts` ({self.candidate_prompts}) is smaller than `num_prompts` ({self.num_prompts}), "
                "so there would be nothing to choose from. Raise the first or lower the second."
            )

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that the score needs."""
        return self.ranking().requires

    def ranking(self) -> Score:
        """
        Find the score that `score` names. Its file, if there is one, is read when the configuration is made: a later
        edit counts for the next configuration, as with a reward function.
        """
        wanted = self.score, self.score_measures
        if self._found is None or self._found[0] != wanted:
            self._found = wanted, find_score(*wanted)
        return self._found[1]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_found"}

    def changes(self, saved: dict) -> dict[str, tuple]:
        """
        Find the fields whose values differ from `saved`, except those without an effect.

        Args:
            saved (`dict`): fields of another configuration, as [`LearnAlignConfig.to_dict`] returns them.

        Returns:
            `dict[str, tuple]`: the old value of each (the default, if `saved` lacks the field) and the new one.
        """
        was = {one.name: saved.get(one.name, one.default) for one in fields(self)}
        differ = {name: (was[name], value) for name, value in self.to_dict().items() if value != was[name]}
        return {name: values for name, values in differ.items() if missing(self, name) is None}

    def to_dict(self) -> dict:
        """Return the fields as plain values: a function as its name, a dataset as the digest of its rows."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        target = self.target_dataset
        if isinstance(target, Dataset):
            values["target_dataset"] = f"Dataset of {len(target)} rows, {dataset_fingerprint(target)[:16]}"
        return values | {"score": score_name(self.score)}
