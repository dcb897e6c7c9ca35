"""The state of a run in its checkpoints: values in trainer_state.json, arrays in a file beside it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import FREE_BEFORE_SELECTION, FREE_ON_RESUME, FREE_WITHOUT_TARGET
from ..curriculum.states import join, split
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest
from ..ground.peers import Peers
from ..run.state import decided, read_arrays, write_arrays
from .stream import Stream


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..host import Host


logger = logging.getLogger(__name__)

# Key of the state in `TrainerState.stateful_callbacks`, and so in `trainer_state.json`: state and step are written
# together, so every checkpoint has both. It must not be the name of a callback class, else Trainer would try to
# build a callback from it.
STATE_KEY = "learnalign"


class Checkpoint:
    """
    Knows the dataset and the settings that checkpoints are of, and the checkpoint that a run is resumed from.

    Args:
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of its sampler.
    """

    def __init__(self, host: "Host", config: "LearnAlignConfig"):
        self.host, self.config = host, config
        self._fingerprint = dataset_fingerprint(host.dataset)
        host.on_resume(self._note)

    def _note(self, directory):
        self.host.resumed_from = directory

    def changes(self, saved: dict) -> dict[str, str]:
        """Say by name which settings are others than those that a checkpoint has."""
        return {
            name: f"`{name}` was {was!r} and is {now!r}" for name, (was, now) in self.config.changes(saved).items()
        }


class CheckpointState(Checkpoint):
    """
    Writes the state of a run into its checkpoints, and reads it back, strictly.

    Args:
        stream ([`Stream`]): of its first run.
    """

    def __init__(self, host: "Host", config: "LearnAlignConfig", stream: Stream):
        super().__init__(host, config)
        self.begin(stream)

    def begin(self, stream: Stream) -> None:
        """Begin a run."""
        self.stream = stream
        self._free: tuple[str, ...] = FREE_BEFORE_SELECTION if stream.selects else ()

    def selected(self, selection) -> None:
        """Note what a run that is resumed may change after this [`Selection`]: no longer what chose its prompts."""
        if "instead" in selection.provenance.get("target", {}) and (selection.indices or not self._free):
            self._free = FREE_WITHOUT_TARGET
        elif selection.indices:
            self._free = ()

    def write(self, directory: Path, is_writer: bool, peers: Peers, pending: int | None) -> None:
        """
        Put the state into the trainer's, which the checkpoint in `directory` will hold, and its arrays into a file
        there, beside those that the schedule writes.

        Args:
            directory (`Path`): the checkpoint.
            is_writer (`bool`): whether this process writes what all have in common.
            peers ([`Peers`]): an open context.
            pending (`int`, *optional*): the start chunk of a selection that is due.

        Raises:
            `RuntimeError`: the processes have different states.
        """
        values, arrays = split({"sampler": self.stream.state_dict()})
        entry = write_arrays(directory, arrays, is_writer)
        files = self.stream.prepares.write_files(directory, is_writer)
        found = peers.gather(decided(values, arrays))
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
            "stage": self.stream.stage,
            "free": list(self._free),
        }
        states: Any = self.host.trainer.state.stateful_callbacks  # a dict, whatever transformers declares
        states[STATE_KEY] = content | {"sha256": digest(content)}

    def read(self, state) -> tuple[dict, int | None]:
        """
        Restore the draws. Return the state of the schedule, and the start chunk of a selection that was due.

        Args:
            state ([`~transformers.TrainerState`]): as read from the checkpoint.

        Raises:
            `ValueError`: the checkpoint holds no state, a damaged one, or that of another dataset, stream or
                configuration.
        """
        if self.host.args.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip=True` starts the epoch over, so the resumed run would train on other prompts than "
                "the first. Leave it out: skipping data generates nothing."
            )
        saved = saved_in(state)
        content = {name: value for name, value in saved.items() if name != "sha256"}
        if saved.get("sha256") != digest(content) or not _NEEDED <= saved.keys():
            raise ValueError(
                f"The LearnAlign state in the checkpoint of step {state.global_step} is damaged: it does not agree "
                "with its checksum. Resume from an earlier checkpoint."
            )
        checkpoint = self.host.resumed_from
        assert checkpoint is not None  # noted when Trainer loaded the optimizer
        arrays = read_arrays(checkpoint, saved.get("arrays"))
        whole = join({"sampler": saved["sampler"]}, arrays)
        schedule_state = self.stream.load_state_dict(whole["sampler"])
        check_dataset(saved, self._fingerprint)
        self._free = tuple(saved["free"])
        self._check_config(saved["config"], coming=saved["pending"] is not None or saved["stage"] == 0)
        return schedule_state, saved["pending"]

    def _check_config(self, saved, coming):
        compared = ("num_prompts", "warmup_prompts", "schedule")  # by the sampler
        changes = {name: text for name, text in self.changes(saved).items() if name not in compared}
        free = FREE_ON_RESUME + self._free
        refused = [text for name, text in changes.items() if name not in free]
        if refused:
            chosen = "The selections so far were made" if self.stream.selects else "Prompts were chosen"
            raise ValueError(
                f"The LearnAlignConfig is not that of the checkpoint: {'; '.join(refused)}. {chosen} "
                "with the old values. Resume with these, or start a new run in another `output_dir` (with "
                "the weights of this one, if you like). On resuming, only "
                f"{', '.join(f'`{name}`' for name in free)} may change."
            )
        said = [text for name, text in changes.items() if name not in ("max_tokens_per_batch", *_OF_FILES)]
        if said and self.host.accelerator.is_main_process:
            lacking = not (coming or self.config.reselect_every) and self.stream.selects is not None
            how = " None is to come: set `reselect_every`, or resume from a checkpoint before the last one." * lacking
            logger.warning(f"{'; '.join(said)}: the selections to come follow the new values.{how}")


def saved_in(state) -> dict:
    """Return what a checkpoint's [`~transformers.TrainerState`] says of ours. Raises a `ValueError` if nothing."""
    saved = state.stateful_callbacks.get(STATE_KEY)
    if not isinstance(saved, dict):
        raise ValueError(
            f"The checkpoint of step {state.global_step} holds no LearnAlign state, so it was written by a run "
            "without LearnAlign. Resume without the sampler, or start a new run from its weights."
        )
    return saved


def check_dataset(saved: dict, fingerprint: str) -> None:
    """Raise a `ValueError` unless a checkpoint was written with the dataset of this fingerprint."""
    if saved["dataset_fingerprint"] != fingerprint:
        raise ValueError(
            "The training dataset has other rows, or the same in another order, than when the checkpoint was "
            "written, whose prompts are named by their rows. Resume with the same dataset, or start a new run."
        )


_NEEDED = {"sampler", "pending", "dataset_fingerprint", "config", "stage", "free"}
_OF_FILES = ("save_rollouts", "write_report")
