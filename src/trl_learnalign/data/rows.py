"""Rows from a file, a directory or the Hub, and a hash of them."""

import glob
import gzip
import hashlib
import json
import logging
import os
import weakref
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, load_dataset, load_dataset_builder, load_from_disk

from .files import CHECKED, CsvRows, JsonRows, csv_changes, is_zipped, json_changes, list_of_rows


logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_READABLE = f"{', '.join(_READERS)}, also with .gz,"
_ROWS = {"json": JsonRows, "csv": CsvRows}
_FINGERPRINTS: weakref.WeakKeyDictionary[Dataset, str] = weakref.WeakKeyDictionary()
_COMPARED: set[tuple[str, str]] = set()  # settings and files whose rows were compared with what was read


def read_dataset(name: str, knob: str, config: str | None = None, split: str = "train") -> Dataset:
    """Read the rows of [`read_source`] alone."""
    return read_source(name, knob, config, split)[0]


def read_source(
    name: str, knob: str, config: str | None = None, split: str = "train"
) -> tuple[Dataset, JsonRows | None]:
    """
    Read the rows of a file, of the files that a pattern such as `data/*.jsonl` names, of a directory that
    `save_to_disk` wrote, or of a split of a dataset of the Hub or of a directory. Rows of JSON and CSV files are
    returned a second time as the files hold them. The first process warns, once for each file, of columns that reading
    changes.

    Args:
        name (`str`): path, pattern or name.
        knob (`str`): the setting that holds it, for messages.
        config (`str`, *optional*): configuration of the dataset.
        split (`str`, *optional*, defaults to `"train"`): split of the dataset.

    Raises:
        `ValueError`, `FileNotFoundError`: there is no such file or dataset, or it cannot be read.
    """
    file = Path(name)
    if glob.has_magic(name) and (files := sorted(map(Path, glob.glob(name, recursive=True)))):
        dataset, source = _read_files(files, knob)
    elif _kind(file) in _READERS or file.is_file():
        dataset, source = _read_files([file], knob)
    else:
        dataset, source = _read_directory(name, knob, config, split)
    _warn_of_changes(dataset, source, file, knob)
    return dataset, source


def _kind(file):
    return Path(file.stem).suffix if is_zipped(file) else file.suffix


def _read_directory(name, knob, config, split):
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = load_from_disk(name)
            return (saved[split] if isinstance(saved, dict) else saved), None
        dataset = load_dataset(name, config, split=split)
        files = []
        if Path(name).is_dir():
            listed = load_dataset_builder(name, config).config.data_files or {}
            files = [Path(file) for file in listed.get(split, ())]
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"`{knob}` is '{name}', which could not be loaded: {error}") from error
    kinds = {_READERS.get(_kind(file)) if file.is_file() else None for file in files}
    return dataset, _ROWS[kinds.pop()](files) if len(kinds) == 1 and kinds <= _ROWS.keys() else None


def _read_files(files, knob):
    kinds = {_READERS.get(_kind(file)) for file in files}
    for file in files:
        if _kind(file) not in _READERS:
            raise ValueError(f"`{knob}` is '{file}', but only files named {_READABLE} can be read.")
        if not file.is_file():
            raise FileNotFoundError(f"`{knob}` is '{file}', but there is no such file.")
        with file.open("rb") as lines:
            if not any(line.strip() for line in lines):
                raise ValueError(f"`{knob}` is '{file}', which is empty.")
    if len(kinds) > 1:
        raise ValueError(f"`{knob}` names files of several kinds: {', '.join(map(str, files))}. Name those of one.")
    (kind,) = kinds
    # The rows may be in a member of one object, such as {"data": [...]}
    field = list_of_rows(files[0]) if len(files) == 1 and _kind(files[0]) == ".json" else None
    more = {} if field is None else {"field": field}
    try:
        dataset = load_dataset(kind, data_files=list(map(str, files)), split="train", **more)
    except Exception as error:  # each reader has errors of its own
        cause = error.__cause__ or error
        file, place = files[0], None
        if kind == "json":
            file, place = next(((file, place) for file in files if (place := _broken_line(file))), (file, None))
        raise ValueError(
            f"`{knob}` is '{file}', which cannot be read: {place or f'{type(cause).__name__}: {cause}'}."
        ) from error
    return dataset, _ROWS[kind](files, field) if kind in _ROWS else None


def _warn_of_changes(dataset, source, file, knob):
    place = knob, os.path.abspath(file)
    if int(os.environ.get("RANK", 0)) != 0 or place in _COMPARED:
        return
    _COMPARED.add(place)
    if source is None:
        return
    columns = (csv_changes if isinstance(source, CsvRows) else json_changes)(dataset, source)
    if columns:
        looked = f" (of the first {CHECKED:,} rows)" if len(dataset) > CHECKED else ""
        logger.warning(
            f"`{knob}` is '{file}', and `datasets` reads other values than it holds{looked}: {'; '.join(columns)}. "
            "Reward functions and conditions get what was read. To keep the values, give the rows as parquet, which "
            "holds the types of its columns, or let all values of a column be of one type."
        )


def _broken_line(file) -> str | None:
    """Describe the first line of a JSON file that is no row."""
    content = gzip.decompress(file.read_bytes()) if is_zipped(file) else file.read_bytes()
    if _kind(file) == ".json" and content.lstrip().startswith(b"["):  # an array over many lines
        try:
            return _too_large(json.loads(content))
        except ValueError as error:
            return str(error)
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f'line {number} is not an object such as {{"prompt": "..."}}'
        except ValueError as error:
            return f"line {number} is not valid JSON ({error})"
    return None


def _too_large(rows) -> str | None:
    """Describe the first whole number of an array that `datasets` does not read."""
    for number, row in enumerate(rows):
        for name, value in row.items() if isinstance(row, dict) else ():
            if any(not -(1 << 63) <= one < 1 << 64 for one in _integers(value)):
                return (
                    f"row {number} (counted from 0) has in '{name}' a whole number of more than 64 bits. Write the "
                    "numbers of that column as texts, or the rows as JSON lines"
                )
    return None


def _integers(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _integers(part)
    elif type(value) is int:
        yield value


def dataset_fingerprint(dataset: Dataset) -> str:
    """
    Hash the rows and their order. The fingerprint that `datasets` keeps also changes with the way that the same rows
    were made, which may be different in every process; this one does not. Computed once for each dataset.
    """
    if dataset not in _FINGERPRINTS:
        _FINGERPRINTS[dataset] = _fingerprint(dataset)
    return _FINGERPRINTS[dataset]


def _fingerprint(dataset):
    hashed = hashlib.sha256(str(dataset.features).encode())
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        table = batch.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        hashed.update(sink.getvalue())
    return hashed.hexdigest()


def format_of(dataset: Dataset) -> dict[str, object]:
    """Return how a dataset changes rows when they are read: a format or a function, and the columns that are left."""
    found = dataset.format
    if found["type"] is None and set(found["columns"]) == set(dataset.column_names):
        return {}
    return {name: found[name] for name in ("type", "format_kwargs", "columns", "output_all_columns")}
