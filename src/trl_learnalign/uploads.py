"""Which files of a run hold prompts and are uploaded to the Hub with the model."""

import logging
import weakref
from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer

from .config import LearnAlignConfig


logger = logging.getLogger(__name__)

_WARNED = weakref.WeakSet()  # trainers


def warn_of_uploads(trainer: Trainer, config: LearnAlignConfig) -> None:
    """
    Warns, once for a trainer and on the main process, if `push_to_hub` uploads files that hold prompts to a repository
    that is public, or may be.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.accelerator.is_main_process or trainer in _WARNED:
        return
    _WARNED.add(trainer)
    files = _with_prompts(config, Path(args.output_dir) / "learnalign")
    private = _is_private(trainer.hub_model_id, args.hub_token)
    if not files or private or (private is None and args.hub_private_repo):
        return
    visible = (
        "is public"
        if private is False
        else "will be public unless it is private already: the Hub could not be asked, and `hub_private_repo` is not "
        "True"
    )
    without = ", or `write_report=False`" if config.schedule == "online" else ""
    logger.warning(
        f"`push_to_hub=True` uploads prompts and completions of your data: {', '.join(files)}, in `learnalign/`, go "
        f"to '{trainer.hub_model_id}', which {visible}. To keep them private, set `hub_private_repo=True`{without}; a "
        "repository that exists keeps its visibility, so change that on the Hub. Rollouts, measures and first weights "
        "are in `_learnalign/` and are never uploaded."
    )


def _with_prompts(config, directory) -> list[str]:
    exported = sorted(file.name for file in directory.glob("selected.*"))  # by `trl-learnalign select`
    if config.schedule == "online":
        return ["report.html", "suspects.parquet", "online.json"] * config.write_report + exported
    return ["report.html"] * config.write_report + ["step-*/texts.parquet"] + exported


def _is_private(repo, token) -> bool | None:
    """Of a model's repository; `None` if the Hub does not say."""
    try:
        return HfApi(token=token).model_info(repo).private
    except Exception:  # no network, or no right to ask; the upload itself complains of what is wrong
        return None
