"""An estimate of the cost of a selection, from a small one that is not kept."""

import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Trainer

from ..config import LearnAlignConfig
from ..host import find_host
from ..measures.gradients import EXACT_BYTES
from ..measures.parts import rollouts_at_once
from ..measures.registry import funnel, spending
from ..measures.rollouts import prompts_at_once
from ..scores.builtin import manner
from .run import SelectionRun, checked_run
from .warnings import plan_warnings
from .words import OUTCOME_LABELS


_LEAST_TRIED = {"forward": 256, "rollouts": 16, "gradients": 16}  # prompts of the small selection
_LEAST_RACE = 64  # of which some are to be left behind


def plan_selection(trainer: Trainer, config: LearnAlignConfig) -> tuple[str, bool]:
    """
    Return a text about the cost of a selection, and whether any prompt could be chosen. A small selection is made in a
    temporary directory, of one batch of prompts per process or a few more, and its time is scaled to the whole pool.
    Every process must call this.
    """
    host = find_host(trainer)
    host.look_at_functions()
    if config.gradient_direction == "adam" and config.warmup_prompts and config.target_checkpoints is None:
        config = replace(config, gradient_direction="plain")  # Adam has no state yet; the backward passes are the same
    whole = checked_run(host, config, 0)
    paid, world = whole.context.prices, trainer.accelerator.num_processes
    candidates, prompts = funnel(config, len(whole.pool))
    wanted = min(config.num_prompts, prompts)
    if not paid:
        return f"pool: {prompts:,} prompts\n{wanted:,} would be chosen {manner(config.score)}: no rollouts", True
    each = whole.context.num_rollouts
    batch = prompts_at_once(host, config, each, prompts)
    together = world * (batch if "rollouts" in paid else 1)
    least = min(_LEAST_TRIED[price] for price in paid)
    racing = "rollouts" in paid and config.rollouts == "racing"
    tried = min(prompts, together * math.ceil((_LEAST_RACE if racing else least) / together))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's configuration has given all of its warnings
        small = replace(config, candidate_prompts=tried, candidate_score=None, num_prompts=tried)
        if "rollouts" in paid:
            small = replace(small, rollout_batch_prompts=batch)
        if racing:  # for as large a part of the prompts
            small = replace(small, num_prompts=math.ceil(tried * wanted / prompts))
    selection, written = _tried(host, small)
    more, eligible = prompts / tried, len(selection.eligible())
    times, disk = {}, _whole(written, more)
    left = len(whole.pool)
    for stage in whole.stages:
        if stage.measures:
            tried_first = min(left, world * math.ceil(_LEAST_TRIED["forward"] / world))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                first, on_disk = _tried(host, replace(stage, candidate_prompts=tried_first, num_prompts=tried_first))
            name, scale = f"candidates {manner(stage.score)}", left / tried_first
            times[name] = sum(first.provenance["seconds"].values()) * scale
            disk[name] = sum(on_disk.values()) * scale
        left = min(stage.num_prompts, left)
    times |= _whole(selection.provenance["seconds"], more)
    host.note_functions()
    if config.projection_dim is None and disk.get("gradients", 0) > world * EXACT_BYTES:  # computed twice instead
        del disk["gradients"]
    targets = 0 if whole.context.target is None else len(whole.context.target)
    lines = [
        *(f"candidates: {line}" for line in candidates),
        f"pool: {spending(config.measures, prompts, 0, each, racing)}",
    ]
    if targets:
        lines.append(f"target: {spending(config.measures, targets, 0, each)}")
    said = f"tried: {tried} prompts on {world} process{'es' * (world > 1)}"
    with_gradient = float(prompts)
    if "rollouts" in selection.measures:
        learnable = selection.num_learnable()
        with_gradient = learnable * more
        lines += [
            f"{said}, of which {learnable} are learnable ({learnable / tried:.0%})",
            *(
                f"{OUTCOME_LABELS[name]}: {pool:.3f}"
                for name, (pool, _) in selection.outcomes().items()
                if pool == pool
            ),
        ]
    else:
        lines.append(said)
    if "rollouts" in paid:
        lines.append(
            f"at once: {batch * rollouts_at_once(host, each)} rollouts a process; "
            "more at once (rollout_batch_prompts) are faster, if memory allows"
        )
    else:
        lines.append("rollouts: none")
    if race := selection.provenance.get("race"):
        lines.append(f"race: {race['rollouts'] / race['of']:.0%} of the rollouts are made")
    if "rollouts" in paid or "gradients" in paid:
        at = f", at {len(config.target_checkpoints)} checkpoints" if config.target_checkpoints else ""
        lines.append(f"gradients: {_gradients(paid, with_gradient)}{at}")
    lines += [
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
    lines += plan_warnings(selection, eligible * more, wanted)
    return "\n".join([*lines, "Nothing was kept."]), eligible > 0


def _tried(host, config):
    """Make a selection that is not kept; return it, and the bytes of what each measure wrote on all processes."""
    trial = SelectionRun(host, config, 0, keep_measures=True)
    with tempfile.TemporaryDirectory() as directory:
        trial.path = Path(directory) / "learnalign" / "trial"
        with trial.peers:
            selection = trial._run()
            written = trial.peers.gather(_bytes_of(trial.path_of_measures))  # each process has a directory of its own
    return selection, {name: sum(part.get(name, 0) for part in written) for name in written[0]}


def _gradients(paid, prompts) -> str:
    if "gradients" not in paid:
        return "none"
    return f"about {prompts:,.0f} prompts" if prompts else "not known, since none of these was learnable"


def _bytes_of(directory) -> dict[str, int]:
    """Return what the records of each measure in a directory take; unfinished microbatches are deleted."""
    files = {path.name: path.rglob("*.log") for path in sorted(directory.glob("[!.]*/"))}
    return {name: sum(file.stat().st_size for file in own) for name, own in files.items()}


def _whole(amounts: dict[str, float], more: float) -> dict[str, float]:
    """
    Scale amounts to the whole pool, which is `more` times the part that was tried. The target is always whole, and for
    a density each prompt is compared with each.
    """
    power = {name: 0 if name.startswith("target") else 2 if name.endswith("density") else 1 for name in amounts}
    return {name: amount * more ** power[name] for name, amount in amounts.items()}


def _size(number) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"
