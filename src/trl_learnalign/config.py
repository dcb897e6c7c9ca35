"""The settings of a run, checked when they are set, and explained only in the docstring of the class."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from datasets import Dataset

from .choice.agreement import (
    check_densities,
    check_racing,
    check_schedule,
    check_score,
    check_success_reward,
    check_target,
)
from .choice.candidates import check_candidates, stages_of
from .choice.groups import clusters_named
from .choice.idle import missing
from .data.conditions import Condition
from .data.rows import dataset_fingerprint
from .ground.knobs import check, explain
from .scores.builtin import Score, find_score, score_name


if TYPE_CHECKING:  # for editors and type checkers; a TrlParser takes one simple type for a field
    import pandas

    ScoreOrFunction: TypeAlias = str | Callable[[pandas.DataFrame], pandas.Series]
    ScoresOrFunctions: TypeAlias = list[ScoreOrFunction] | ScoreOrFunction | None
    PathOrDataset: TypeAlias = str | Dataset
    Sizes: TypeAlias = list[int] | int | None
else:
    ScoreOrFunction = PathOrDataset = str
    Sizes = list[int] | None
    ScoresOrFunctions = list[str] | None | str  # in this order the parser takes it for a list

# Settings that a resumed run may always change: the time of selections, the amount computed at once, and the files
# written. None changes the rule that a selection chooses by
FREE_ON_RESUME = ("reselect_every", "rollout_batch_prompts", "max_tokens_per_batch", "save_rollouts", "write_report")
# Settings of the coming selection, which may change as long as none has chosen a prompt
FREE_BEFORE_SELECTION = (
    *("num_rollouts", "rollouts", "score", "score_measures", "answer_column", "judge_model", "learnability"),
    *("success_threshold", "success_reward", "gradient_rollouts", "projection_dim", "candidate_prompts"),
    *("candidate_score", "deduplicate", "target_dataset", "target_column", "target_checkpoints"),
    *("gradient_direction", "where", "quota_column", "quota", "take", "prompt_order", "fold", "review_every"),
    *("diversity", "selection_seed"),
)
# Settings that may change after a selection that fell back to learnability, as nothing could be learnt from the target
FREE_WITHOUT_TARGET = ("num_rollouts", "score", "score_measures", "target_dataset", "target_column")
MAX_PROJECTION_DIM = 1 << 24
_CHECKED_APART = ("score", "target_dataset", "success_reward", "candidate_prompts", "candidate_score")
# The least value of each integer, and a remedy
_LEAST = {
    "num_prompts": (1, "Set it to the number of prompts to train on."),
    "warmup_prompts": (0, "Set it to 0 for a selection before the first step."),
    "num_rollouts": (2, "A success rate between 0 and 1 needs at least two rollouts."),
    "rollout_batch_prompts": (1, "Use None for as many as the pool allows."),
    "projection_dim": (16, "Leave the default, or use None for exact gradients."),
    "max_tokens_per_batch": (1, "Use None for as many as a training step holds."),
    "review_every": (2, "Use None for passes that have all prompts."),
    "fold": (1, "It is the step through the chosen prompts."),
    "selection_seed": (0, "Use None for the trainer's seed."),
    "max_refills": (0, "Use 0 for none."),
    "replay_groups": (1, "Set `replay_share=0` for no replay."),
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
        rollouts (`str`, *optional*, defaults to `"all"`):
            `"racing"`: two for every prompt, more for those that may be among the best by p (1 - p).
        rollout_batch_prompts (`int`, *optional*):
            Prompts that a process generates for at once in a selection, at least 1. By default as many as in training,
            doubled up to six times while the pool has 64 such batches (not with a reward model or sharded weights). If
            memory is full, generation goes on in halves, unless they are sharded. Another size gives other rollouts.
        score (`str` or `Callable`, *optional*, defaults to `"learnalign"`):
            The number that prompts are ranked by: `"learnalign"` (Eq. 8), `"learnability"` (V alone; no gradients),
            `"alignment"` (Eq. 8 without V), `"random"`, `"target"` (V times the alignment with the mean gradient of
            `target_dataset`, the largest over subtasks: LESS, arXiv 2402.04333), `"target_alignment"` (without V),
            `"influence"` (on the mean gradient of the pool, or of `target_dataset`: arXiv 2504.13586),
            `"gradient_density"` (inverse), `"density"` (the same of hidden states: arXiv 2402.09668), `"confidence"`
            (UFO-RL, arXiv 2505.12457) and `"pvi"` (arXiv 2507.00038) by the likelihood of `answer_column`, `"ask"`
            (how surely a model says that the prompt is good to train on: Ask-LLM, arXiv 2402.09668), `"demonstration"`
            (how much it helps as a worked example: Data Whisperer, arXiv 2505.12212), `"column:NAME"` (numbers of the
            dataset), or your own function, as an object or as `"file.py:function"`. Random, density and all behind it
            need no rollouts. The function takes a `pandas.DataFrame` with a row per prompt and returns a Series.
            Higher is better; a prompt with NaN is never chosen. Online: `"learnalign"`, `"learnability"`, or
            `"target"` (see `target_column`).
        score_measures (`list[str]`, *optional*):
            Measures that your own function in `score` needs: `["rollouts"]`, `["gradients"]` (which need rollouts),
            `["likelihood"]` (of the answers), `["hidden_states"]`, `["ask"]`, `["demonstration"]`, or none (the
            default).
        answer_column (`str`, *optional*):
            Column of the dataset with the right answer to each prompt, texts or numbers, as the policy should write
            it after the prompt. Required by `score="confidence"`, `"pvi"` and `"demonstration"`. On the command line
            reward functions also get the column as `solution`.
        judge_model (`str`, *optional*):
            For `score="ask"`: path or name of a causal language model that is asked, with its own tokenizer, on the
            device of the policy. By default the policy itself, which must be large enough to judge.
        learnability (`str`, *optional*, defaults to `"success_rate"`):
            `"success_rate"`: V = p (1 - p). `"variance"`, for graded rewards: V = the variance of a prompt's rewards,
            scaled to their range over the pool.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout is a success if its reward is at least this value, up to the rounding of float32.
        success_reward (`list[str]` or `str`, *optional*):
            Name of the reward function that decides success. Required with several reward functions. If each task has
            a function of its own, which returns `None` for rows of other tasks, name several: the first that gave a
            rollout a reward decides.
        gradient_rollouts (`str`, *optional*, defaults to `"all"`):
            Rollouts of a group that enter its gradient: `"all"`, or the first successful one alone, `"one_correct"`.
        projection_dim (`int`, *optional*, defaults to `32768`):
            Length of a gradient feature, 16 to 16,777,216. `None` computes the exact score, without projection.
        max_tokens_per_batch (`int`, *optional*):
            Most tokens in a microbatch of gradients, padding included. By default the trainer's
            `per_device_train_batch_size` times the longest rollout, as in a training step.
        candidate_prompts (`list[int]` or `int`, *optional*):
            Score a part of the dataset of this size: the best by `candidate_score`, else a new random one each time.
        candidate_score (`list[str]` or `str` or `Callable`, *optional*):
            A score cheaper than `score`, which chooses the `candidate_prompts`; or several, with a size each.
        reselect_every (`float`, *optional*):
            Select again after this many passes over the selection (staged RL), a number above 0. By default once.
        review_every (`int`, *optional*):
            Leave solved prompts out of the passes over the selection, but for every so many (LFR, arXiv 2409.06131).
        after_warmup (`str`, *optional*, defaults to `"continue"`):
            `"continue"`: training goes on from the policy after the warm-up. `"restart"`: it goes back to the weights
            and the optimizer state that training started with.
        deduplicate (`bool`, *optional*, defaults to `False`):
            Choose only the best-ranked one of all rows with the same prompt (text or messages, and images), whatever
            their answers. All rows are scored, and the warm-up may use any of them. Online: only the first of these
            rows that meets `where` is used.
        target_dataset (`str` or `Dataset`, *optional*):
            Prompts of the kind to become good at, for `score="target"`, `"target_alignment"` or `"influence"`, with
            the columns of the training dataset. A file, a name of the Hub, or a `Dataset`. Online see `target_column`.
        target_column (`str`, *optional*):
            A column of the target dataset that names the subtask of each row. By default all are one task. Online,
            for `score="target"`: a column of True and False of the training dataset, which marks the target.
        target_checkpoints (`list[str]`, *optional*):
            For `"target"` and `"target_alignment"`: saved checkpoints of this adapter, at which gradients are taken of
            the same rollouts, weighted by learning rates. By default the policy.
        gradient_direction (`str`, *optional*, defaults to `"plain"`):
            For these scores: `"adam"` makes of a prompt's gradient the step that Adam, after the warm-up or at the
            checkpoints, would take for it.
        where (`str`, *optional*):
            Choose only prompts that meet this condition on columns of the dataset, on what is measured and on `score`,
            such as `"completion_length_mean < 800 and source != 'forum'"`. A field of a nested column is named
            `extra.level`; `answer is not None` leaves out missing values. If it names only columns of the dataset,
            other prompts are not rolled out.
        quota_column (`str`, *optional*):
            A column of the dataset, or a field such as `extra.split`. Each of its values gets a quota of the chosen
            prompts, a missing one as well. Not a column of lists, of fractions, or with another value in every row. Or
            `"grade:A,B"`, by the mean of success rates in columns, or `"clusters:8"`, of hidden states.
        quota (`str`, *optional*, defaults to `"proportional"`):
            `"proportional"`: to the share of a value in the pool. `"equal"`: the same for all values. The others get
            what a value with too few prompts leaves.
        diversity (`str`, *optional*):
            Near-duplicates share their score: it is divided (below 0 multiplied) by the number of prompts alike, by
            their `"hidden_states"` (a forward over each) or `"gradients"` (if the score needs rollouts).
        take (`str`, *optional*, defaults to `"top"`):
            `"top"`: the best prompts. `"proportional"`: a random draw without replacement, in proportion to the
            scores. Prompts whose score is not above 0 are taken only where others are too few, by rank.
        prompt_order (`str`, *optional*, defaults to `"shuffle"`):
            The order of prompts in each pass over the selection: `"shuffle"`, a new permutation; `"ranked"`, best
            first; `"folding"`, positions 0, L, 2 L, ... from the lowest score up, then 1, L + 1, ..., with L = `fold`
            (DELT, arXiv 2506.21545).
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
            on yet: one forward through half of the layers when training begins, over the pool or a random part of a
            large one. Not of images, nor of prompts that an environment supplies.
        group_column (`str`, *optional*):
            Online: a column of the dataset, such as a source or a kind, that the prediction may use as a category (or
            `"sec"` and `"dump"` draw from). At most 256 values, no fractions, and not another one in every row.
        pass_rate_column (`str`, *optional*):
            Online: a column with success rates in [0, 1], such as another model's. The prediction begins with it, and
            choosing with the first chunk.
        drop_dead_groups (`bool`, *optional*, defaults to `True`):
            Asynchronous trainer: leave groups without a gradient out before training gets them.
        max_refills (`int`, *optional*, defaults to `0`):
            Not staged: replace groups without a gradient by those of new prompts, generated at once, at most so many
            times a chunk (DAPO, arXiv 2503.14476).
        replay_share (`float`, *optional*, defaults to `0.0`):
            Not staged: share of each chunk that is not generated: earlier groups with a gradient are trained on again,
            their ratios taken against the policy that drew them (DOTS, arXiv 2506.05316).
        replay_groups (`int`, *optional*, defaults to `64`):
            Groups that are kept for `replay_share`, the last ones, at least 1.

    Raises:
        `ValueError`: a field has a value out of its range, or one that has no effect together with the others.
    """

    num_prompts: int = 1000
    warmup_prompts: int = 300
    num_rollouts: int | None = None
    rollouts: Literal["all", "racing"] = "all"
    rollout_batch_prompts: int | None = None
    score: ScoreOrFunction = "learnalign"
    score_measures: list[str] | None = None
    answer_column: str | None = None
    judge_model: str | None = None
    learnability: Literal["success_rate", "variance"] = "success_rate"
    success_threshold: float = 1.0
    success_reward: list[str] | None | str = None  # noqa: RUF036 in this order the parser takes it for a list
    gradient_rollouts: Literal["all", "one_correct"] = "all"
    projection_dim: int | None = 32768
    max_tokens_per_batch: int | None = None
    candidate_prompts: Sizes = None
    candidate_score: ScoresOrFunctions = None
    reselect_every: float | None = None
    review_every: int | None = None
    after_warmup: Literal["continue", "restart"] = "continue"
    deduplicate: bool = False
    target_dataset: PathOrDataset | None = None
    target_column: str | None = None
    target_checkpoints: list[str] | None = None
    gradient_direction: Literal["plain", "adam"] = "plain"
    where: str | None = None
    quota_column: str | None = None
    quota: Literal["proportional", "equal"] = "proportional"
    diversity: Literal["hidden_states", "gradients"] | None = None
    take: Literal["top", "proportional"] = "top"
    prompt_order: Literal["shuffle", "ranked", "folding"] = "shuffle"
    fold: int = 3
    save_rollouts: bool = False
    write_report: bool = True
    selection_seed: int | None = None
    # fmt: off
    schedule: Literal[
        "staged", "online", "mopps", "insight", "dps", "greso", "pools", "sec", "dump", "lfr",
        "adept", "adept_thompson",
    ] = "staged"
    # fmt: on
    prompt_features: bool = True
    group_column: str | None = None
    pass_rate_column: str | None = None
    drop_dead_groups: bool = True
    max_refills: int = 0
    replay_share: float = 0.0
    replay_groups: int = 64

    # The ranking that was found last, after the settings it was found by, and the stages of the funnel; no annotation,
    # so these are no fields
    _found = None
    _stages = None

    def __post_init__(self) -> None:
        if isinstance(self.score_measures, tuple):  # equal to the list of a command line
            self.score_measures = list(self.score_measures)
        check_success_reward(self)
        for one in fields(self):
            if one.name not in _CHECKED_APART:
                check(one, type(self).__annotations__[one.name], getattr(self, one.name), _LEAST)
        if self.projection_dim is not None and self.projection_dim > MAX_PROJECTION_DIM:
            raise ValueError(
                f"`projection_dim` is {self.projection_dim}, but must be at most {MAX_PROJECTION_DIM}. Use None for "
                "exact gradients."
            )
        check_score(self)
        self._found = None  # a file is read anew by every configuration
        self.ranking()
        check_candidates(self)
        self._stages = None
        check_target(self)
        check_schedule(self)
        check_densities(self)
        check_racing(self)
        self.stages()
        if self.where is not None:
            Condition(self.where)
        if self.reselect_every is not None and self.reselect_every <= 0:
            raise ValueError(
                f"`reselect_every` is {self.reselect_every}, but a number of passes over the selection must be "
                "positive. Use None to select once."
            )
        if not 0 <= self.replay_share < 1:
            raise ValueError(
                f"`replay_share` is {self.replay_share}, but a share of a chunk is at least 0 and less than 1. Use 0 "
                "for no replay."
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
        wanted = self.score, self.score_measures, self.diversity, self.target_dataset is not None
        if self._found is None or self._found[0] != wanted:
            self._found = wanted, find_score(*wanted)
        return self.with_groups(self._found[1])

    def with_groups(self, score: Score) -> Score:
        """Return a score that also needs what the groups of `quota_column` are made of."""
        if clusters_named(self.quota_column) is None or "hidden_states" in score.requires:
            return score
        return replace(score, requires=(*score.requires, "hidden_states"))

    def stages(self) -> "list[LearnAlignConfig]":
        """
        Return a configuration for each choice of candidates by `candidate_score`, in their order: `score` and
        `num_prompts` are of that choice.
        """
        wanted = self.candidate_score, self.candidate_prompts
        if self._stages is None or self._stages[0] != wanted:
            self._stages = wanted, stages_of(self)
        return self._stages[1]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_found", "_stages")}

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
        if isinstance(candidates := self.candidate_score, list):
            values["candidate_score"] = [score_name(one) for one in candidates]
        elif candidates is not None:
            values["candidate_score"] = score_name(candidates)
        return values | {"score": score_name(self.score)}
