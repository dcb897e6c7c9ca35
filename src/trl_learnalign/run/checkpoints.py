"""The last complete checkpoint of [`~transformers.Trainer`], to resume from."""

import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer, utils
from transformers import trainer as names

from ..ground.peers import Peers


logger = logging.getLogger(__name__)

# Files that Trainer writes into a checkpoint and reads back. Files of callbacks, and directories of FSDP and
# DeepSpeed, have other formats and are not checked
_SAFETENSORS = (utils.SAFE_WEIGHTS_NAME, utils.ADAPTER_SAFE_WEIGHTS_NAME)
_ZIPPED = (  # by `torch.save`
    utils.WEIGHTS_NAME,
    utils.ADAPTER_WEIGHTS_NAME,
    f"{names.FSDP_MODEL_NAME}.bin",
    names.OPTIMIZER_NAME,
    names.OPTIMIZER_NAME_BIN,
    names.SCHEDULER_NAME,
    names.SCALER_NAME,
    names.TRAINING_ARGS_NAME,
)
_ENTROPY = "entropy_ctrl_state.json"  # GRPOTrainer writes it with `use_adaptive_entropy`, after all else
_JSON = (utils.CONFIG_NAME, utils.ADAPTER_CONFIG_NAME, _ENTROPY)
_INDICES = (utils.SAFE_WEIGHTS_INDEX_NAME, utils.WEIGHTS_INDEX_NAME)


def damage(checkpoint: Path, shared: bool = True) -> str | None:
    """
    Say what is wrong with a checkpoint, or `None` if it is complete. A run killed while writing a checkpoint leaves
    one without `trainer_state.json`, which Trainer writes last, or with files cut short. `shared`: whether the
    processes of all nodes write to the same disk.
    """
    state = checkpoint / names.TRAINER_STATE_NAME
    try:
        document = json.loads(state.read_text(encoding="utf-8"))
        step = document["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{state.name} cannot be read ({error!r})"
    if type(step) is not int:
        return f"{state.name} has no step number, but {step!r}"
    files = [checkpoint / name for name in (*_SAFETENSORS, *_ZIPPED, *_JSON)]
    files += sorted(path for path in checkpoint.glob("rng_state*.pth") if re.fullmatch(r"rng_state(_\d+)?", path.stem))
    for name in (utils.ADAPTER_SAFE_WEIGHTS_NAME, utils.ADAPTER_CONFIG_NAME):  # of adapters beside the first
        files += sorted(checkpoint.glob(f"*/{name}"))
    for file in files:
        if file.is_file() and (reason := _damage_of_file(file)) is not None:
            return reason
    for name in _INDICES:
        if (checkpoint / name).is_file() and (reason := _damage_of_shards(checkpoint / name)) is not None:
            return reason
    states = document.get("stateful_callbacks")
    ours = states.get("learnalign") if isinstance(states, dict) else None
    processes = ours.get("num_processes") if isinstance(ours, dict) else None
    if shared and isinstance(processes, int) and processes > 1:
        missing = [rank for rank in range(processes) if not (checkpoint / f"rng_state_{rank}.pth").is_file()]
        if 0 < len(missing) < processes:
            return f"rng_state_{missing[0]}.pth is missing"
    return _damage_of_ours(checkpoint, ours) if isinstance(ours, dict) else None


def _damage_of_file(file):
    try:
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"{file.name} is damaged ({error})"


def _damage_of_ours(checkpoint, ours):
    """Look at the state and files of the schedule: `trainer_state.json` names each file with its digest."""
    arrays, files = ours.get("arrays"), ours.get("files")
    named = dict(files) if isinstance(files, dict) else {}
    if isinstance(arrays, dict):
        named[str(arrays.get("file"))] = arrays.get("sha256")
    for name, digest in named.items():
        file = checkpoint / Path(name).name
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError:
            return f"{file.name} is missing"
        if found != digest:
            return f"{file.name} does not agree with its checksum"


def _damage_of_shards(index):
    """Look at weights that are too large for one file."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{index.name} is damaged ({error!r})"
    for name in shards:
        file = index.with_name(str(name))
        if not file.is_file():
            return f"{file.name} is missing"
        if (reason := _damage_of_file(file)) is not None:
            return reason


def survey(output_dir: str, wanted: str | bool, shared: bool = True) -> dict:
    """
    Look at the checkpoints, on a process that writes them: `damage` of the one that is `wanted`, or, if that is
    `True`, of all in `output_dir`, latest first; and whether a run has `started` there.
    """
    if wanted is not True:
        return {"started": True, "damage": {str(wanted): damage(Path(str(wanted)), shared)}}
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            steps[int(match[1])] = path
    return {
        "started": (Path(output_dir) / "learnalign").is_dir(),
        "damage": {str(steps[step]): damage(steps[step], shared) for step in sorted(steps, reverse=True)},
    }


def whole_checkpoint(output_dir: str, wanted: str | bool, surveys: list[dict]) -> str | bool | None:
    """
    Decide what to resume from: `wanted`, if it names a complete checkpoint; if it is `True`, the last complete one in
    `output_dir`. If there is no checkpoint: `None` if a run started there and was killed before its first one, `True`
    if no run started there.

    Args:
        output_dir (`str`): of the run.
        wanted (`str` or `bool`): as [`~transformers.Trainer.train`] takes it.
        surveys (`list[dict]`): [`survey`] of every process that writes checkpoints: the main process, or with
            `save_on_each_node` one of each node, all of which must hold a complete one.

    Raises:
        `ValueError`: `wanted` names a checkpoint that is not complete, or there are checkpoints and none is complete.
    """
    paths = list(dict.fromkeys(path for view in surveys for path in view["damage"]))
    if wanted is True:
        paths = sorted(paths, key=lambda path: int(path.rpartition("-")[2]), reverse=True)
    reasons = {path: _first(view["damage"].get(path, "it is missing on a node") for view in surveys) for path in paths}
    if wanted is not True:
        if reasons[str(wanted)] is not None:
            raise ValueError(
                f"The checkpoint '{wanted}' is not complete: {reasons[str(wanted)]}. Pass "
                "`resume_from_checkpoint=True` for the last one that is."
            )
        return wanted
    passed: list[str] = []
    for path, reason in reasons.items():
        if reason is None:
            for warning in passed:
                logger.warning(warning)
            return path
        passed.append(
            f"'{path}' is not complete ({reason}), as the run was probably killed while it wrote it. The one before "
            "it is used."
        )
    if reasons:
        listed = "; ".join(f"'{path}': {reason}" for path, reason in reasons.items())
        raise ValueError(
            f"None of the checkpoints in '{output_dir}' is complete ({listed}), so there is nothing to resume from. A "
            "run that was killed while it wrote its first checkpoint leaves this. Delete these directories to start "
            "from the beginning (finished selections are used again), or pass the path of another checkpoint."
        )
    if not any(view["started"] for view in surveys):
        return True
    logger.warning(f"The run in '{output_dir}' left no checkpoint, so it starts from the beginning.")
    return None


def _first(reasons):
    return next((reason for reason in reasons if reason is not None), None)


def checkpoint_to_resume(trainer: Trainer, wanted: str | bool) -> str | bool | None:
    """
    Find the checkpoint that a trainer resumes from, see [`whole_checkpoint`], or the error, on those processes that
    write any; all come to the same.
    """
    args = trainer.args
    path, shared = str(args.output_dir), not args.save_on_each_node
    with Peers(trainer.accelerator) as peers:
        surveys = peers.gather(survey(path, wanted, shared) if args.should_save else None)
    return whole_checkpoint(path, wanted, [view for view in surveys if view is not None])
