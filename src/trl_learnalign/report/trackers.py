"""Logs to TensorBoard, W&B and trackio: values, the table of scores, and the figures of the report."""

import io
import logging

import numpy as np

from ..selection.excerpt import scores_of, shown_rows
from ..selection.stages import load_run


logger = logging.getLogger(__name__)


def log_values(selection, warmup_prompts: int) -> dict[str, float]:
    """Return the numbers of a selection by their names in a log; docs/files.md explains them."""
    provenance = selection.provenance
    values = {
        "learnalign/stage": provenance["stage"],
        "learnalign/pool_prompts": selection.scores.num_rows,
        "learnalign/unscorable_prompts": len(provenance["unscorable"]),
        "learnalign/selected_prompts": len(selection.indices),
        "learnalign/prompts_before": warmup_prompts,
    }
    if "rollouts" in selection.measures:
        values["learnalign/learnable_prompts"] = selection.num_learnable()
        values["learnalign/learnable_fraction"] = selection.num_learnable() / max(1, selection.scores.num_rows)
        for name, (pool, chosen) in selection.outcomes().items():
            values |= {f"learnalign/{name}_pool": pool, f"learnalign/{name}_selected": chosen}
        table = selection.to_pandas()
        values["learnalign/alignment_pool"] = table["alignment"].mean()
        values["learnalign/alignment_selected"] = table.loc[table["selected"], "alignment"].mean()
    for phase, seconds in provenance["seconds"].items():
        values[f"learnalign/seconds_{phase.replace(' ', '_')}"] = seconds
    return {name: value for name, value in values.items() if value == value}  # a mean over nothing is NaN


def zero_variance(history: list[dict], layout, start: int) -> float | None:
    """
    Average the share of groups without a gradient over what was generated from chunk `start` on; `None` if nothing of
    it was logged.

    Args:
        history (`list[dict]`): the trainer's log. An entry with a `loss` covers what was generated since the one
            before.
        layout ([`Layout`]): says which chunk was generated at which step.
        start (`int`): the first chunk that counts.
    """
    shares, since = [], 0
    for entry in history:
        if "loss" not in entry:
            continue
        # A run that was resumed inside a chunk generates the rest of it again, so that chunk counts
        first = layout.batches_trained(since) // layout.repeats
        if first >= start and entry.get("frac_reward_zero_std") is not None:
            shares.append(entry["frac_reward_zero_std"])
        since = entry["step"]
    return sum(shares) / len(shares) if shares else None


def log_media(trainer, selection) -> None:
    """
    Log the table of scores, best first, as TRL logs completions, and the figures of the report. To be called before
    the values of the selection are logged, which W&B puts into the same step. All of this is also on disk, so a
    failure here does not end the run.
    """

    def media():
        step, drawings = selection.provenance["global_step"], []
        if selection.provenance["config"]["write_report"]:
            from ..selection import figures

            drawings = figures.drawings(selection, load_run(trainer.args.output_dir, until=step))
        return {"learnalign/scores": scores_of(selection, shown_rows(selection))}, drawings, step

    _log(trainer, "table of scores and the figures", media)


def log_figures(trainer, drawings: list) -> None:
    """
    Log the figures of a report at the step that just ended. The report has them, so a failure here does not end the
    run.
    """
    _log(trainer, "figures", lambda: ({}, drawings, trainer.state.global_step))


def _log(trainer, what, media):
    """Log what `media()` returns: tables by name, drawings, and their step."""
    used = set(trainer.args.report_to or ()) & {"tensorboard", "wandb", "trackio"}
    if not used:
        return
    try:
        tables, drawings, step = media()
        images = _images(drawings)
        for name, log in (("tensorboard", _to_tensorboard), ("wandb", _to_wandb), ("trackio", _to_trackio)):
            if name in used:
                log(trainer, tables, images, step)
    except Exception as error:
        logger.warning(
            f"The {what} could not be logged ({error!r}). They are in '{trainer.args.output_dir}/learnalign'."
        )


def _images(drawings) -> dict:
    """Draw the figures as PIL images, by name."""
    from PIL import Image  # which comes with matplotlib

    return {
        f"learnalign/figures/{drawing.name}": Image.open(io.BytesIO(drawing.png())).convert("RGB")
        for drawing in drawings
    }


def _to_tensorboard(trainer, tables, images, step):
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            for name, image in images.items():
                writer.add_image(name, np.asarray(image), step, dataformats="HWC")


def _to_wandb(trainer, tables, images, step):
    import wandb

    if wandb.run is not None:
        wandb.log(_media(wandb, tables, images), commit=False)


def _to_trackio(trainer, tables, images, step):
    import trackio

    trackio.log({"train/global_step": step} | _media(trackio, tables, images))


def _media(module, tables, images):
    made = {name: module.Table(dataframe=table) for name, table in tables.items()}
    return made | {name: module.Image(image) for name, image in images.items()}
