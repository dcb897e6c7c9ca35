"""Rows as files hold them, value for value, and the values that reading changed."""

import csv
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # not in the stubs
from pathlib import Path
from typing import Any

from datasets import Dataset


CHECKED = 100_000  # rows that are compared with their file
_BATCH = 1000
_DECODER = json.JSONDecoder(strict=False)  # readers also take control characters in texts


class JsonRows:
    """
    Rows of JSON files, in the order in which `datasets` reads them: a line, or an element of an array, each.

    Args:
        files (`list[Path]`): JSON lines or arrays, also with gzip.
        field (`str`, *optional*): member of the one object in the file that holds the array.
    """

    def __init__(self, files: list[Path], field: str | None = None):
        self.files, self.field = files, field
        self._state = self._states()

    def _states(self):
        return [(file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]

    def texts(self) -> Iterator[str]:
        """
        Read the rows, each a JSON object as text.

        Raises:
            `ValueError`: a file is no valid JSON.
        """
        for file in self.files:
            with _open(file) as lines:
                first = next((line for line in lines if line.strip()), "")
                if self.field is not None or first.lstrip().startswith("["):
                    text = first + lines.read()
                    yield from _elements(text if self.field is None else members(text)[self.field])
                else:
                    yield from (line for line in itertools.chain([first], lines) if line.strip())

    def pick(self, rows: list[int], size: int) -> list[dict[str, str]] | None:
        """
        Read the values of some rows, by name, each as the text that the file holds. `None` if the files have been
        changed since they were read, or have not `size` rows, so that rows cannot be told by their number.
        """
        wanted, number = set(rows), 0
        found: dict[int, dict[str, str]] = {}
        try:
            if self._states() != self._state:
                return None
            for number, text in enumerate(self.texts(), 1):
                if number - 1 in wanted:
                    found[number - 1] = members(text)
        except (OSError, ValueError, KeyError):
            return None
        return [found[row] for row in rows] if number == size else None


class CsvRows(JsonRows):
    """
    Rows of CSV files, as [`JsonRows`]. A column is one of numbers, or of True and False, if all its cells are written
    as JSON writes these; else its cells are texts. Empty ones are null.
    """

    def cells(self) -> Iterator[dict[str, str]]:
        """
        Read the rows, each a text by column.

        Raises:
            `ValueError`: a file has columns without names of their own, or rows of other lengths.
        """
        for file in self.files:
            with _open(file, newline="") as lines:
                reader = csv.DictReader(lines)
                names = reader.fieldnames or []
                if len(set(names) - {""}) < len(names):
                    raise ValueError("columns have no names, or the same ones")
                try:
                    for row in reader:
                        if None in row:
                            raise ValueError("a row is longer than the first line")
                        yield row
                except csv.Error as error:
                    raise ValueError(str(error)) from error

    def texts(self) -> Iterator[str]:
        """Read the rows, each a JSON object as text."""
        written: dict[str, str] = {}
        for row in self.cells():
            for name, text in row.items():
                if text and written.get(name) != _AS_TEXT:
                    kind = next((kind for kind, form in _PLAIN.items() if form.fullmatch(text)), _AS_TEXT)
                    written[name] = kind if written.get(name, kind) == kind else _AS_TEXT
        for row in self.cells():
            pairs = (f"{_json(name)}: {_cell(text, written.get(name))}" for name, text in row.items())
            yield f"{{{', '.join(pairs)}}}"


def _cell(text, kind):
    if not text:
        return "null"
    return {_AS_TEXT: _json(text), "truth": text.lower()}.get(kind, text)


def _json(text):
    return json.dumps(text, ensure_ascii=False)


_AS_TEXT = "text"
_PLAIN = {  # as JSON writes them
    "number": re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII),
    "truth": re.compile("true|false", re.IGNORECASE),
}


def is_zipped(file: Path) -> bool:
    return file.suffix == ".gz"


def _open(file, newline="\n"):
    opened = gzip.open if is_zipped(file) else open
    return opened(file, "rt", encoding="utf-8-sig", newline=newline)


def members(text: str) -> dict[str, str]:
    """
    Read the members of a JSON object as texts, on one line. Other values of JSON have none.

    Raises:
        `ValueError`: the text is no valid JSON.
    """
    if not isinstance(_DECODER.decode(text), dict):
        return {}
    found, at = {}, _skip(text, _skip(text, 0) + 1)
    while text[at : at + 1] == '"':
        name, at = scanstring(text, at + 1, False)
        at = _skip(text, at)
        start = _skip(text, at + 1)
        _, at = _DECODER.raw_decode(text, start)
        found[name] = text[start:at].replace("\n", " ").replace("\r", " ")  # never inside a value
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at : at + 1] == "," else at
    return found


def _elements(text):
    """Read the elements of a JSON array as texts."""
    at = _skip(text, _skip(text, 0) + 1)
    while at < len(text) and text[at] != "]":
        _, end = _DECODER.raw_decode(text, at)
        yield text[at:end]
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at : at + 1] == "," else at


def _skip(text, at):
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def list_of_rows(file: Path) -> str | None:
    """
    Name the member that holds the rows of a JSON file that is one object around them, as in `{"data": [{...}, ...]}`.
    """
    try:
        with _open(file) as opened:
            text = opened.read()
        document = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, OSError):
        return None
    if not isinstance(document, dict) or "prompt" in document:
        return None
    # A list of messages is a value of a row
    lists = [
        name
        for name, value in document.items()
        if isinstance(value, list) and value and all(isinstance(one, dict) and "role" not in one for one in value)
    ]
    return lists[0] if len(lists) == 1 else None


# Values that reading changed ---------------------------------------------------------------------------------------


def json_changes(dataset: Dataset, source: JsonRows) -> list[str]:
    """
    Describe each column of which reading changed the first `CHECKED` rows: its name and an example. Whole numbers may
    have become floats of the same value, and absent members null.
    """
    try:
        return _changes(dataset, map(_DECODER.decode, source.texts()), difference)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # rows that only `datasets` understands
        return []


def csv_changes(dataset: Dataset, source: CsvRows) -> list[str]:
    """Describe changed columns of CSV: numbers written in another way than they would be printed, and texts lost."""
    try:
        return _changes(dataset, source.cells(), _text_difference)
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def _changes(dataset, held_rows: Iterable[dict], compare):
    found: dict[str, tuple[tuple, int]] = {}
    held_rows = itertools.islice(held_rows, CHECKED)
    for start in range(0, min(len(dataset), CHECKED), _BATCH):
        read = dataset[start : start + _BATCH]
        for row, held in enumerate(itertools.islice(held_rows, _BATCH)):
            for name, values in read.items():
                pair = compare(held.get(name), values[row])
                if pair is not None:
                    first, number = found.get(name, ((start + row, *pair), 0))
                    found[name] = first, number + 1
    return [
        f"'{name}' ({_short(held)} becomes {_short(read)} in row {row}"
        f"{f', and {number - 1:,} more' if number > 1 else ''})"
        for name, ((row, held, read), number) in found.items()
    ]


def _short(value):
    text = value.isoformat() if hasattr(value, "isoformat") else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def difference(held: Any, read: Any) -> tuple | None:
    """Find the first pair of values that differ between a file and the rows read from it; `None` if none do."""
    if held is read or (type(held) is type(read) and not isinstance(held, dict | list) and held == read):
        return None
    if isinstance(held, dict) and isinstance(read, dict):
        pairs: Iterable[tuple] = ((held.get(name), read.get(name)) for name in held.keys() | read.keys())
    elif isinstance(held, list) and isinstance(read, list) and len(held) == len(read):
        pairs = zip(held, read, strict=True)
    elif {type(held), type(read)} <= {int, float} and (held == read or held != held):
        return None
    else:
        return held, read
    return next((found for pair in pairs if (found := difference(*pair)) is not None), None)


def _text_difference(held, read):
    if read is None or isinstance(read, str):
        same = (held or "") == (read or "")
    elif isinstance(read, float):
        written_as_float = "." in held or "e" in held.lower()
        same = written_as_float and float(held) == read
    else:
        same = held.strip().lower() == str(read).lower()
    return None if same else (held, read)
