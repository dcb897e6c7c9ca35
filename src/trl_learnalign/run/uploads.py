"""A warning about files of a run that hold prompts and are uploaded to the Hub with the model."""

import logging
import weakref
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from transformers import Trainer

from ..config import LearnAlignConfig


logger = logging.getLogger(__name__)

# Checkpoints hold the features of prompts
_CHECKPOINTS = {"checkpoint": " and in the last checkpoint", "all_checkpoints": " and in all checkpoints"}
Files = Literal["selections", "online", "report", "none"]
_WARNED: weakref.WeakSet[Trainer] = weakref.WeakSet()


def warn_of_uploads(
    trainer: Trainer, config: LearnAlignConfig, now: bool = False, files: Files = "selections"
) -> None:
    """
    Warn, once for a trainer and on the main process, if `push_to_hub` uploads files that hold prompts to a repository
    that is public, or may be.

    Args:
        trainer ([`~transformers.Trainer`]): whose `output_dir` is uploaded.
        config ([`LearnAlignConfig`]): of its sampler.
        now (`bool`, *optional*, defaults to `False`): whether `trainer.push_to_hub()` was called, which uploads
            without `push_to_hub=True` as well.
        files (`str`, *optional*, defaults to `"selections"`): those that the run writes: of selections, of the online
            schedule, only a report, or none.
    """
    args = trainer.args
    if not (now or args.push_to_hub) or not trainer.accelerator.is_main_process or trainer in _WARNED:
        return
    _WARNED.add(trainer)
    names = _with_prompts(config, args, files)
    repo = getattr(trainer, "hub_model_id", None) or args.hub_model_id or Path(str(args.output_dir)).absolute().name
    private = _is_private(repo, args.hub_token)
    if not names or private or (private is None and args.hub_private_repo):
        return
    visible = (
        "is public"
        if private is False
        else "will be public unless it is private already: the Hub could not be asked, and `hub_private_repo` is not "
        "True"
    )
    online = files == "online"
    also = _CHECKPOINTS.get(args.hub_strategy, "") if online and config.prompt_features else ""
    settings = [name for name in ("write_report", "prompt_features") if getattr(config, name)]
    without = f", or {' and '.join(f'`{name}=False`' for name in settings)}" if online and settings else ""
    logger.warning(
        f"`push_to_hub{'=True' * args.push_to_hub}` uploads prompts and completions of your data, or what is computed "
        f"from them: {', '.join(names)}, in `learnalign/`{also}, go to '{repo}', "
        f"which {visible}. To keep them private, set `hub_private_repo=True`{without}; a "
        "repository that exists keeps its visibility, so change that on the Hub. Rollouts, measures and first weights "
        "are in `_learnalign/` and are never uploaded."
    )


def _with_prompts(config, args, files) -> list[str]:
    directory = Path(args.output_dir) / "learnalign"
    exported = sorted(file.name for file in directory.glob("selected.*"))  # by `trl-learnalign select`
    report = ["report.html"] * (config.write_report and files != "none")
    if files == "online":
        features = ["prompt_features-*.safetensors (hidden states of the prompts)"] * config.prompt_features
        return report + ["suspects.parquet", "online.json"] * config.write_report + features + exported
    return report + ["step-*/texts.parquet"] * (files == "selections") + exported


def _is_private(repo, token) -> bool | None:
    """Ask the Hub whether the repository of a model is private; `None` without an answer."""
    try:
        return HfApi(token=token).model_info(repo).private
    except Exception:  # no network, or no right to ask; the upload itself complains of what is wrong
        return None
