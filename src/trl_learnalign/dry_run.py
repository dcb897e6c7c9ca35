"""Estimates the cost of a selection from a small one that is not kept."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Trainer

from .advice import plan_warnings
from .config import LearnAlignConfig
from .host import find_host
from .parts import rollouts_at_once
from .scores import score_name
from .selector import SelectionRun, checked_run
from .summaries import OUTCOME_LABELS


def plan_selection(trainer: Trainer, config: LearnAlignConfig) -> tuple[str, bool]:
    """
    A text about the cost of a selection, and whether any prompt was learnable. A small selection is made in a
    temporary directory, of one batch of prompts per process, or more up to 16 prompts, and its time is scaled to the
    whole pool. Every process must call this.
    """
    host = find_host(trainer)
    whole = checked_run(host, config, 0)
    prompts, world = len(whole.pool), trainer.accelerator.num_processes
    lines = [f"pool: {prompts:,} prompts x {whole.num_rollouts} rollouts = {prompts * whole.num_rollouts:,}"]
    if not config.measures:
        number = min(config.num_prompts, prompts)
        how = "chosen at random" if config.score == "random" else f"chosen by {score_name(config.score)}"
        return f"pool: {prompts:,} prompts\n{number:,} would be {how}: no rollouts, no gradients", True
    batch = whole.prompts_at_once
    tried = min(prompts, world * batch * math.ceil(16 / (world * batch)))
    trial = SelectionRun(
        host, replace(config, candidate_prompts=tried, num_prompts=tried, rollout_batch_prompts=batch), 0
    )
    with tempfile.TemporaryDirectory() as directory:
        trial.path = Path(directory) / "learnalign" / "trial"
        with trial.peers:
            selection = trial._run()
    more, learnable = prompts / tried, selection.num_learnable()
    times = {phase: seconds * more for phase, seconds in selection.provenance["seconds"].items()}
    dim, device = config.projection_dim, trainer.accelerator.device
    gradients = (
        f"about {learnable * more:,.0f} prompts" if learnable else "not known, since none of these was learnable"
    )
    lines += [
        f"tried: {tried} prompts on {world} process{'es' * (world > 1)}, of which {learnable} are learnable "
        f"({learnable / tried:.0%})",
        *(f"{OUTCOME_LABELS[name]}: {pool:.3f}" for name, (pool, _) in selection.outcomes().items() if pool == pool),
        f"at once: {batch * rollouts_at_once(host, whole.num_rollouts)} rollouts a process; "
        "more at once (rollout_batch_prompts) are faster, if memory allows",
        f"gradients: {gradients if 'gradients' in config.measures else 'none'}",
        "expected time: "
        + ", ".join(f"{phase} {seconds:,.0f} s" for phase, seconds in times.items())
        + f"; {sum(times.values()) / 60:,.1f} minutes in all",
    ]
    if dim is not None and learnable and "gradients" in config.measures:
        lines.append(f"on disk while it runs: about {learnable * more * dim * 4 / 1e9:,.2f} GB of gradient features")
    if device.type == "cuda":
        lines.append(f"most memory of the device so far: {torch.cuda.max_memory_allocated(device) / 2**30:,.1f} GiB")
    lines += plan_warnings(selection, learnable * more, min(config.num_prompts, prompts))
    return "\n".join([*lines, "Nothing was kept."]), learnable > 0
