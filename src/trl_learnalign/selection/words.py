"""Selections and online runs in a few words and numbers."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..scores.builtin import manner


if TYPE_CHECKING:
    from .result import Selection

# Labels of what `Selection.outcomes` holds
OUTCOME_LABELS = {"success_rate": "mean success rate", "reward_mean": "mean reward", "reward_std": "mean reward std"}


def how(selection: "Selection") -> str:
    """How prompts were chosen."""
    return manner(selection.provenance["config"]["score"]) + instead(selection)


def instead(selection: "Selection") -> str:
    """That another score than the one of the configuration was used, and why; empty where none was."""
    other = selection.provenance.get("target", {}).get("instead")
    return f" (by {other} instead, as no prompt of the target was learnable)" if other else ""


def summary(selection: "Selection") -> str:
    """One line: pool, learnable, chosen, mean outcomes, time of each phase, cost of the gradients."""
    provenance = selection.provenance
    by = "" if "rollouts" in selection.measures else f" {how(selection)}"
    pool = f"pool {selection.num_pool()}"
    if provenance["unscorable"]:
        pool += f" ({len(provenance['unscorable'])} unscorable: no finite reward)"
    chosen = f"chosen {len(selection.indices)}" + (by or instead(selection))
    if provenance.get("duplicates"):
        chosen += f" ({len(provenance['duplicates'])} duplicates left out)"
    parts = [pool, chosen]
    if not by:
        outcomes = [f"{OUTCOME_LABELS[name]} {means}" for name, means in _outcomes(selection).items()]
        parts = [pool, f"learnable {selection.num_learnable()}", chosen, *outcomes]
    parts += [f"{phase} {seconds:.1f} s" for phase, seconds in provenance["seconds"].items()]
    cost = provenance.get("cost", {})
    if "of_rollouts" in cost:
        parts.append(f"gradients and scores took {cost['of_rollouts']:.2f} x the time of the rollouts")
    return f"LearnAlign, step {provenance['global_step']}: " + "; ".join(parts)


def representation(selection: "Selection") -> str:
    """What a console shows of it."""
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


def live_shares(column, chunk_prompts: int) -> tuple[float, float, float]:
    """
    Shares of live groups over the chunks that were chosen: of chosen prompts, of the uniform draws beside them, and
    the number of these. Where nothing was chosen the last two are those of all chunks.

    Args:
        column: gives a column of the history by its name, of shape `(chunks,)`.
        chunk_prompts (`int`): prompts of a chunk.
    """
    chosen, uniform, draws = (column(name).astype(float) for name in ("live_chosen", "live_uniform", "uniform_draws"))
    choosing = column("choosing") > 0
    part = choosing if choosing.any() else np.ones(len(choosing), bool)
    return (
        _weighted(chosen[part], chunk_prompts - draws[part]),
        _weighted(uniform[part], draws[part]),
        float(draws[part].sum()),
    )


def _weighted(values, weights):
    known = np.isfinite(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else math.nan
