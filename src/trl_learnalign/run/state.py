"""What a checkpoint holds of a schedule: values in trainer_state.json, arrays in a file beside it."""

import hashlib
import logging
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..config import FREE_BEFORE_SELECTION, FREE_ON_RESUME, FREE_WITHOUT_TARGET
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest, write_atomically
from ..ground.peers import Peers


logger = logging.getLogger(__name__)

# Key of the state in `TrainerState.stateful_callbacks`, and so in `trainer_state.json`: state and step are written
# together, so every checkpoint has both. It must not be the name of a callback class, else Trainer would try to
# build a callback from it.
STATE_KEY = "learnalign"
STATE_FILE = "learnalign_state.safetensors"


def split(state: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """The values of a nested state, and its arrays by their place in it, such as `"sampler/state/indices"`."""
    values, arrays = {}, {}
    for name, value in state.items():
        if isinstance(value, dict):
            values[name], inner = split(value)
            arrays |= {f"{name}/{path}": array for path, array in inner.items()}
        elif isinstance(value, np.ndarray):
            arrays[name] = np.ascontiguousarray(value)
        else:
            values[name] = value
    return values, arrays


def join(values: dict, arrays: dict[str, np.ndarray]) -> dict:
    """What was [`split`]."""
    state = {name: join(value, {}) if isinstance(value, dict) else value for name, value in values.items()}
    for path, array in arrays.items():
        *outer, name = path.split("/")
        place = state
        for step in outer:
            place = place[step]
        place[name] = array
    return state


def write_arrays(directory: Path, arrays: dict[str, np.ndarray], is_writer: bool) -> dict | None:
    """
    Writes the arrays into a checkpoint, where there are any. Returns what trainer_state.json is to say of them: the
    name of the file and its SHA-256.
    """
    if not arrays:
        return None
    content = save(dict(sorted(arrays.items())))
    if is_writer:
        for leftover in directory.glob(f".{STATE_FILE}.*.tmp"):  # of a run killed in this very checkpoint
            leftover.unlink(missing_ok=True)
        write_atomically(directory / STATE_FILE, lambda temporary: temporary.write_bytes(content))
    return {"file": STATE_FILE, "sha256": hashlib.sha256(content).hexdigest()}


def read_arrays(directory: Path, entry: dict | None) -> dict[str, np.ndarray]:
    """
    The arrays that [`write_arrays`] wrote, by its entry.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    if entry is None:
        return {}
    path = directory / STATE_FILE
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError("it does not agree with its checksum")
        return load(content)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"'{path}', the state of the schedule in this checkpoint, cannot be used: {error}. Resume from an earlier "
            "checkpoint."
        ) from error


def _decided(values, arrays) -> str:
    """
    Digest of what a schedule has decided: of all but floating-point numbers, whose last digits may differ between
    processors.
    """
    decided = {name: array for name, array in sorted(arrays.items()) if array.dtype.kind != "f"}
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in decided.items()}
    return digest([_without_floats(values), digests])


def _without_floats(value):
    if isinstance(value, dict):
        return {name: _without_floats(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(part) for part in value]
    return None if isinstance(value, float) else value


class CheckpointState:
    """
    Writes the state of a run into its checkpoints, and reads it back, strictly.

    Args:
        host ([`Host`]): the trainer.
        sampler ([`LearnAlignSampler`]): bound to it.
    """

    def __init__(self, host, sampler):
        self.host, self.sampler, self.config = host, sampler, sampler.config
        self._fingerprint = dataset_fingerprint(host.dataset)
        self.reset()
        host.on_resume(self._note)

    def reset(self) -> None:
        """Begins a new run."""
        self._free = FREE_BEFORE_SELECTION if self.sampler.schedule.selects else ()

    def selected(self, selection) -> None:
        """Notes what a run that is resumed may change after this [`Selection`]: no longer what chose its prompts."""
        if "instead" in selection.provenance.get("target", {}) and (selection.indices or not self._free):
            self._free = FREE_WITHOUT_TARGET
        elif selection.indices:
            self._free = ()

    def _note(self, directory):
        self.host.resumed_from = directory

    def write(self, directory: Path, is_writer: bool, peers: Peers, pending: int | None) -> None:
        """
        Puts the state into the trainer's, which the checkpoint in `directory` will hold, and its arrays into a file
        there, beside those that the schedule writes.

        Args:
            directory (`Path`): the checkpoint.
            is_writer (`bool`): whether this process writes what all have in common.
            peers ([`Peers`]): an open context.
            pending (`int`, *optional*): the start chunk of a selection that is due.

        Raises:
            `RuntimeError`: the processes have different states.
        """
        values, arrays = split({"sampler": self.sampler.state_dict()})
        entry = write_arrays(directory, arrays, is_writer)
        files = self.sampler.schedule.write_files(directory, is_writer)
        found = peers.gather(_decided(values, arrays))
        if len(set(found)) > 1:  # the same on all processes, so all raise
            raise RuntimeError(
                "The processes have different schedules and would train on different prompts. Their processors "
                f"or libraries may round differently (digests: {', '.join(one[:8] for one in found)}). Resume from "
                "the last checkpoint on equal machines."
            )
        content = values | {
            "arrays": entry,
            "files": files,
            "pending": pending,
            "dataset_fingerprint": self._fingerprint,
            "num_processes": self.host.accelerator.num_processes,
            "config": self.config.to_dict(),
            "stage": self.sampler.schedule.stage,
            "free": list(self._free),
        }
        self.host.trainer.state.stateful_callbacks[STATE_KEY] = content | {"sha256": digest(content)}

    def read(self, state) -> tuple[dict, int | None]:
        """
        The state of the schedule, and the start chunk of a selection that was due.

        Args:
            state ([`~transformers.TrainerState`]): as read from the checkpoint.

        Raises:
            `ValueError`: there is none, it is damaged, or it is of another dataset, stream or configuration.
        """
        if self.host.args.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip=True` starts the epoch over, so the resumed run would train on other prompts than "
                "the first. Leave it out: skipping data generates nothing."
            )
        saved = state.stateful_callbacks.get(STATE_KEY)
        if not isinstance(saved, dict):
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds no LearnAlign state, so it was written by a run "
                "without LearnAlign. Resume without the sampler, or start a new run from its weights."
            )
        content = {name: value for name, value in saved.items() if name != "sha256"}
        if saved.get("sha256") != digest(content) or not {"sampler", "pending", "dataset_fingerprint"} <= saved.keys():
            raise ValueError(
                f"The LearnAlign state in the checkpoint of step {state.global_step} is damaged: it does not agree "
                "with its checksum. Resume from an earlier checkpoint."
            )
        arrays = read_arrays(self.host.resumed_from, saved.get("arrays"))
        whole = join({"sampler": saved["sampler"]}, arrays)
        schedule_state = self.sampler.schedule_state(whole["sampler"])
        if saved["dataset_fingerprint"] != self._fingerprint:
            raise ValueError(
                "The training dataset has other rows, or the same in another order, than when the checkpoint was "
                "written, whose prompts are named by their rows. Resume with the same dataset, or start a new run."
            )
        # Versions before did not record the one or the other
        if "free" in saved:
            self._free = tuple(saved["free"])
        elif saved.get("stage") != 0:
            self._free = ()
        coming = saved["pending"] is not None or saved.get("stage") == 0
        self._check_config(saved.get("config", self.config.to_dict()), coming)
        return schedule_state, saved["pending"]

    def _check_config(self, saved, coming):
        changes = {
            name: f"`{name}` was {was!r} and is {now!r}"
            for name, (was, now) in self.config.changes(saved).items()
            if name not in ("num_prompts", "warmup_prompts", "schedule")  # the sampler compares them
        }
        free = FREE_ON_RESUME + self._free
        refused = [text for name, text in changes.items() if name not in free]
        if refused:
            chosen = "The selections so far were made" if self.sampler.schedule.selects else "Prompts were chosen"
            raise ValueError(
                f"The LearnAlignConfig is not that of the checkpoint: {'; '.join(refused)}. {chosen} "
                "with the old values. Resume with these, or start a new run in another `output_dir` (with "
                "the weights of this one, if you like). On resuming, only "
                f"{', '.join(f'`{name}`' for name in free)} may change."
            )
        said = [text for name, text in changes.items() if name not in ("max_tokens_per_batch", *_OF_FILES)]
        if said and self.host.accelerator.is_main_process:
            lacking = not (coming or self.config.reselect_every) and self.sampler.schedule.selects
            how = " None is to come: set `reselect_every`, or resume from a checkpoint before the last one." * lacking
            logger.warning(f"{'; '.join(said)}: the selections to come follow the new values.{how}")


_OF_FILES = ("save_rollouts", "write_report")
