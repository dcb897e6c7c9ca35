"""Warnings about a selection that chose no prompt, or fewer than were asked for."""

from typing import TYPE_CHECKING

import pyarrow.compute as pc

from ..scores.builtin import is_random


if TYPE_CHECKING:
    from .result import Selection

_ROUNDING = 1e-9  # rounding may make the standard deviation of equal rewards this large


def selection_warning(selection: "Selection") -> str | None:
    """
    Return one paragraph with the reason and the remedy, if fewer prompts were chosen than were asked for, or not by
    the draw that was asked for; else `None`.
    """
    return " ".join(filter(None, (_shortage(selection), _not_drawn(selection)))) or None


def _shortage(selection) -> str | None:
    config, chosen = selection.provenance["config"], len(selection.indices)
    wanted = min(config["num_prompts"], selection.provenance["num_rows"])
    if chosen >= wanted or (is_random(config["score"]) and chosen):
        return None
    eligible = len(selection.eligible()) + len(selection.provenance.get("duplicates", ()))
    if not selection.scores.num_rows and "rollouts" not in selection.measures:
        return (
            f"No prompt is chosen: all {len(selection.provenance['unscorable']):,} could not be measured "
            f"({', '.join(selection.measures)}). Check the prompts, or use another score."
        )
    if "rollouts" not in selection.measures or eligible < selection.num_learnable():
        return _conditions(selection, chosen, config)
    if chosen:
        different = "different " * bool(selection.provenance.get("duplicates"))
        learnable = (
            f"1 {different}prompt is learnable" if chosen == 1 else f"{chosen:,} {different}prompts are learnable"
        )
        return (
            f"Only {learnable}, fewer than `num_prompts` ({config['num_prompts']:,}), and only these are chosen. To "
            "have more, begin a new run with a larger `num_rollouts`, a longer warm-up or more prompts. A run that is "
            "resumed with `reselect_every` selects again."
        )
    if not selection.scores.num_rows:
        return (
            f"No prompt could be scored: the rewards of all {len(selection.provenance['unscorable']):,} prompts were "
            "None, NaN or infinite. Check the reward function."
        )
    if selection.provenance.get("without_gradient"):
        return None  # `pool_warnings` says it
    differ = pc.sum(pc.greater(selection.scores["reward_std"], _ROUNDING)).as_py()
    if config["learnability"] == "success_rate" and differ:
        return _graded(selection, config["success_threshold"], differ)
    return _all_equal(selection, config["learnability"])


def pool_warnings(selection: "Selection") -> list[str]:
    """Return warnings about prompts that could not be measured as the user would expect, a paragraph each."""
    provenance, texts = selection.provenance, []
    rows, pool, config = provenance.get("unscorable", ()), selection.num_pool(), provenance.get("config", {})
    left_out = f"{len(rows):,} of {pool:,} prompts ({len(rows) / max(1, pool):.0%}) are left out"
    if rows and selection.scores.num_rows and "rollouts" not in selection.measures:
        texts.append(
            f"{left_out}, as they could not be measured ({', '.join(selection.measures)}): {_rows(rows)}. Check these "
            "prompts."
        )
    elif rows and selection.scores.num_rows:
        elsewhere = provenance.get("scored_elsewhere", 0)
        remedy = (
            f"{elsewhere:,} of them have other rewards: where each function scores the rows of its own task, name all "
            "that decide in `success_reward`."
            if elsewhere
            else "Check what the reward function makes of these rows."
        )
        texts.append(
            f"{left_out}, as none of their rollouts has a reward that decides success: all are None, NaN or infinite "
            f"({_rows(rows)}). {remedy}"
        )
    if without := provenance.get("without_gradient"):
        masked = provenance["masked"]
        reason = (
            f"the completions that make the difference were cut off, and `mask_truncated_completions=True` leaves "
            f"these out of the loss ({masked:.0%} of all completions). Raise `max_completion_length`."
            if masked
            else "their total rewards are equal. Give the reward that decides success a weight in `reward_weights`."
        )
        texts.append(
            f"{without:,} of {pool:,} prompts count as not learnable although the rewards of their rollouts differ, "
            f"as they have no gradient: {reason}"
        )
    texts += filter(None, [_guessable(selection), _all_tied(selection)])
    if selection.indices:  # else `selection_warning` speaks of the threshold
        texts += filter(None, [threshold_warning(provenance.get("doubt"), config.get("success_threshold"))])
    return texts


def _guessable(selection) -> str | None:
    """Tell of answers that the policy finds no likelier with their prompt than without."""
    if "likelihood_alone" not in selection.measures:
        return None
    nothing = pc.less_equal(selection.scores["prompt_information"], 0)
    number, chosen = (pc.sum(one).as_py() or 0 for one in (nothing, pc.and_(nothing, selection.scores["selected"])))
    if not number:
        return None
    return (
        f"{number:,} of {selection.scores.num_rows:,} answers are at least as likely without their prompt, "
        f"{chosen:,} of the chosen ones among them: they can be guessed, or their prompt tells this policy nothing. "
        "`where='prompt_information > 0'` leaves them out."
    )


def _all_tied(selection) -> str | None:
    """Tell of measured scores that are the same for all prompts; with rollouts other warnings do."""
    if not selection.measures or "rollouts" in selection.measures or selection.scores.num_rows < 2:
        return None
    least, most = pc.min_max(selection.scores["score"]).values()
    if least.as_py() is None or least != most:
        return None
    return (
        f"All {selection.scores.num_rows:,} scores are equal ({least.as_py():.7g}), so the choice among these prompts "
        "is a random draw: what was measured does not tell them apart. Use another score, or a model that can."
    )


def threshold_warning(doubt: tuple[float, float, float] | None, threshold: float) -> str | None:
    """Return a warning about what [`~trl_learnalign.curriculum.rewards.doubtful_threshold`] found, if anything."""
    if doubt is None:
        return None
    share, least, most = doubt
    half, what = ("better", "no successes") if share > 0 else ("worse", "successes")
    return (
        f"Most rewards of the {half} half of their range count as {what}: {abs(share):.0%} of them, between "
        f"{least:.7g} and {most:.7g}. A rollout succeeds where its reward is at least `success_threshold` "
        f"({threshold:.7g}). If that is not meant, prompts are chosen by a wrong success rate: set it, or use "
        "`learnability='variance'`, which is for graded rewards."
    )


def _rows(rows):
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:5]))}{' and others' * (len(rows) > 5)}"


def _not_drawn(selection) -> str | None:
    """Tell of chosen prompts whose score is not above 0, where a draw in proportion to the scores was asked for."""
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
    """Explain that a condition or missing scores leave prompts out."""
    reasons = [f"`where` ({config['where']}) holds for" * bool(config.get("where")), "the score has a number for"]
    return (
        f"{chosen:,} prompts are chosen, fewer than `num_prompts` ({config['num_prompts']:,}): of "
        f"{selection.scores.num_rows:,} prompts, {len(selection.eligible()):,} are eligible, those that "
        f"{' and that '.join(filter(None, reasons))}{' and that are learnable' * ('rollouts' in selection.measures)}. "
        "Loosen the condition, or add prompts."
    )


def too_few(selection: "Selection", wanted: int, eligible: int) -> str:
    """Explain that another choice from the same scores can only have the `eligible` prompts."""
    kind = "" if is_random(selection.provenance["config"]["score"]) else " eligible"
    kind = " learnable" if "rollouts" in selection.measures and eligible >= selection.num_learnable() else kind
    kind += " and different" * bool(selection.provenance.get("duplicates"))
    return (
        f"`num_prompts` is {wanted:,}, but the pool of {selection.scores.num_rows:,} has only {eligible:,}{kind} "
        "prompts, so fewer are selected. Use a larger pool, or select after a longer warm-up."
    )


def plan_warnings(trial: "Selection", eligible: float, wanted: int) -> list[str]:
    """Return warnings of a dry run. `eligible` prompts are expected in the whole pool, `wanted` were asked for."""
    if not len(trial.eligible()):
        return [f"warning: {selection_warning(trial)}"]
    if eligible < wanted:
        kind = "learnable" if "rollouts" in trial.measures else "eligible"
        return [f"warning: about {eligible:,.0f} prompts will be {kind}, fewer than `num_prompts` ({wanted:,})."]
    return []


def _graded(selection, threshold, differ):
    """Explain that the rewards of `differ` prompts differ, but lie on one side of the threshold for each prompt."""
    least, most = selection.provenance["reward_range"]
    where = "and no prompt has rewards on both sides of it"
    where = (
        "which no reward reaches" if most < threshold else "which all rewards reach" if least >= threshold else where
    )
    return (
        f"No prompt is learnable, although the rewards of {differ:,} of {selection.scores.num_rows:,} prompts differ "
        f"between their rollouts. A success is a reward of at least `success_threshold` ({threshold:.7g}), {where} "
        f"({_seen(selection)}). Use `learnability='variance'`, which is for graded rewards, or another "
        "`success_threshold`."
    )


def _all_equal(selection, learnability):
    """Explain that the rewards of every prompt are equal."""
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
        "`num_rollouts`. Training that is resumed with `reselect_every` selects again after more random prompts; a "
        f"new run can have a longer warm-up (`warmup_prompts`) or {prompts} prompts."
    )


def _seen(selection):
    """Name the range of the rewards."""
    least, most = selection.provenance["reward_range"]
    return f"all rewards are {least:.7g}" if least == most else f"rewards are between {least:.7g} and {most:.7g}"
