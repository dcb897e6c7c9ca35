"""Estimates the cost of a selection from a small one that is not kept."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Trainer

from ..config import LearnAlignConfig
from ..host import find_host
from ..measures.gradients import EXACT_BYTES
from ..measures.parts import rollouts_at_once
from ..scores.builtin import score_name
from .run import SelectionRun, checked_run
from .warnings import plan_warnings
from .words import OUTCOME_LABELS


def plan_selection(trainer: Trainer, config: LearnAlignConfig) -> tuple[str, bool]:
    """
    A text about the cost of a selection, and whether any prompt was learnable. A small selection is made in a
    temporary directory, of one batch of prompts per process, or more up to 16 prompts, and its time is scaled to the
    whole pool. Every process must call this.
    """
    host = find_host(trainer)
    host.look_at_functions()
    whole = checked_run(host, config, 0)
    prompts, each, world = len(whole.pool), whole.num_rollouts, trainer.accelerator.num_processes
    if not config.measures:
        number = min(config.num_prompts, prompts)
        how = "chosen at random" if config.score == "random" else f"chosen by {score_name(config.score)}"
        return f"pool: {prompts:,} prompts\n{number:,} would be {how}: no rollouts, no gradients", True
    batch = whole.prompts_at_once
    tried = min(prompts, world * batch * math.ceil(16 / (world * batch)))
    small = replace(config, candidate_prompts=tried, num_prompts=tried, rollout_batch_prompts=batch)
    trial = SelectionRun(host, small, 0, keep_measures=True)
    with tempfile.TemporaryDirectory() as directory:
        trial.path = Path(directory) / "learnalign" / "trial"
        with trial.peers:
            selection = trial._run()
            written = trial.peers.gather(_bytes_of(trial.path_of_measures))  # each process has a directory of its own
    host.note_functions()
    more, learnable = prompts / tried, selection.num_learnable()
    times = _whole(selection.provenance["seconds"], more)
    disk = _whole(_summed(written), more)
    if config.projection_dim is None and disk.get("gradients", 0) > world * EXACT_BYTES:  # computed twice instead
        del disk["gradients"]
    gradients = (
        f"about {learnable * more:,.0f} prompts" if learnable else "not known, since none of these was learnable"
    )
    lines = [f"pool: {prompts:,} prompts x {each} rollouts = {prompts * each:,}"]
    if whole.target is not None:
        lines.append(f"target: {len(whole.target):,} prompts x {each} rollouts = {len(whole.target) * each:,}")
    lines += [
        f"tried: {tried} prompts on {world} process{'es' * (world > 1)}, of which {learnable} are learnable "
        f"({learnable / tried:.0%})",
        *(f"{OUTCOME_LABELS[name]}: {pool:.3f}" for name, (pool, _) in selection.outcomes().items() if pool == pool),
        f"at once: {batch * rollouts_at_once(host, each)} rollouts a process; "
        "more at once (rollout_batch_prompts) are faster, if memory allows",
        f"gradients: {gradients if 'gradients' in config.measures else 'none'}",
        "expected time: "
        + ", ".join(f"{phase} {seconds:,.0f} s" for phase, seconds in times.items())
        + f"; {sum(times.values()) / 60:,.1f} minutes in all",
        f"on disk while it runs: about {_size(sum(disk.values()))} ("
        + ", ".join(f"{measure.replace('-', ' ')} {_size(number)}" for measure, number in disk.items())
        + ")",
    ]
    device = trainer.accelerator.device
    if device.type == "cuda":
        lines.append(f"most memory of the device so far: {torch.cuda.max_memory_allocated(device) / 2**30:,.1f} GiB")
    lines += plan_warnings(selection, learnable * more, min(config.num_prompts, prompts))
    return "\n".join([*lines, "Nothing was kept."]), learnable > 0


def _bytes_of(directory) -> dict[str, int]:
    """Of each measure in a directory, what its records take."""
    return {
        path.name: sum(file.stat().st_size for file in path.glob("*.log")) for path in sorted(directory.glob("[!.]*/"))
    }


def _summed(parts):
    return {name: sum(part.get(name, 0) for part in parts) for name in parts[0]}


def _whole(amounts: dict[str, float], more: float) -> dict[str, float]:
    """Those of the whole pool, which is `more` times the part that was tried. The target is always whole."""
    return {name: amount if name.startswith("target") else amount * more for name, amount in amounts.items()}


def _size(number) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"
