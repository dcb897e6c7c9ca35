"""The state and history of an online schedule as tables and lines, for its report, a model card and the output."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..curriculum import judge
from ..curriculum.judge import BEGIN_SKILL, LEAST_HEADROOM, PATIENCE, UNIFORM, Judge
from ..scores.maths import doubtful_threshold
from ..selection.warnings import threshold_warning
from ..selection.words import live_shares


if TYPE_CHECKING:
    from ..curriculum.history import History
    from .online import OnlineSchedule

STATES = ("new", "live", "resting", "retired", "parked", "unscored")
MOST_PERIODS = 20
_BLOCK = 16_384  # prompts whose success is predicted at once, in float64


def prompt_columns(schedule: "OnlineSchedule") -> dict[str, np.ndarray]:
    """
    By name a value for each prompt that may be trained on, of shape `(n,)`. Where nothing was seen, `success_rate` is
    NaN and `last_chunk` -1. docs/files.md explains them.
    """
    rows, memory = schedule.pool, schedule.memory
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    posteriors = [np.stack(schedule.posterior(block, schedule.observed)) for block in blocks]
    a, b = np.concatenate(posteriors, axis=1)
    successes, failures, visits = memory.successes[rows], memory.failures[rows], memory.visits[rows]
    trials = successes + failures
    conditions = {
        "unscored": memory.unscored[rows] > 0,
        "retired": memory.is_retired(rows),
        "parked": memory.is_parked(rows),
        "resting": (memory.solved[rows] > 0) | (memory.failed[rows] > 0),
        "live": visits > 0,
    }
    places = [STATES.index(name) for name in conditions]
    return {
        "index": rows,
        "visits": visits,
        "success_rate": np.divide(successes, trials, out=np.full(len(rows), np.nan, np.float32), where=trials > 0),
        "predicted_success": (a / (a + b)).astype(np.float32),
        "utility": schedule.utility(a, b).astype(np.float32),
        "last_chunk": memory.last[rows],
        "ready_chunk": memory.ready[rows],
        "state": np.array(STATES)[np.select(list(conditions.values()), places, STATES.index("new"))],
    }


def periods(history: "History", chunk_prompts: int) -> list:
    """
    When prompts were chosen and when drawn uniformly, the last `MOST_PERIODS`, oldest first: `first` and `last` chunk,
    `choosing`, `skill` and `headroom` at the end, and for uniform draws `why`.
    """
    choosing = history.column("choosing") > 0
    chunks = history.column("chunk").astype(int)
    ends = np.flatnonzero(np.diff(choosing, append=~choosing[-1:]))
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(int)
    skill, headroom = history.column("skill"), history.column("headroom")
    found = []
    for start, end in list(zip(starts.tolist(), ends.tolist(), strict=True))[-MOST_PERIODS:]:
        if choosing[end]:
            why = None
        elif start == 0 and end + 1 < len(choosing):
            why = (
                f"at the start, until at least {judge.TRIED} uniform draws had shown that the prediction is better "
                "than the mean and that choosing should help"
            )
        elif start == 0 and (end + 1) * chunk_prompts < judge.TRIED:
            why = f"the prediction is judged after {judge.TRIED} uniform draws"
        elif skill[start if start else end] <= BEGIN_SKILL:
            why = f"the prediction was hardly better than the mean (needed: a skill of {BEGIN_SKILL})"
        else:
            why = f"choosing would have made little difference (needed: a headroom of {LEAST_HEADROOM})"
        found.append(
            {
                "first": int(chunks[start]),
                "last": int(chunks[end]),
                "choosing": bool(choosing[end]),
                "skill": float(skill[end]),
                "headroom": float(headroom[end]),
                "why": why,
            }
        )
    return found


def switch_line(chunk: int, judge: Judge) -> str:
    """
    The line printed when a schedule starts or stops choosing.

    Args:
        chunk (`int`): the first chunk that is chosen, or drawn uniformly.
        judge ([`Judge`]): its judge.
    """
    start = f"LearnAlign, chunk {chunk}: from now on"
    if judge.choosing:
        return (
            f"{start} prompts are chosen by predicted learnability: their rewards should have {judge.headroom:.1f} x "
            f"the variance of those of random prompts (skill {judge.skill:.2f})."
        )
    if not judge.able:
        skill = f"for {PATIENCE} chunks (skill {judge.skill:.2f})"
        return f"{start} draws are uniform: the prediction of success was hardly better than the mean {skill}."
    headroom = f"for {PATIENCE} chunks (headroom {judge.headroom:.2f})"
    return f"{start} draws are uniform: choosing promised little {headroom}."


def summary_lines(schedule: "OnlineSchedule") -> list[str]:
    """Sentences about the run for a model card; none before the first observation."""
    history, layout = schedule.history, schedule.layout
    latest = history.latest()
    if not latest:
        return []
    chunks, (chosen, uniform, draws) = len(history.chunks), live_shares(history.column, layout.chunk_prompts)
    lines = [
        f"{latest['visited']:,.0f} of {len(schedule.pool):,} prompts were trained on, in {counted(chunks, 'chunk')} "
        f"of {counted(layout.chunk_prompts, 'prompt')} with {layout.group_size} rollouts each.",
        f"{history.column('choosing').mean():.0%} of the chunks were chosen, the others drawn uniformly.",
    ]
    if not np.isfinite(chosen):
        lines.append(f"{uniform:.0%} of the groups were live (they had a gradient).")
    elif draws:
        lines.append(
            f"Where prompts were chosen, {chosen:.0%} of their groups were live (they had a gradient), against "
            f"{uniform:.0%} of those drawn uniformly beside them ({draws:,.0f})."
        )
    if not schedule.graded:
        by_all, by_none = schedule.memory.solved_by()
        lines.append(
            f"Of the prompts trained on, {by_all:,} were solved by all of their rollouts so far, and {by_none:,} by "
            "none."
        )
    if latest["unscored"]:
        lines.append(
            f"{latest['unscored']:,.0f} of them had no reward that decides success, or no token in the loss, at their "
            "last visit."
        )
    return lines


def plan_lines(schedule: "OnlineSchedule", step: int, max_steps: int) -> list[str]:
    """Three lines for the start of a run; see [`Schedule.plan`]."""
    layout = schedule.layout
    prompts, pool = layout.prompts_trained(max_steps), len(schedule.pool)
    return [
        _when(schedule, step, max_steps),
        f"{prompts:,.0f} prompts in all, {layout.chunk_prompts} at once, from a pool of {pool:,}: "
        f"{prompts / pool:.2f} visits per prompt.",
        f"success is predicted from a prompt's own rewards, and from {', '.join(schedule.known) or 'nothing else'}.",
    ]


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 chunk`, `2 chunks`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _when(schedule, step, max_steps):
    """Which steps train on random prompts, and which on chosen ones; of a new run before anything was looked at."""
    known, observed = (schedule.judge, schedule.observed) if step else (Judge(), 0)
    steps = f"steps {step + 1} to {max_steps} train on" if step + 1 < max_steps else f"step {max_steps} trains on"
    if known.choosing:
        return f"{steps} chosen prompts, as long as choosing helps ({UNIFORM:.0%} are random)."
    layout = schedule.layout
    # The prediction must have been tried when a step begins, which draws its batches and what is read ahead
    tried = observed + known.chunks_to_try(layout.chunk_prompts)
    begun = (tried - 1) * layout.repeats // layout.accumulation + 1  # steps before
    chunk = math.ceil((begun * layout.accumulation + layout.read_ahead) / layout.repeats)
    first = max(chunk * layout.repeats // layout.accumulation, step) + 1
    if first > max_steps:
        return (
            f"{steps} random prompts, as TRL would: a prediction is judged after {judge.TRIED} random prompts, so "
            f"nothing can be chosen before step {first}. To see prompts chosen, train longer."
        )
    return (
        f"{steps} random prompts, as TRL would, until success is predicted well enough (not before step {first}), "
        f"then on chosen ones ({UNIFORM:.0%} stay random)."
    )


def warning(schedule: "OnlineSchedule", max_steps: int) -> str | None:
    """What a new run should be warned of; see [`Schedule.warning`]."""
    layout, config, pool, texts = schedule.layout, schedule.config, len(schedule.pool), []
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
    return " ".join(texts) or None


def nothing_to_predict(schedule: "OnlineSchedule") -> str | None:
    """
    A warning where success cannot be predicted from what was observed so far, or is probably not what the user calls
    so. Training goes on.

    Args:
        schedule ([`OnlineSchedule`]): after some groups.
    """
    groups, successes, live = schedule.history.by_visit.sum(0)
    known, threshold = schedule.scale.recent, schedule.config.success_threshold
    start = "Success cannot be predicted, so draws stay uniform"
    if not groups:
        return (
            f"{start}: no rollout of the first chunk has a reward that decides success and a token in the loss. Check "
            "the reward functions; where completions are cut off, raise `max_completion_length`."
        )
    if schedule.graded or not live:
        return None
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
