"""The state of an asynchronous run in its checkpoints, which the main process writes."""

import hashlib
from pathlib import Path
from typing import Any

from ..config import FREE_ON_RESUME
from ..curriculum.states import pack, unpack
from ..ground.disk import write_bytes
from ..ground.peers import Peers
from ..run.state import read_checked
from .checkpoint import STATE_KEY, Checkpoint, check_dataset, saved_in


FILE = "learnalign_online.npz"


class AsyncCheckpoint(Checkpoint):
    """Writes the state of a run into its checkpoints, and reads it back, strictly."""

    def write(self, directory: Path, peers: Peers, state: dict | None, files: dict[str, str]) -> None:
        """
        Write the state beside what the trainer's state will say of it.

        Args:
            directory (`Path`): the checkpoint.
            peers ([`Peers`]): an open context.
            state (`dict`, *optional*): on the main process.
            files (`dict[str, str]`): SHA-256 of what the schedule has written beside it, by name.
        """
        entry = None
        if state is not None:
            content = pack(state)
            entry = {"file": FILE, "sha256": hashlib.sha256(content).hexdigest()}
            write_bytes(directory / FILE, content)
        states: Any = self.host.trainer.state.stateful_callbacks
        states[STATE_KEY] = {
            "arrays": peers.broadcast(entry),
            "files": files,
            "dataset_fingerprint": self._fingerprint,
            "config": self.config.to_dict(),
        }

    def read(self, state) -> dict:
        """
        Return the state in the checkpoint that is resumed from.

        Args:
            state ([`~transformers.TrainerState`]): as read from the checkpoint.

        Raises:
            `ValueError`: there is none, a damaged one, or that of other data or settings.
        """
        saved = saved_in(state)
        if (saved.get("arrays") or {}).get("file") != FILE:
            raise ValueError(
                f"The checkpoint of step {state.global_step} was written by a trainer that is not asynchronous. "
                "Resume with that trainer, or start a new run from its weights."
            )
        check_dataset(saved, self._fingerprint)
        changes = [text for name, text in self.changes(saved["config"]).items() if name not in FREE_ON_RESUME]
        if changes:
            raise ValueError(
                f"The LearnAlignConfig is not that of the checkpoint: {'; '.join(changes)}. Resume with these, or "
                "start a new run in another `output_dir` (with the weights of this one, if you like)."
            )
        assert self.host.resumed_from is not None  # noted when Trainer loaded the optimizer
        return read_checked(self.host.resumed_from / FILE, saved["arrays"], unpack)
