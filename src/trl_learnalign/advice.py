"""Warnings about a selection that chose no prompt, or fewer than were asked for."""

import math
from typing import TYPE_CHECKING

import pyarrow.compute as pc


if TYPE_CHECKING:
    from .selection import Selection

_ROUNDING = 1e-9  # rounding may make the standard deviation of equal rewards this large


def selection_warning(selection: "Selection") -> str | None:
    """
    One paragraph with the reason and the remedy, if fewer prompts were chosen than were asked for, or not by the draw
    that was asked for; else `None`.
    """
    return " ".join(filter(None, (_shortage(selection), _not_drawn(selection)))) or None


def _shortage(selection) -> str | None:
    config, chosen = selection.provenance["config"], len(selection.indices)
    wanted = min(config["num_prompts"], selection.provenance["num_rows"])
    if chosen >= wanted or (config["score"] == "random" and chosen):
        return None
    eligible = len(selection.eligible()) + len(selection.provenance.get("duplicates", ()))
    if not selection.measures or eligible < selection.num_learnable():
        return _conditions(selection, chosen, config)
    if chosen:
        different = "different " * bool(selection.provenance.get("duplicates"))
        learnable = (
            f"1 {different}prompt is learnable" if chosen == 1 else f"{chosen:,} {different}prompts are learnable"
        )
        return (
            f"Only {learnable}, fewer than `num_prompts` ({config['num_prompts']:,}), and only these are chosen. To "
            "have more, raise `num_rollouts`, warm up longer, or add prompts."
        )
    if not selection.scores.num_rows:
        return (
            f"No prompt could be scored: the rewards of all {len(selection.provenance['unscorable']):,} prompts were "
            "None, NaN or infinite. Check the reward function."
        )
    differ = pc.sum(pc.greater(selection.scores["reward_std"], _ROUNDING)).as_py()
    if config["learnability"] == "success_rate" and differ:
        return _graded(selection, config["success_threshold"], differ)
    return _all_equal(selection, config["learnability"])


def _not_drawn(selection) -> str | None:
    """Chosen prompts whose score is not above 0, where a draw in proportion to the scores was asked for."""
    if selection.provenance["config"].get("take") != "proportional":
        return None
    chosen = selection.scores["score"].filter(selection.scores["selected"])
    without = pc.sum(pc.less_equal(chosen, 0)).as_py() or 0
    if not without or len(selection.eligible()) == len(chosen):
        return None
    return (
        f"{without:,} of the {len(chosen):,} chosen prompts were not drawn: `take='proportional'` draws in proportion "
        "to the scores, and theirs are not above 0. They were taken by rank, after all that could be drawn. Return "
        "scores above 0, or use `take='top'`."
    )


def _conditions(selection, chosen, config):
    """Fewer than were asked for, as a condition or missing scores leave prompts out."""
    reasons = [f"`where` ({config['where']}) holds for" * bool(config.get("where")), "the score has a number for"]
    return (
        f"{chosen:,} prompts are chosen, fewer than `num_prompts` ({config['num_prompts']:,}): of "
        f"{selection.scores.num_rows:,} prompts, {len(selection.eligible()):,} are eligible, those that "
        f"{' and that '.join(filter(None, reasons))}{' and that are learnable' * ('rollouts' in selection.measures)}. "
        "Loosen the condition, or add prompts."
    )


def too_few(selection: "Selection", wanted: int, eligible: int) -> str:
    """Another choice from the same scores can only have the `eligible` prompts."""
    kind = "" if selection.provenance["config"]["score"] == "random" else " eligible"
    kind = " learnable" if selection.measures and eligible >= selection.num_learnable() else kind
    kind += " and different" * bool(selection.provenance.get("duplicates"))
    return (
        f"`num_prompts` is {wanted:,}, but the pool of {selection.scores.num_rows:,} has only {eligible:,}{kind} "
        "prompts, so fewer are selected. Use a larger pool, or select after a longer warm-up."
    )


def plan_warnings(trial: "Selection", learnable: float, wanted: int) -> list[str]:
    """Warnings of a dry run. `learnable` prompts are expected in the whole pool, `wanted` were asked for."""
    if not trial.num_learnable():
        return [f"warning: {selection_warning(trial)}"]
    if learnable < wanted:
        return [f"warning: about {learnable:,.0f} prompts will be learnable, fewer than `num_prompts` ({wanted:,})."]
    return []


def _graded(selection, threshold, differ):
    """The rewards of `differ` prompts differ, but no prompt has rewards on both sides of the threshold."""
    least, most = selection.provenance.get("reward_range") or (-math.inf, math.inf)
    where = "and no prompt has rewards on both sides of it"
    where = (
        "which no reward reaches" if most < threshold else "which all rewards reach" if least >= threshold else where
    )
    return (
        f"No prompt is learnable, although the rewards of {differ:,} of {selection.scores.num_rows:,} prompts differ "
        f"between their rollouts. A success is a reward of at least `success_threshold` ({threshold:g}), {where} "
        f"({_seen(selection)}). Use `learnability='variance'`, which is for graded rewards, or another "
        "`success_threshold`."
    )


def _all_equal(selection, learnability):
    """The rewards of every prompt are equal."""
    rate = selection.mean_success_rates()[0]
    reason, prompts, check = "every prompt was always or never solved", "easier or harder", " and `success_threshold`"
    if learnability == "variance":
        reason, check = "the rollouts of every prompt had equal rewards", ""
    elif rate == 0:
        reason, prompts = "none was ever solved", "easier"
    elif rate == 1:
        reason, prompts = "all were always solved", "harder"
    return (
        f"No prompt is learnable: {reason} ({_seen(selection)}). Check the reward function{check}, or use more "
        f"`num_rollouts`, a longer warm-up (`warmup_prompts`), or {prompts} prompts."
    )


def _seen(selection):
    """The range of the rewards, which version 0.1.0 did not keep."""
    if not selection.provenance.get("reward_range"):
        return "the range of the rewards was not kept"
    least, most = selection.provenance["reward_range"]
    return f"all rewards are {least:.4g}" if least == most else f"rewards are between {least:.4g} and {most:.4g}"
