"""An error on one process ends all processes, with its cause. A dead process is reported, not waited for."""

import itertools
import math
import queue
import threading
import time
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


_CONTEXTS = itertools.count()  # equal on all processes, which open their contexts in step
_LONGEST_PAUSE = 0.5  # seconds between two looks at who has arrived
_BEAT = 5.0  # seconds between two heartbeats
_SILENCE = 60.0  # seconds without a heartbeat after which a process is taken for dead


class Peers:
    """
    Connection to the other processes of a selection. Inside its context it sends them this process's exceptions and
    heartbeats.

    Processes communicate through the key-value store of torch.distributed, not through collectives, since the store
    can be read without waiting. Outside of the context, only the time-out of the collectives helps against a dead
    process.

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.

    Raises:
        `RuntimeError`: see [`check_store`].
    """

    def __init__(self, accelerator: Accelerator):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        if self.world > 1:
            check_store()
        self._thread: _StoreThread | None = None
        self._meetings = 0

    def __enter__(self):
        if self.world > 1 and dist.is_initialized():
            self._meetings = 0
            self._thread = _StoreThread(self.rank, self.world, f"learnalign-{next(_CONTEXTS)}")
        return self

    def __exit__(self, kind, error, traceback):
        thread, self._thread = self._thread, None
        if thread is not None:
            failure = None if error is None else f"process {self.rank}: {kind.__name__}: {error}"
            if isinstance(error, PeerError):
                failure = str(error)
            thread.close(failure, patient=error is None or isinstance(error, Exception))

    def check(self) -> None:
        """
        Record that this process makes progress.

        Raises:
            [`PeerError`]: another process has failed, or the main process is dead.
        """
        if self._thread is not None:
            self._thread.progress += 1
            self._thread.check()

    def wait(self) -> None:
        """
        Wait until all processes have called this method. Used before a collective, so that none waits in it for a
        failed process.

        Raises:
            [`PeerError`]: another process has failed or died, or has made no progress for longer than the time-out of
                the process group.
        """
        thread = self._thread
        if thread is None:
            return
        self.check()
        self._meetings += 1
        thread.meeting = self._meetings
        arrived = thread.ask(thread.arrive)
        watch = _Watch(thread)
        looked = time.monotonic()
        pause = 0.001
        while arrived < self._meetings * self.world:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            arrived = thread.ask(thread.arrived)
            thread.check()
            if time.monotonic() - looked >= _BEAT:
                thread.ask(watch.look)
                watch.check()
                looked = time.monotonic()
        thread.check()

    def gather(self, value) -> list:
        """Return the value of every process, by rank, on every process."""
        self.wait()
        return gather_object([value])

    def broadcast(self, value):
        """Return the value of the main process."""
        self.wait()
        return broadcast_object_list([value])[0]


class PeerError(RuntimeError):
    """Another process has failed, died or got stuck."""


class _StoreThread(threading.Thread):
    """
    Connection of this process to the store. A separate thread sends the heartbeats, whatever the process computes, and
    makes all calls, so that a host that no longer answers blocks only that thread.

    In the store, under the prefix of a context:

        beat-{rank}   "{beats} {progress} {meeting}"
        arrived       at all meetings so far, of all processes; at meeting n none is further than n
        failed        the cause of the first failure
        told          processes that know of the failure, or need the store no more
    """

    def __init__(self, rank: int, world: int, prefix: str):
        super().__init__(name=prefix, daemon=True)
        self.rank, self.world = rank, world
        self.progress = self.meeting = 0
        self.failure: str | None = None  # of another process
        self.error: BaseException | None = None  # of the store
        shared = _default_store()
        self.timeout = shared.timeout.total_seconds()  # the process group's: `init_process_group` hands it on
        self.silence = min(_SILENCE, self.timeout)
        self._shared = shared
        self._jobs: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self._beats = 0
        self._told = False
        self.start()

    def run(self):
        future = None
        try:
            store = dist.PrefixStore(self.name, _own_connection(self._shared, self.silence))
            self._beat(store)
            due = time.monotonic() + _BEAT
            while True:
                try:
                    job, future = self._jobs.get(timeout=max(0.0, due - time.monotonic()))
                    if job is None:
                        return
                    future.set_result(job(store))
                except queue.Empty:
                    pass
                if time.monotonic() >= due:
                    self._beat(store)
                    due = time.monotonic() + _BEAT
        except Exception as error:
            self.error = error
            if future is not None and not future.done():
                future.set_exception(error)

    def _beat(self, store):
        self._beats += 1
        store.set(f"beat-{self.rank}", f"{self._beats} {self.progress} {self.meeting}")
        self._listen(store)

    def _listen(self, store):
        if self.failure is None and store.check(["failed"]):
            self.failure = store.get("failed").decode(errors="replace")
            self._tell(store)

    def _tell(self, store):
        if not self._told:
            self._told = True
            store.add("told", 1)

    def arrive(self, store):
        self._beat(store)  # so that the others know at once which meeting this process is at
        return store.add("arrived", 1)

    def arrived(self, store):
        self._listen(store)
        return store.add("arrived", 0)

    def ask(self, job):
        """Return `job(store)`. Waits in slices: a process that was suspended would find that all its time is up."""
        future = Future()
        self._jobs.put((job, future))
        for _ in range(_looks(self.silence)):
            if self.error is not None:
                break
            try:
                return future.result(_BEAT)
            except TimeoutError:
                pass
            except Exception as error:
                self.error = error
        if self.error is None:
            self.error = TimeoutError(f"no answer for {self.silence:.0f} s")
        self.check()

    def check(self):
        if self.failure is not None:
            raise PeerError(f"The selection ends here, because it failed on another process. {self.failure}")
        if self.error is not None:
            raise PeerError(
                "The key-value store of torch.distributed, which the main process or its launcher keeps, does not "
                f"answer any more ({str(self.error).splitlines()[0]}): process 0 has ended, was killed, or its node "
                "is lost. Look at its last output and run again: finished parts are reused."
            ) from self.error

    def close(self, failure, patient):
        """
        Tell the others of a `failure`, if there is one. The main process waits until all have heard of it or are done,
        since the store may end with the main process. It waits for no process that does not answer, and for none at
        all if not `patient`.
        """

        def leave(store):
            self._listen(store)
            if failure is not None and self.failure is None:
                store.set("failed", failure)
            self._tell(store)

        try:
            self.ask(leave)
            until = time.monotonic() + 2 * _BEAT
            while self.rank == 0 and patient and self.ask(lambda store: store.add("told", 0)) < self.world:
                if time.monotonic() >= until:
                    break
                time.sleep(0.05)
        except PeerError:
            pass  # the store is gone, or another failure was there before
        self._jobs.put((None, None))
        self.join(_BEAT)


class _Watch:
    """Counts, for one wait, of the checks in a row that found a process without a heartbeat, or without progress."""

    def __init__(self, thread: _StoreThread):
        self.thread = thread
        self.states: dict[int, tuple] = {}
        self.silent = dict.fromkeys(set(range(thread.world)) - {thread.rank}, 0)
        self.idle = dict.fromkeys(self.silent, 0)

    def look(self, store):
        known = [rank for rank in self.silent if rank in self.states or store.check([f"beat-{rank}"])]
        keys = [f"beat-{rank}" for rank in known]
        values = store.multi_get(keys) if keys and store.has_extended_api() else [store.get(key) for key in keys]
        found = {rank: tuple(map(int, value.split())) for rank, value in zip(known, values, strict=True)}
        for rank in self.silent:
            beats, *rest = found.get(rank, (0, 0, 0))
            old_beats, *old_rest = self.states.get(rank, (0, 0, 0))
            # A process that has not come at all may be late, as the main process is while it writes checkpoints
            self.silent[rank] = self.silent[rank] + 1 if rank in found and beats == old_beats else 0
            here = rest[1] >= self.thread.meeting
            self.idle[rank] = self.idle[rank] + 1 if rest == old_rest and not here else 0
        self.states = found

    def check(self):
        dead = [rank for rank, looks in self.silent.items() if looks >= _looks(self.thread.silence)]
        if dead:
            raise PeerError(
                f"Process {_names(dead)} sent no heartbeat for {self.thread.silence:.0f} s: it was killed, or its "
                "node is lost. Look at its last output and run again: finished parts are reused."
            )
        stuck = [rank for rank, looks in self.idle.items() if looks >= _looks(self.thread.timeout)]
        if stuck:
            raise PeerError(
                f"Process {_names(stuck)} made no progress for {self.thread.timeout:.0f} s, which is the time-out of "
                "the process group. See what it does (`py-spy dump`), and raise `ddp_timeout` if it only needs longer."
            )


def _looks(seconds):
    """
    Count the checks that fit into so many seconds. Checks are counted instead of seconds, since time in which the
    whole machine was suspended must not count.
    """
    return max(3, math.ceil(seconds / _BEAT))


def _names(ranks):
    return ", ".join(map(str, ranks))


def check_store() -> None:
    """
    Check that this torch hands out its store, whose name is private.

    Raises:
        `RuntimeError`: PyTorch has no such name.
    """
    if not hasattr(dist.distributed_c10d, "_get_default_store"):
        raise RuntimeError(
            f"torch {torch.__version__} has no `_get_default_store` in `torch.distributed.distributed_c10d`, through "
            "which the processes tell each other of errors. Install an earlier torch, or a newer trl-learnalign; one "
            "process alone does not need it."
        )


def _default_store():
    return dist.distributed_c10d._get_default_store()


def _own_connection(store, seconds):
    """Open another connection: a call that waits for a key, as a new communicator does, may hold the shared one."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return store  # a file, or memory
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timeout)
