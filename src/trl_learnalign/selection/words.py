"""Selections and online runs in a few words and numbers."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..scores.builtin import is_random, manner


if TYPE_CHECKING:
    from .result import Selection

# Labels of what `Selection.outcomes` holds
OUTCOME_LABELS = {"success_rate": "mean success rate", "reward_mean": "mean reward", "reward_std": "mean reward std"}

UNMEASURED = "could not be measured"  # of prompts that a measure left out, where no reward says why


def at_random(selection: "Selection") -> bool:
    """Return whether prompts were chosen at random, so that ranks mean nothing."""
    return is_random(selection.provenance["config"]["score"])


def chosen_by(selection: "Selection") -> str:
    """Say by what prompts were chosen."""
    return manner(selection.provenance["config"]["score"]) + replaced_score(selection)


def score_used(selection: "Selection") -> str:
    """Name the score that ranked: the configured one, or the one that a measure put in its place."""
    provenance = selection.provenance
    of_another = (provenance.get("instead") or {}).get("score")
    return provenance.get("target", {}).get("instead") or of_another or provenance["config"]["score"]


def replaced_score(selection: "Selection") -> str:
    """Say that the configured score gave way to another, and why; empty if it did not."""
    if other := selection.provenance.get("target", {}).get("instead"):
        return f" (by {other} instead, as no prompt of the target was learnable)"
    other = selection.provenance.get("instead") or {}  # of another measure
    reason = f": {other['reason'].rstrip('. ')}" if other.get("reason") else ""
    return f" (by {other['score']} instead{reason})" if other else ""


def summary(selection: "Selection") -> str:
    """Say in one line: pool, learnable, chosen, mean outcomes, time of each phase, cost of the gradients."""
    provenance = selection.provenance
    by = "" if "rollouts" in selection.measures else f" {chosen_by(selection)}"
    pool = f"pool {selection.num_pool()}"
    if provenance["unscorable"]:
        rolled_out = "rollouts" in selection.measures
        pool += f" ({len(provenance['unscorable'])} {'unscorable: no finite reward' if rolled_out else UNMEASURED})"
    chosen = f"chosen {len(selection.indices)}" + (by or replaced_score(selection))
    if provenance.get("duplicates"):
        chosen += f" ({len(provenance['duplicates'])} duplicates left out)"
    parts = [pool, chosen]
    if not by:
        outcomes = [f"{OUTCOME_LABELS[name]} {means}" for name, means in _outcomes(selection).items()]
        if race := provenance.get("race"):
            pool += f" ({race['rollouts']:,} of {race['of']:,} rollouts)"
        parts = [pool, f"learnable {selection.num_learnable()}", chosen, *outcomes]
    if candidates := provenance.get("candidates"):
        stages = (f"{one['kept']} of {one['prompts']} by {one['score']}" for one in candidates)
        parts.insert(0, f"candidates {', '.join(stages)}")
    parts += [f"{phase} {seconds:.1f} s" for phase, seconds in provenance["seconds"].items()]
    cost = provenance.get("cost", {})
    if "of_rollouts" in cost:
        parts.append(f"gradients and scores took {cost['of_rollouts']:.2f} x the time of the rollouts")
    return f"LearnAlign, step {provenance['global_step']}: " + "; ".join(parts)


def representation(selection: "Selection") -> str:
    """Return what a console shows of a selection."""
    config, outcomes = selection.provenance.get("config", {}), _outcomes(selection)
    parts = [f"{len(selection.indices)} of {selection.num_pool()} prompts", f"score={config.get('score')!r}"]
    parts.append(f"step={selection.provenance.get('global_step')}")
    if outcomes:
        parts.append(f"learnable={selection.num_learnable()}")
        parts += [f"{name}={means}" for name, means in outcomes.items()]
    return f"Selection({', '.join(parts)})"


def _outcomes(selection):
    return {
        name: f"{pool:.3f} (pool)" + ("" if math.isnan(chosen) else f", {chosen:.3f} (chosen)")
        for name, (pool, chosen) in selection.outcomes().items()
        if not math.isnan(pool)
    }


def live_shares(column: Callable[[str], np.ndarray]) -> tuple[float, float, float]:
    """
    Return shares of live groups while prompts were chosen: of the chosen ones, and of the uniform draws beside them;
    and the number of these draws. Where nothing was chosen the last two are those of the whole run.

    Args:
        column (`Callable`): returns a column of the history by its name, of shape `(rows,)`.
    """
    chosen, uniform, draws = (column(name).astype(float) for name in ("live_chosen", "live_uniform", "uniform_draws"))
    groups, choosing = np.diff(column("groups"), prepend=0), column("choosing") > 0
    part = choosing if choosing.any() else np.ones(len(choosing), bool)
    return (
        _weighted(chosen[part], (groups - draws)[part]),
        _weighted(uniform[part], draws[part]),
        float(draws[part].sum()),
    )


def _weighted(values, weights):
    known = np.isfinite(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else math.nan
