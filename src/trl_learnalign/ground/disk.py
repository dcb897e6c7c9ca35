"""Atomic writes, and one run per directory."""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]  # a module cannot be declared optional


# Writing -----------------------------------------------------------------------------------------------------------


_UMASK = os.umask(0)  # setting it is the only way to read it
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """
    Call `write(temporary_path)`, then rename the temporary file to `path`: a reader sees the complete file or none.
    The temporary file is in the [`scratch`] directory of a run, if `path` is in one, else next to `path`.

    Raises:
        `OSError`: the disk is full, or the directory cannot be written to. `path` is as it was.
    """
    temporary = _where_temporary(path) / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors lets nobody else read its files
        os.replace(temporary, path)
    except (OSError, SafetensorError, pa.ArrowException) as error:
        raise OSError(
            f"'{path}' could not be written ({error}). Free disk space or make the directory writable, and run "
            "again: finished parts are still there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def scratch(directory: Path) -> Path:
    """
    Return the directory beside `directory` for its unfinished and temporary files. Trainer may upload the output
    directory at any time, but leaves out all names that begin with an underscore.
    """
    return directory.with_name(f"_{directory.name}")


def rollouts_of(step: Path) -> Path:
    """Return the directory of the rollouts kept from the selection in the directory `step`; no upload takes them."""
    return scratch(step.parent) / "rollouts" / step.name


def initial_weights_of(directory: Path) -> Path:
    """Return the file of the weights that `after_warmup="restart"` goes back to; no upload takes it."""
    return scratch(directory) / "initial.safetensors"


def _where_temporary(path):
    for directory in path.parents:
        beside = scratch(directory) if directory.name == "learnalign" else None
        beside = directory if directory.name == "_learnalign" else beside
        if beside is not None and beside.is_dir() and beside.stat().st_dev == path.parent.stat().st_dev:
            return beside
    return path.parent


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, document) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def digest(document) -> str:
    """Return the SHA-256 of a JSON document, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_directory(path: Path) -> None:
    """Make a directory and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The directory '{path}' cannot be made ({error}). Pass another `output_dir`.") from error


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of processes that died while writing, from one of our directories and right below it."""
    for leftover in (*path.glob(".*.tmp"), *path.glob("*/.*.tmp")):
        leftover.unlink(missing_ok=True)


# One run per directory ---------------------------------------------------------------------------------------------


class DirectoryLock:
    """
    Lock that keeps a second run out of a directory for as long as this process lives and has not called `release`.

    The lock is the operating system's, so it ends with the process, even if that is killed. The lock file stays in the
    [`scratch`] directory, but holds no lock then. A process may take the lock again. On file systems without locks,
    nothing is locked.

    Args:
        path (`Path`): the directory.

    Raises:
        `RuntimeError`: another process has it.
    """

    _held: ClassVar[dict[Path, tuple[int, int]]] = {}  # directory -> file descriptor, holders

    def __init__(self, path: Path):
        self.path = Path(path).resolve()
        descriptor, holders = self._held.get(self.path, (None, 0))
        if descriptor is None:
            descriptor = self._lock()
        self._held[self.path] = descriptor, holders + 1
        self._released = False

    def _lock(self):
        make_directory(self.path)
        make_directory(scratch(self.path))
        descriptor = os.open(scratch(self.path) / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RuntimeError(
                f"Another run is using '{self.path}' ({owner}), and two runs would overwrite each other's selections "
                "and checkpoints. Wait for it to end, stop it, or pass another `output_dir`."
            ) from None
        except OSError:
            pass  # a file system without locks
        for directory in (self.path, scratch(self.path)):
            remove_leftovers(directory)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor

    def release(self) -> None:
        """Release the lock. May be called twice."""
        if self._released:
            return
        self._released = True
        descriptor, holders = self._held.pop(self.path)
        if holders > 1:
            self._held[self.path] = descriptor, holders - 1
        else:
            os.close(descriptor)


def _let_go():
    """Release the locks in a forked child, such as a dataloader's worker, which may outlive the run for seconds."""
    for descriptor, _ in DirectoryLock._held.values():
        os.close(descriptor)
    DirectoryLock._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
