"""The state of an asynchronous run in its checkpoints, which the main process writes."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import FREE_ON_RESUME
from ..curriculum.states import pack, unpack
from ..data.rows import dataset_fingerprint
from ..ground.disk import write_atomically
from ..ground.peers import Peers
from .checkpoint import STATE_KEY, check_dataset, saved_in


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..host import Host

FILE = "learnalign_online.npz"


class AsyncCheckpoint:
    """
    Writes the state of a run into its checkpoints, and reads it back, strictly.

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
            write_atomically(directory / FILE, lambda temporary: temporary.write_bytes(content))
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
        changed = self.config.changes(saved["config"])
        changes = [
            f"`{name}` was {was!r} and is {now!r}"
            for name, (was, now) in changed.items()
            if name not in FREE_ON_RESUME
        ]
        if changes:
            raise ValueError(
                f"The LearnAlignConfig is not that of the checkpoint: {'; '.join(changes)}. Resume with these, or "
                "start a new run in another `output_dir` (with the weights of this one, if you like)."
            )
        assert self.host.resumed_from is not None  # noted when Trainer loaded the optimizer
        path = Path(self.host.resumed_from) / FILE
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != saved["arrays"]["sha256"]:
                raise ValueError("it does not agree with its checksum")
            return unpack(content)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"'{path}', the state of the schedule in this checkpoint, cannot be used: {error}. Resume from an "
                "earlier checkpoint."
            ) from error
