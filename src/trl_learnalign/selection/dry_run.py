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
from ..measures.registry import spending
from ..measures.rollouts import prompts_at_once
from ..scores.builtin import manner
from .run import SelectionRun, checked_run
from .warnings import plan_warnings
from .words import OUTCOME_LABELS


_LEAST_TRIED = {"forward": 256, "rollouts": 16, "gradients": 16}  # prompts of the small selection


def plan_selection(trainer: Trainer, config: LearnAlignConfig) -> tuple[str, bool]:
    """
    Return a text about the cost of a selection, and whether any prompt could be chosen. A small selection is made in a
    temporary directory, of one batch of prompts per process or a few more, and its time is scaled to the whole pool.
    Every process must call this.
    """
    host = find_host(trainer)
    host.look_at_functions()
    whole = checked_run(host, config, 0)
    paid, prompts, world = whole.context.prices, len(whole.pool), trainer.accelerator.num_processes
    wanted = min(config.num_prompts, prompts)
    if not paid:
        return f"pool: {prompts:,} prompts\n{wanted:,} would be chosen {manner(config.score)}: no rollouts", True
    each = whole.context.num_rollouts
    batch = prompts_at_once(host, config, each, prompts)
    together = world * (batch if "rollouts" in paid else 1)
    least = min(_LEAST_TRIED[price] for price in paid)
    tried = min(prompts, together * math.ceil(least / together))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's configuration has given all of its warnings
        small = replace(config, candidate_prompts=tried, num_prompts=tried)
        if "rollouts" in paid:
            small = replace(small, rollout_batch_prompts=batch)
    trial = SelectionRun(host, small, 0, keep_measures=True)
    with tempfile.TemporaryDirectory() as directory:
        trial.path = Path(directory) / "learnalign" / "trial"
        with trial.peers:
            selection = trial._run()
            written = trial.peers.gather(_bytes_of(trial.path_of_measures))  # each process has a directory of its own
    host.note_functions()
    more, eligible = prompts / tried, len(selection.eligible())
    times = _whole(selection.provenance["seconds"], more)
    disk = _whole(_summed(written), more)
    if config.projection_dim is None and disk.get("gradients", 0) > world * EXACT_BYTES:  # computed twice instead
        del disk["gradients"]
    targets = 0 if whole.context.target is None else len(whole.context.target)
    lines = [f"pool: {spending(config.measures, prompts, 0, each)}"]
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
    if "rollouts" in paid or "gradients" in paid:
        lines.append(f"gradients: {_gradients(paid, with_gradient)}")
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


def _gradients(paid, prompts) -> str:
    if "gradients" not in paid:
        return "none"
    return f"about {prompts:,.0f} prompts" if prompts else "not known, since none of these was learnable"


def _bytes_of(directory) -> dict[str, int]:
    """Return what the records of each measure in a directory take."""
    return {
        path.name: sum(file.stat().st_size for file in path.glob("*.log")) for path in sorted(directory.glob("[!.]*/"))
    }


def _summed(parts):
    return {name: sum(part.get(name, 0) for part in parts) for name in parts[0]}


def _whole(amounts: dict[str, float], more: float) -> dict[str, float]:
    """
    Scale amounts to the whole pool, which is `more` times the part that was tried. The target is always whole, and for
    a density each prompt is compared with each.
    """
    power = {name: 0 if name.startswith("target") else 2 if name.endswith("density") else 1 for name in amounts}
    return {name: amount * more ** power[name] for name, amount in amounts.items()}


def _size(number) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"
