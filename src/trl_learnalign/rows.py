"""Rows from a file, a directory or the Hub, and a hash of them."""

import hashlib
import json
import weakref
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, load_dataset


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_FINGERPRINTS = weakref.WeakKeyDictionary()


def read_dataset(name: str, knob: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    The rows of one file, or a split of a dataset of the Hub or of a directory.

    Args:
        name (`str`): path or name.
        knob (`str`): the setting that holds it, for messages.
        config (`str`, *optional*): configuration of the dataset.
        split (`str`, *optional*, defaults to `"train"`): its split.

    Raises:
        `ValueError`, `FileNotFoundError`: there is no such file or dataset, or it cannot be read.
    """
    file = Path(name)
    if file.suffix in _READERS or file.is_file():
        return _read_file(file, knob)
    try:
        return load_dataset(name, config, split=split)
    except (ValueError, OSError) as error:
        raise ValueError(f"`{knob}` is '{file}', which could not be loaded: {error}") from error


def _read_file(file, knob):
    if file.suffix not in _READERS:
        raise ValueError(f"`{knob}` is '{file}', but only files named {', '.join(_READERS)} can be read.")
    if not file.is_file():
        raise FileNotFoundError(f"`{knob}` is '{file}', but there is no such file.")
    with file.open("rb") as lines:
        if not any(line.strip() for line in lines):
            raise ValueError(f"`{knob}` is '{file}', which is empty.")
    try:
        return load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    except Exception as error:  # each reader has errors of its own
        cause = error.__cause__ or error
        place = _broken_line(file) if _READERS[file.suffix] == "json" else None
        raise ValueError(
            f"`{knob}` is '{file}', which cannot be read: {place or f'{type(cause).__name__}: {cause}'}."
        ) from error


def _broken_line(file) -> str | None:
    """What is wrong with the first line of a JSON file that is no row."""
    content = file.read_bytes()
    if file.suffix == ".json" and content.lstrip().startswith(b"["):  # an array over many lines
        try:
            json.loads(content)
        except ValueError as error:
            return str(error)
        return None
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f'line {number} is not an object such as {{"prompt": "..."}}'
        except ValueError as error:
            return f"line {number} is not valid JSON ({error})"
    return None


def dataset_fingerprint(dataset: Dataset) -> str:
    """
    Hash of the rows and their order. Unlike the fingerprint that `datasets` keeps, it does not change with the way
    that the same rows were made, which may be different in every process. Computed once for each dataset.
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


def format_of(dataset: Dataset) -> dict:
    """What a dataset makes of its rows when they are read: a format or a function, and the columns that are left."""
    found = dataset.format
    if found["type"] is None and set(found["columns"]) == set(dataset.column_names):
        return {}
    return {name: found[name] for name in ("type", "format_kwargs", "columns", "output_all_columns")}
