"""Append-only files of measurements, so that a killed selection goes on where it was stopped."""

import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from .disk import make_directory, remove_leftovers, write_json
from .peers import Peers


logger = logging.getLogger(__name__)

SEGMENT_BYTES = 512 << 20  # a file that has reached this size is followed by another
_JOINED = 64 << 20  # records are copied to be written at once, up to this size
_MANIFEST = "manifest.json"
_MAGIC = b"tla-log1"
# Magic, name, key, bytes of the payload, their CRC-32, CRC-32 of what is before it
_HEADER = struct.Struct("<8sQ32sQII")
_ALIGNED = _HEADER.size  # payloads begin at multiples of it


class Log:
    """
    Records in the files of a directory. Each process appends to a file of its own, and reads those of all:

        00000-00000.log   header payload padding header payload padding ...
        00000-00001.log   process 0 goes on here once its first file has reached `SEGMENT_BYTES`
        00001-00000.log

    A record that is damaged, cut off or was made under another key counts as never written. A torn one at the end of a
    file is cut off before the process that the file belongs to appends to it.

    Args:
        path (`Path`): the directory, prepared by [`prepare`].
        key (`str`): stands for everything that the records depend on.
        rank (`int`): rank of this process.
    """

    def __init__(self, path: Path, key: str, rank: int):
        self.path = path
        self.key = key
        self._key = hashlib.sha256(key.encode()).digest()
        self._rank = rank
        self._files: list[Path] = []
        self._index = _Index()
        self._stream: FileIO | None = None  # the file that this process appends to
        self._end = 0  # end of the last complete record in that file, or in the one that will be opened
        for file in sorted(path.glob("*.log")):
            self._scan(file)

    def _scan(self, file):
        """Note the places of a file's records. Their payloads are checked when they are read."""
        self._files.append(file)
        found, offset, end = [], 0, 0
        with open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            while offset < size:
                header = _unpacked(_read(stream, offset, _HEADER.size))
                if header is None or offset + _HEADER.size + header[2] > size:
                    offset += _ALIGNED  # damaged: the next one is somewhere behind it
                    continue
                name, key, length, _ = header
                if key == self._key:
                    found.append((name, offset))
                offset = end = offset + _HEADER.size + _padded(length)
        self._index.add(found, len(self._files) - 1)
        if file.name.startswith(f"{self._rank:05d}-"):
            self._end = end

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: int) -> bool:
        return self._index.find(name) is not None

    def append(self, records: Iterable[tuple[int, bytes | np.ndarray]], durable: bool = True) -> None:
        """
        Append `(name, payload)` in one write. A later record replaces an earlier one of the same name.

        Args:
            records (`Iterable[tuple[int, bytes | np.ndarray]]`): names in [0, 2**64), each with its bytes or a
                contiguous array.
            durable (`bool`): whether to wait until the disk has it. Records of a killed process are kept in any case;
                those of a machine that loses its power may not be.

        Raises:
            `OSError`: the disk is full, or the directory cannot be written to. Earlier records are still there.
        """
        stream = self._stream
        if stream is None or self._end >= SEGMENT_BYTES:
            stream = self._next_file()
        parts: list[bytes | memoryview] = []
        found, start = [], self._end
        for name, content in records:
            payload = memoryview(content if isinstance(content, bytes) else content.reshape(-1).data).cast("B")
            fields = (_MAGIC, name, self._key, len(payload), zlib.crc32(payload))
            found.append((name, start))
            parts += [_packed(fields), payload, bytes(_padded(len(payload)) - len(payload))]
            start += _HEADER.size + _padded(len(payload))
        try:
            for part in [b"".join(parts)] if start - self._end <= _JOINED else parts:
                _write(stream, part)
            if durable:
                os.fsync(stream.fileno())
        except OSError as error:
            stream.truncate(self._end)
            raise OSError(
                f"'{self._files[self._current]}' could not be written ({error}). Free disk space or make the "
                "directory writable, and run again: finished parts are still there."
            ) from error
        self._end = start
        self._index.add(found, self._current)

    def _next_file(self) -> FileIO:
        """Open the last file of this process after its last complete record, or begin another."""
        own = [place for place, file in enumerate(self._files) if file.name.startswith(f"{self._rank:05d}-")]
        go_on = self._stream is None and own and self._end < SEGMENT_BYTES
        self.close()
        try:
            if go_on:
                self._current = own[-1]
                stream = open(self._files[self._current], "ab", buffering=0)
                stream.truncate(self._end)
            else:
                number = 1 + int(self._files[own[-1]].stem.split("-")[1]) if own else 0
                file = self.path / f"{self._rank:05d}-{number:05d}.log"
                stream = open(file, "ab", buffering=0)
                self._files.append(file)
                self._current, self._end = len(self._files) - 1, 0
        except OSError as error:
            raise OSError(
                f"'{self.path}' could not be written to ({error}). Make it writable and run again."
            ) from error
        self._stream = stream
        return stream

    def discard(self, names: Iterable[int]) -> None:
        """Forget records. The file of this process is emptied once it has no others."""
        self._index.remove(names)
        if self._stream is not None and not self._index.has_any_in(self._current):
            self._stream.truncate(0)
            self._end = 0

    def keep(self, names: Iterable[int]) -> None:
        """Forget all records but `names`."""
        self._index.remove(names, but=True)

    def read(self, name: int) -> bytes | None:
        """Read the payload of a record; `None` if there is none."""
        found = self._open(name)
        if found is None:
            return None
        with found[0] as stream:
            _, start, length, checksum = found
            payload = _read(stream, start, length)
        return payload if len(payload) == length and zlib.crc32(payload) == checksum else None

    def map(self, name: int, verify: bool = True) -> memoryview | None:
        """Map the payload of a record from the file, in private pages. `verify=False` leaves out the checksum."""
        found = self._open(name)
        if found is None:
            return None
        with found[0] as stream:
            _, start, length, checksum = found
            skip = start % mmap.ALLOCATIONGRANULARITY
            if os.fstat(stream.fileno()).st_size < start + length:
                return None
            if not length:
                return memoryview(b"")
            pages = mmap.mmap(stream.fileno(), skip + length, access=mmap.ACCESS_COPY, offset=start - skip)
        payload = memoryview(pages)[skip:]
        return payload if not verify or zlib.crc32(payload) == checksum else None

    def _open(self, name):
        """Open the file of a record, and return it with the start, the length and the checksum of the payload."""
        found = self._index.find(name)
        if found is None:
            return None
        place, offset = found
        try:
            stream = open(self._files[place], "rb", buffering=0)
        except OSError:
            return None
        header = _unpacked(_read(stream, offset, _HEADER.size))
        if header is None or header[:2] != (name, self._key):
            stream.close()
            return None
        return stream, offset + _HEADER.size, header[2], header[3]

    def inside(self, name: str) -> "Log":
        """Open a log under the same key in a directory of this one."""
        make_directory(self.path / name)
        return Log(self.path / name, self.key, self._rank)

    def close(self) -> None:
        """Close the file that is appended to. The log can still be read, and appended to again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Index:
    """
    Places of records: `(file, offset)` by name. Sorted arrays of 20 bytes a record, and a dict of the records since
    then, at most an eighth as many: a dict alone would take ten times the memory.
    """

    def __init__(self) -> None:
        self._recent: dict[int, tuple[int, int]] = {}
        self._names = np.empty(0, np.uint64)
        self._files = np.empty(0, np.uint32)
        self._offsets = np.empty(0, np.uint64)

    def add(self, found, file):
        self._recent.update((name, (file, offset)) for name, offset in found)
        if len(self._recent) > max(4096, len(self._names) // 8):
            self._merge()

    def find(self, name):
        if name in self._recent:
            return self._recent[name]
        place = int(np.searchsorted(self._names, np.uint64(name)))
        if place == len(self._names) or self._names[place] != name:
            return None
        return int(self._files[place]), int(self._offsets[place])

    def remove(self, names, but=False):
        """Drop `names`, or keep only `names` if `but`."""
        self._merge()
        kept = np.isin(self._names, np.fromiter(names, np.uint64), invert=not but)
        self._names, self._files, self._offsets = self._names[kept], self._files[kept], self._offsets[kept]

    def has_any_in(self, file):
        self._merge()
        return bool((self._files == file).any())

    def __len__(self):
        return len(self._recent) + len(self._names)

    def _merge(self):
        names = np.fromiter(self._recent, np.uint64, len(self._recent))
        places = np.array(list(self._recent.values()), np.uint64).reshape(-1, 2)
        # Of equal names the first is kept: the recent ones come first
        all_names = np.concatenate([names, self._names])
        self._names, kept = np.unique(all_names, return_index=True)
        self._files = np.concatenate([places[:, 0].astype(np.uint32), self._files])[kept]
        self._offsets = np.concatenate([places[:, 1], self._offsets])[kept]
        self._recent = {}


def other_parts(was: dict, now: dict, old: dict | None = None, new: dict | None = None) -> str:
    """
    Name the parts that differ, for people, with their values where `old` and `new` have some.

    Args:
        was (`dict[str, str]`): digests by the name of a part.
        now (`dict[str, str]`): the same of something else.
        old (`dict`, *optional*): values by the name of a setting, whose part is named as it is between backquotes.
        new (`dict`, *optional*): the same of something else.
    """
    old, new = old or {}, new or {}
    names = []
    for name in {**now, **was}:
        if was.get(name) != now.get(name):
            setting = name.strip("`")
            values = setting in old and old[setting] != new.get(setting)
            names.append(f"{name} (it was {old[setting]!r} and is {new.get(setting)!r})" if values else name)
    return ", ".join(names) or "weights, data, rewards or settings"


def prepare(path: Path, key: str, parts: dict[str, str] | None = None) -> None:
    """
    Make the directory of a [`Log`], empty unless it was made under the same key. One process of each disk does this,
    before the others open the log.

    Args:
        path (`Path`): the directory.
        key (`str`): see [`Log`].
        parts (`dict[str, str]`, *optional*): digests of all that the key stands for, by name, to tell which differs.
    """
    known, was = _manifest(path)
    if path.exists() and known != key:
        logger.warning(
            f"'{path}' was made from other {other_parts(was, parts or {})}, so it is discarded and measured again."
        )
        shutil.rmtree(path, ignore_errors=True)  # each record has the key as well
    remove_leftovers(path)
    if _manifest(path)[0] != key:
        make_directory(path)
        write_json(path / _MANIFEST, {"key": key, "made_from": parts or {}})


def open_log(path: Path, key: str, accelerator: Accelerator, peers: Peers, parts: dict[str, str] | None = None) -> Log:
    """
    Open the log in a directory, without records of another key. All processes must call this.

    Args:
        path (`Path`): the directory.
        key (`str`): see [`Log`].
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        peers ([`Peers`]): the other processes.
        parts (`dict[str, str]`, *optional*): see [`prepare`].
    """
    # The other nodes come second; they have work only if they have their own disks
    for mine in (accelerator.is_main_process, accelerator.is_local_main_process):
        if mine:
            prepare(path, key, parts)
        peers.wait()
    make_directory(path)  # in a dry run, where each process has one
    return Log(path, key, accelerator.process_index)


def _manifest(path) -> tuple[str | None, dict]:
    """Read the key, and the digests of all that it stands for."""
    try:
        content = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return content["key"], dict(content.get("made_from", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}


def _packed(fields):
    header = _HEADER.pack(*fields, 0)
    return header[:-4] + struct.pack("<I", zlib.crc32(header[:-4]))


def _unpacked(header):
    """Return the name, key, length and checksum; `None` if these bytes are no header."""
    if len(header) < _HEADER.size:
        return None
    magic, *fields, checksum = _HEADER.unpack(header)
    return tuple(fields) if magic == _MAGIC and checksum == zlib.crc32(header[:-4]) else None


def _padded(length):
    return -(-length // _ALIGNED) * _ALIGNED


def _read(stream, start, length):
    stream.seek(start)
    parts = []
    while length and (part := stream.read(length)):  # a system may give less than it is asked for
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(stream, data):
    data = memoryview(data)
    while data:
        data = data[stream.write(data) :]
