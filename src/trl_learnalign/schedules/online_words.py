"""Lines about an online run for its output and its model card, and warnings."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..curriculum.judge import Judge
from ..curriculum.report import WARNINGS, read_kinds
from ..curriculum.rewards import doubtful_threshold
from ..report.online_kinds import warnings_of
from ..selection.excerpt import prompt_texts
from ..selection.warnings import threshold_warning
from ..selection.words import live_shares


if TYPE_CHECKING:
    from ..curriculum import OnlineCurriculum
    from ..curriculum.scored import Scored
    from ..curriculum.target import Target
    from .online import OnlineSchedule

KINDS = ("without a deciding reward", "without a weight", "cut off")  # of warnings about groups that say nothing
LEAST_PROMPTS = 8  # of an optimizer step, below which a warning is given
_MANY_MASKED = 0.5  # share of the completions that is worth a warning, whether or not a whole group is masked


def switch_line(draw: int, judge: Judge, target: "Target | None" = None) -> str:
    """
    Return the line that is printed when a schedule starts or stops choosing.

    Args:
        draw (`int`): number of the first draw that is chosen, or drawn uniformly.
        judge ([`Judge`]): decided so.
        target ([`Target`], *optional*): what prompts are chosen for.
    """
    start = f"LearnAlign, after {draw:,} prompts: from now on"
    if judge.choosing:
        known = f"skill {judge.skill:.2f}"
        aim = f" for the target of {counted(len(target.rows), 'row')}" if target is not None else ""
        if judge.trusted:
            known = f"by the success rates known beforehand, which {judge.wait} random prompts are to confirm"
        return (
            f"{start} prompts are chosen by predicted learnability{aim}: their expected utility is "
            f"{judge.headroom:.1f} x that of random prompts ({known})."
        )
    patience = f"for {judge.settings.patience} prompts"
    if judge.without_gain < judge.settings.patience and not judge.has_skill:
        return (
            f"{start} draws are uniform: random prompts did not confirm the success rates known beforehand (skill "
            f"{judge.skill:.2f} on {judge.wait} or more). Choosing begins again when success is predicted well enough."
        )
    if not (judge.has_skill or judge.trusted):
        return (
            f"{start} draws are uniform: the prediction of success was hardly better than the mean {patience} "
            f"(skill {judge.skill:.2f})."
        )
    return f"{start} draws are uniform: choosing promised little {patience} (headroom {judge.headroom:.2f})."


def summary_lines(schedule: "OnlineSchedule") -> list[str]:
    """Return sentences about the run for a model card; none before the first observation."""
    curriculum = schedule.curriculum
    history, counts, observed = curriculum.history, curriculum.memory.counts(), curriculum.history.observed
    if not observed:
        return []
    chosen, uniform, draws = live_shares(history.column)
    lines = [
        f"{counts['visited']:,} of {len(schedule.pool):,} prompts were trained on, in {counted(observed, 'group')} of "
        f"{schedule.run.group_size} rollouts.",
        f"Prompts were chosen for {history.choosing_share:.0%} of the groups, and drawn uniformly for the others.",
    ]
    if not np.isfinite(chosen):
        lines.append(f"{uniform:.0%} of the groups were live (they had a gradient).")
    elif draws:
        lines.append(
            f"Where prompts were chosen, {chosen:.0%} of their groups were live (they had a gradient), against "
            f"{uniform:.0%} of those drawn uniformly beside them ({draws:,.0f})."
        )
    if not schedule.settings.graded:
        by_all, by_none = curriculum.memory.solved_by()
        lines.append(f"{by_all:,} prompts were solved by all of their rollouts so far, and {by_none:,} by none.")
    if curriculum.target is not None:
        target = curriculum.target
        lines.append(
            f"Prompts were chosen for a target of {counted(len(target.rows), 'row')}, {target.share:.1%} of the pool, "
            f"which had {target.share_drawn:.1%} of the groups."
        )
    if counts["unscored"]:
        lines.append(
            f"{counts['unscored']:,} prompts had no reward that decides success, or no token in the loss, at their "
            "last visit."
        )
    return lines


def plan_lines(schedule: "OnlineSchedule", step: int, max_steps: int) -> list[str]:
    """Return three lines for the start of a run, four where there is a target; see [`Describes.plan`]."""
    layout = schedule.layout
    prompts, pool = layout.prompts_trained(max_steps), len(schedule.pool)
    number, visits = f"{prompts:,.0f} prompts in all, {layout.chunk_prompts} at once", f"{prompts / pool:.2f} visits"
    if schedule.is_asynchronous and schedule.run.config.drop_dead_groups:
        number = f"{prompts:,.0f} prompts with a gradient in all, {layout.chunk_prompts} a step"
        visits = f"{visits}, and those of prompts whose groups are dropped,"
    return [
        _when(schedule, step, max_steps),
        f"{number}, from a pool of {pool:,}: {visits} per prompt.",
        f"success is predicted from a prompt's own rewards, and from {', '.join(schedule.known) or 'nothing else'}.",
        *_aim(schedule),
    ]


def _aim(schedule):
    if schedule.target is None:
        return []
    number, column = int(schedule.target[schedule.pool].sum()), schedule.run.config.target_column
    share = number / len(schedule.pool)
    return [
        f"prompts are chosen for the target of {counted(number, 'row')} ({share:.1%} of the pool) that "
        f"`{column}` marks, by the alignment of their gradients with those of the target. "
        "Some of these rows come at random."
    ]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 group`, `2 groups`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _when(schedule, step, max_steps):
    """Say which steps train on random prompts, and which on chosen ones."""
    settings, layout, draws = schedule.settings, schedule.layout, 0
    judge = schedule.judge(max_steps)  # a new run has none before its prompts were looked at
    if step:
        judge, draws = schedule.curriculum.judge, schedule.curriculum.history.observed
    steps = f"steps {step + 1} to {max_steps} train on" if step + 1 < max_steps else f"step {max_steps} trains on"
    if judge.trusted and (judge.choosing or not step):
        return (
            f"{steps} prompts chosen by the success rates known beforehand ({settings.uniform_untried:.1%} are random "
            f"until {judge.wait} of these confirmed them, then {settings.uniform:.0%}), as long as choosing helps."
        )
    if judge.choosing:
        return f"{steps} chosen prompts, as long as choosing helps ({settings.uniform:.0%} are random)."
    if schedule.is_asynchronous:  # generated ahead of the steps, as many as there is room for
        return (
            f"{steps} random prompts, until success is predicted well enough (not before {judge.wait} groups are "
            f"finished), then on chosen ones ({settings.uniform:.0%} stay random)."
        )
    # The prediction must have been tried when a step begins, which draws its batches and what is read ahead
    tried = (draws + judge.draws_to_try(layout.chunk_prompts)) // layout.chunk_prompts
    begun = layout.step_of(tried - 1)
    first = max(layout.step_of(layout.chunks_drawn(begun)), step + 1)
    if first > max_steps:
        return (
            f"{steps} random prompts, as TRL would: a prediction is judged after {judge.wait} random prompts, so "
            f"nothing can be chosen before step {first}. To see prompts chosen, train longer."
        )
    return (
        f"{steps} random prompts, as TRL would, until success is predicted well enough (not before step {first}), "
        f"then on chosen ones ({settings.uniform:.0%} stay random)."
    )


def warning(schedule: "OnlineSchedule", max_steps: int) -> str | None:
    """Return what a new run should be warned of; see [`Describes.warning`]."""
    layout, config, pool = schedule.layout, schedule.run.config, len(schedule.pool)
    texts = [_few_prompts(schedule.host)]
    if not layout.shuffle:
        texts.append(
            "`shuffle_dataset=False` has no effect on this schedule: prompts are chosen, and those that are not come "
            "in random order."
        )
    if pool < layout.chunk_prompts:
        texts.append(
            f"The pool has {pool} prompts and a chunk {layout.chunk_prompts}, so a prompt comes several times in one."
        )
    visits = layout.prompts_trained(max_steps) / pool
    if not ({"hidden states", config.group_column, config.pass_rate_column} & {*schedule.known} or visits >= 1):
        possible = "" if config.prompt_features else "set `prompt_features=True`, "
        texts.append(
            f"The run has only {visits:.2f} visits per prompt, so most prompts are trained on once at most. Of the "
            "others only the length is known: the choice may be little better than random. To change that, "
            f"{possible}name a `group_column` or a `pass_rate_column`, or take a smaller pool."
        )
    return " ".join(filter(None, texts)) or None


def _few_prompts(host) -> str | None:
    """Warn of optimizer steps on so few prompts that the gradient is that of one or two live groups."""
    size, batch = host.group_size, host.args.per_device_train_batch_size * host.accelerator.num_processes
    rollouts = batch * host.args.gradient_accumulation_steps
    prompts = rollouts / size
    if prompts >= LEAST_PROMPTS:
        return None
    whole = size // math.gcd(size, batch)  # batches that hold whole groups, which TRL insists on
    wanted = whole * math.ceil(LEAST_PROMPTS * size / (batch * whole))
    return (
        f"An optimizer step trains on {prompts:g} prompt{'s' * (prompts != 1)} ({rollouts} rollouts, "
        f"{size} for each), so few that some steps may have no live group at all. Use {LEAST_PROMPTS} or "
        f"more: `gradient_accumulation_steps={wanted}`, or a larger `per_device_train_batch_size`."
    )


_FEW = 0.1  # of the groups, below which live ones are few


def nothing_to_predict(curriculum: "OnlineCurriculum") -> str | None:
    """
    Return a warning where success cannot be predicted from the groups so far, where hardly any of them has a gradient,
    or where the threshold of success is doubtful. Training goes on.
    """
    groups, successes, live = curriculum.history.by_visit.sum(0)
    known, threshold = curriculum.scale.recent, curriculum.settings.success_threshold
    start = "Success cannot be predicted"
    start += "" if curriculum.judge.trusted else ", so draws stay uniform"
    if not groups:
        return (
            f"{start}: no rollout of the first chunk has a reward that decides success and a token in the loss. Check "
            "the reward functions; where completions are cut off, raise `max_completion_length`."
        )
    if curriculum.settings.graded:
        return None
    if live < _FEW * groups:
        return (
            f"Of the first {groups:,.0f} groups {live:,.0f} had a gradient, and {successes / groups:.1%} of the "
            "rollouts succeeded, so there is little to choose from. If that is not what the policy can do, check the "
            f"rewards (a rollout succeeds from `success_threshold={threshold:.7g}` on) and `max_completion_length`; "
            f"else {'harder' if 2 * successes > groups else 'easier'} prompts teach more."
        )
    remedy = (
        f"A rollout succeeds where its reward is at least `success_threshold={threshold:.7g}`. Set "
        '`success_threshold`, or `learnability="variance"` for graded rewards.'
    )
    if 0 < successes < groups:
        return threshold_warning(doubtful_threshold(known, threshold), threshold)
    return (
        f"{start}: of the first {groups:,.0f} groups {'every' if successes else 'no'} rollout counts as a success, "
        f"though rewards differ (they lie between {known.min():.7g} and {known.max():.7g}). {remedy}"
    )


def unscored_warnings(scored: "Scored", names: list[str]) -> tuple[np.ndarray, list[str]]:
    """
    Explain why groups have no reward that decides success, or no gradient.

    Args:
        scored ([`Scored`]): has counted them.
        names (`list[str]`): names of the reward functions.

    Returns:
        for each of [`KINDS`] whether it was found, bool, and a paragraph.
    """
    groups, without, dead, rollouts, masked = scored.counts
    many = masked > _MANY_MASKED * rollouts
    kinds = np.array([without > 0, dead > 0 and not masked, (dead > 0 and masked > 0) or many])
    return kinds, [
        _without(scored, names),
        f"{dead:,.0f} of the last {groups:,.0f} groups ({dead / groups:.0%}) have no gradient, although their "
        "successes differ: their total rewards do not. Give the reward that decides success a weight in "
        "`reward_weights`, or see what clips it.",
        f"{masked / rollouts:.0%} of the completions of the last {groups:,.0f} groups were cut off, and "
        f"`mask_truncated_completions=True` leaves these out of the loss: {dead:,.0f} groups ({dead / groups:.0%}) "
        "have no gradient because of it. Raise `max_completion_length`.",
    ]


def kind_warnings(schedule: "OnlineSchedule", wanted: np.ndarray) -> list[str]:
    """
    Return warnings about kinds of prompts, as the report has them.

    Args:
        schedule ([`OnlineSchedule`]): after an observation.
        wanted (`np.ndarray` of shape `(W, K)`): for each warning and each kind whether it is to be given, bool.
    """
    names, texts = [*WARNINGS], []
    for kind, one in enumerate(read_kinds(schedule.curriculum, schedule.kind_names)):
        one["warnings"] = [name for name, so in zip(names, wanted[:, kind], strict=True) if so]
        if one["warnings"]:
            one["examples"] = prompt_texts(schedule.host.dataset, one["examples"][:1]) if one["examples"] else []
            texts += warnings_of(one)
    return texts


def _without(scored, names):
    groups, without, *_ = scored.counts
    remedy = (
        f"Check what `{names[0]}` makes of these rows, or leave them out."
        if len(names) == 1
        else f"The reward functions are {', '.join(names)}: where each scores the rows of its own task, name all that "
        "decide in `success_reward`. Else leave such rows out."
    )
    rows = f"row {', row '.join(map(str, scored.examples))}{' and others' * int(without > len(scored.examples))}"
    return (
        f"{without:,.0f} of the last {groups:,.0f} groups ({without / groups:.0%}) have no reward that decides "
        f"success: all are None or NaN ({rows}). Nothing can be predicted of such prompts, so they will seldom be "
        f"chosen. {remedy}"
    )


def dead_target(target: "Target") -> str:
    """Write that nothing could be learnt from a target so far."""
    return (
        f"No prompt of the target has had a live group so far: in all {target.counts[1]} groups of its "
        f"{counted(len(target.rows), 'row')} every rollout succeeded, or none did. So the target has no gradient, and "
        "prompts are chosen by learnability alone until it has one. If that lasts, mark prompts that are solved "
        "sometimes in `target_column`, such as easier ones of that kind."
    )


def without_gradients(reason: str, target_column: str | None = None) -> str:
    """Write why prompts are chosen by learnability alone."""
    if target_column is not None:
        return (
            f"LearnAlign online cannot choose prompts for the target that `{target_column}` marks, as the gradients "
            f"of training cannot be had: {reason}. It chooses by learnability alone. Use `score='learnability'` "
            "without `target_column` to choose so without this warning."
        )
    return (
        "LearnAlign online chooses prompts by learnability alone, without the alignment of their gradients, which "
        f"cannot be had: {reason}. Use `score='learnability'` to choose so without this warning."
    )
