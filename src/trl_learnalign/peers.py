"""What fails on one process fails on all, at once and with its cause, instead of leaving the others in a collective."""

import itertools
import time

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


_PASSES = itertools.count()  # equal on all processes, which make passes in step
_LONGEST_PAUSE = 0.5  # seconds between two looks


class Peers:
    """
    The other processes of a pass. Used as a context manager, it tells them of an exception.

    They are told through the key-value store that torch.distributed keeps beside its collectives, which can be asked
    without waiting.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.store = None
        if self.world > 1 and dist.is_initialized():
            self.store = dist.PrefixStore(f"learnalign-{next(_PASSES)}", dist.distributed_c10d._get_default_store())
        self._meetings = itertools.count()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.store is not None and error is not None and not isinstance(error, PeerError):
            self.store.set("failed", f"process {self.rank}: {kind.__name__}: {error}")

    def check(self) -> None:
        """
        Raises:
            [`PeerError`]: another process has failed.
        """
        if self.store is not None and self.store.check(["failed"]):
            cause = self.store.get("failed").decode(errors="replace")
            raise PeerError(f"The selection ends here, because it failed on another process. {cause}")

    def wait(self) -> None:
        """
        Returns when all processes are here. Before a collective, so that none waits in it for one that has failed.

        Raises:
            [`PeerError`]: another process has failed.
        """
        if self.store is None:
            return
        meeting = f"meeting-{next(self._meetings)}"
        self.store.add(meeting, 1)
        pause = 0.001
        while self.store.add(meeting, 0) < self.world:
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.check()

    def gather(self, value) -> list:
        """The value of every process, by rank, on every process."""
        self.wait()
        return gather_object([value])

    def broadcast(self, value):
        """The value of the main process."""
        self.wait()
        return broadcast_object_list([value])[0]


class PeerError(RuntimeError):
    """Another process has failed."""
