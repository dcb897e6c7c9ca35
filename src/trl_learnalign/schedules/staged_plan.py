"""The plan of a run and an estimate of a selection's time, in readable lines."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from ..choice.table import load_target
from ..config import LearnAlignConfig
from ..data.columns import candidate_rows, needs_measures
from ..ground.progress import duration
from ..measures.registry import funnel, prices, spending
from ..run.layout import Layout
from ..scores.builtin import manner


if TYPE_CHECKING:
    from .staged import Version


_MOST_WARMUP = 1 / 3  # of the steps of a run


@dataclass(frozen=True)
class Work:
    """
    The prompts that a selection looks at.

    Attributes:
        pool (`int`): prompts that it scores.
        target (`int`): prompts of the target, which are rolled out as well.
        filtered (`bool`): whether a condition on what is measured may leave some of the pool out.
        candidates (`tuple[str, ...]`): how the pool is chosen, see [`funnel`].
    """

    pool: int
    target: int = 0
    filtered: bool = False
    candidates: tuple[str, ...] = ()


def work_of(dataset: Dataset, config: LearnAlignConfig) -> Work:
    """
    Count what a selection from a dataset would look at.

    Raises:
        `ValueError`: `where` holds for no row, or the target cannot be read.
    """
    target = load_target(dataset, config)
    candidates, pool = funnel(config, len(candidate_rows(dataset, config)))
    return Work(pool, 0 if target is None else len(target), needs_measures(dataset, config), tuple(candidates))


def plan_lines(
    layout: Layout, config: LearnAlignConfig, work: Work, max_steps: int, step: int, log: "list[Version]", due: bool
) -> list[str]:
    """
    Return the lines of a plan: the warm-up, the selection, the training on it, and reviews if there are any.

    Args:
        layout ([`Layout`]): of the run.
        config ([`LearnAlignConfig`]): of the run.
        work ([`Work`]): of each of its selections.
        max_steps (`int`): optimizer steps of the whole run.
        step (`int`): the one that a resumed run goes on after; 0 for a new run.
        log (`list[Version]`): what was selected before that.
        due (`bool`): whether a selection is made before the next step.
    """
    warming = len(log) == 1 and not due
    start = layout.first_selection[1] if len(log) == 1 else log[-1].start_chunk
    end = layout.steps_of(start)  # of the steps before the selected prompts
    lines = [
        _warmup(layout, max_steps, step, end, start * layout.chunk_prompts, warming),
        _selection(layout, config, work, log, due, warming),
        _training(layout, work, max_steps, max(end, step), log),
    ]
    if config.review_every is not None:
        some = f"{config.review_every - 1} of {config.review_every} passes"
        lines.append(f"{some} leave out the prompts that were solved, so they are shorter, and there are more.")
    return lines


def _warmup(layout, max_steps, step, end, prompts, warming):
    if step:
        where = f"in the warm-up, which ends with step {end}" if warming else "after the warm-up"
        return f"goes on after step {step} of {max_steps}, {where}."
    if not end:
        return "no warm-up."
    more = prompts - layout.warmup_prompts
    of_them = f" ({layout.warmup_prompts:,}, and {more:,} read ahead)" if more else ""
    return f"steps 1 to {end} of {max_steps} warm up on {prompts:,} random prompts{of_them}."


def _selection(layout, config, work, log, due, warming):
    again = ""
    if config.reselect_every is not None:
        passes = "pass" if config.reselect_every == 1 else f"{config.reselect_every:g} passes"
        again = f", and again after every {passes} over the selected prompts"
    if not due and not warming:
        return f"selection number {len(log) - 1} was made, of {len(log[-1].indices):,} prompts{again}."
    moment = f"after step {layout.first_selection[0]}" if warming else "now"
    return f"selection {moment}{again}: {rollouts_text(layout, config, work)}."


def _training(layout, work, max_steps, begin, log):
    if begin >= max_steps:
        return "no step is left. To train longer, raise `max_steps`."
    steps = f"steps {begin + 1} to {max_steps} train on"
    if len(log) > 1 and not log[-1].indices:
        return f"{steps} random prompts, as the selection chose none."
    made = len(log[-1].indices)
    prompts = made or min(layout.num_prompts, work.pool)
    passes = (layout.prompts_trained(max_steps) - layout.prompts_trained(begin)) / prompts
    if work.filtered and not made:
        return f"{steps} the selected prompts, at most {prompts:,}: {passes:.1f} passes or more (`num_train_epochs`)."
    return f"{steps} the {prompts:,} selected prompts: {passes:.1f} passes (`num_train_epochs`)."


def _each(layout, config):
    """Return the rollouts of each prompt in a selection."""
    return (config.num_rollouts or layout.group_size) if "rollouts" in prices(config.measures) else 0


def rollouts_text(layout: Layout, config: LearnAlignConfig, work: Work) -> str:
    """Say how much a selection generates and computes."""
    racing, before = config.rollouts == "racing", "".join(f"{one}; then " for one in work.candidates)
    if found := spending(config.measures, work.pool, work.target, _each(layout, config), racing):
        return before + found
    most = "at most " * work.filtered
    number = min(layout.num_prompts, work.pool)
    return f"{before}{most}{number:,} of {work.pool:,} prompts {manner(config.score)}, without rollouts"


def estimate_line(layout: Layout, config: LearnAlignConfig, work: Work, step: int, since: int, seconds: float) -> str:
    """
    Estimate how long the selection after optimizer step `step` may take, by the pace of training.

    Args:
        layout ([`Layout`]): of the run.
        config ([`LearnAlignConfig`]): of the run.
        work ([`Work`]): of the selection.
        step (`int`): the last optimizer step.
        since (`int`): the optimizer step that the time is counted from.
        seconds (`float`): what the steps since then took.
    """
    line = f"LearnAlign, step {step}: selecting, {rollouts_text(layout, config, work)}"
    each = _each(layout, config)
    if not each:
        return f"{line}."
    trained = (layout.prompts_trained(step) - layout.prompts_trained(since)) * layout.group_size
    if not trained or seconds <= 0:
        return f"{line}. How long it takes is not known yet, as no step has been trained since the start."
    left = duration((work.pool + work.target) * each * seconds / trained)
    pace = f"{trained / seconds:.3g} rollouts a second, with their gradients"
    about = "at most" if config.rollouts == "racing" else "about"
    return f"{line}; {about} {left} at the pace of training ({pace})."


def warmup_warning(layout: Layout, max_steps: int) -> str | None:
    """Return a warning if the warm-up takes more than a third of a run."""
    end = layout.steps_of(layout.first_selection[1])
    if end <= _MOST_WARMUP * max_steps:
        return None
    return (
        f"The warm-up takes {end} of the {max_steps} steps of this run ({end / max_steps:.0%}), which leaves few for "
        f"the selected prompts. Lower `warmup_prompts` ({layout.warmup_prompts}; the dataset has {layout.pool_size} "
        "rows), or raise `num_train_epochs` or `max_steps`."
    )
