"""The chosen rows for other trainers: as JSON lines, as parquet, on the Hub. Values are those of the source."""

import base64
import json
import math
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Value

from ..data.files import difference
from ..ground.disk import make_directory, write_atomically
from ..report.cards import dataset_card
from ..selection.result import SCORE_COLUMNS, Selection


try:
    from datasets import Json
except ImportError:  # before datasets 4.8
    Json = ()

Held = list[dict[str, str]]  # rows with their values as the texts that a file holds


# JSON lines --------------------------------------------------------------------------------------------------------


def write_lines(rows: Dataset, held: Held | None, target: Path) -> None:
    """
    Write the rows as JSON lines.

    Args:
        rows (`Dataset`): the chosen rows, with `SCORE_COLUMNS`.
        held ([`Held`], *optional*): the same rows as their file holds them, whose values are written unchanged.
            Without it, numbers are written with all their digits, dates in ISO format, bytes in base 64.
        target (`Path`): the file.
    """
    make_directory(target.parent)

    def write(temporary):
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(_as_read(rows)):
                texts = {name: json.dumps(_jsonable(value), ensure_ascii=False) for name, value in row.items()}
                if held is not None:
                    texts = held[number] | {name: texts[name] for name in SCORE_COLUMNS}
                pairs = (f"{json.dumps(name, ensure_ascii=False)}: {text}" for name, text in texts.items())
                file.write(f"{{{', '.join(pairs)}}}\n")

    write_atomically(target, write)


def _as_read(rows, size=1000):
    """Read the rows as Python values. Images and audio stay as they are stored."""
    nested = [name for name, feature in rows.features.items() if json_paths(feature)]
    stored = rows.with_format("arrow")
    for start in range(0, len(rows), size):
        table = stored[start : start + size]
        decoded = rows.select_columns(nested)[start : start + size] if nested else {}
        columns = [decoded[name] if name in decoded else table[name].to_pylist() for name in rows.column_names]
        yield from (dict(zip(rows.column_names, values, strict=True)) for values in zip(*columns, strict=True))


def _jsonable(value):
    if isinstance(value, dict):
        return {str(name): _jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no others
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# Parquet -----------------------------------------------------------------------------------------------------------


def exact(rows: Dataset, held: Held | None) -> tuple[Dataset, list[str]]:
    """
    Convert rows to the values that their file holds, nested wherever arrow can hold them. Values of several types,
    too large numbers, and objects with other members in each row become JSON texts.

    Args:
        rows (`Dataset`): the chosen rows.
        held ([`Held`], *optional*): the same rows as their file holds them.

    Returns:
        `tuple[Dataset, list[str]]`: the rows, and the names of columns, or of parts of them, that are JSON texts.
    """
    columns, features, texts = {}, {}, []
    for name, feature in rows.features.items():
        if name in SCORE_COLUMNS or (held is None and not json_paths(feature)):
            columns[name], features[name] = _stored(rows, name), feature
            continue
        read = rows[name][:]
        values = read if held is None else [json.loads(row.get(name, "null"), strict=False) for row in held]
        unchanged = all(difference(*pair) is None for pair in zip(values, read, strict=True))
        nested = _stored(rows, name) if unchanged and not json_paths(feature) else None
        nested = nested if nested is None or _writable(nested.type) else None
        if nested is None:
            nested = _nested(values)
            feature = feature if nested is None else Features.from_arrow_schema(pa.schema({name: nested.type}))[name]
        if nested is None and unchanged and not isinstance(feature, Json) and _writable(_stored(rows, name).type):
            nested = _stored(rows, name)
            texts += [f"{name}.{path}" for path in json_paths(feature)]
        if nested is None:
            storage = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            nested, feature = pa.array(storage, pa.string()), Json() if Json else Value("string")
            texts.append(name)
        columns[name], features[name] = nested, feature
    features = Features(features)
    table = pa.table(columns).cast(features.arrow_schema)
    return Dataset(table, info=DatasetInfo(features=features)), texts


def _stored(rows, name):
    return rows.select_columns([name]).with_format("arrow")[:][name].combine_chunks()


def _nested(values) -> pa.Array | None:
    """Convert values to arrow, if arrow can hold exactly these; else `None`."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None
    same = _writable(array.type) and _text(array.to_pylist()) == _text(values)
    return array if same else None


def _text(values):
    return json.dumps(values, sort_keys=True, default=repr)


def _writable(kind) -> bool:
    """Tell whether parquet can hold a type: it has no objects without members."""
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_writable(field.type) for field in kind)
    return _writable(kind.value_type) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else True


def json_paths(feature) -> list[str]:
    """List the places of JSON texts in a feature, as `a.b`; an empty name is the feature itself."""
    if isinstance(feature, Json):
        return [""]
    if isinstance(feature, dict):
        found = [(name, path) for name, part in feature.items() for path in json_paths(part)]
        return [f"{name}.{path}".rstrip(".") for name, path in found]
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return [] if inner is None else json_paths(inner)


# The Hub -----------------------------------------------------------------------------------------------------------


def check_repository(repo: str, private: bool, token: str | None, overwrite: bool) -> str:
    """
    Check that rows may be pushed to the dataset repository `repo`, and return its full name. Nothing is made or
    changed.

    Raises:
        `ValueError`: the repository holds files and may not be overwritten, it is public although the rows are not, or
            the Hub cannot be asked.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        full = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        found = api.dataset_info(full) if api.repo_exists(full, repo_type="dataset") else None
    except Exception as error:
        raise ValueError(
            f"`--push_to_hub` is '{repo}', but the Hub could not be asked about it ({type(error).__name__}: {error}). "
            "Log in with `hf auth login` or set `hub_token`, and check the network."
        ) from error
    if found is None:
        return full
    files = [file.rfilename for file in found.siblings or () if file.rfilename != ".gitattributes"]
    if files and not overwrite:
        raise ValueError(
            f"`--push_to_hub` is '{full}', which exists and holds {', '.join(files[:5])}"
            f"{' and more' if len(files) > 5 else ''}: its rows and its card would be replaced. Name another "
            "repository, or add `--overwrite`."
        )
    if private and not found.private:
        raise ValueError(
            f"`--push_to_hub` is '{full}', which is public, but rows are pushed to private repositories unless you "
            "say otherwise. Make it private on the Hub, or set `hub_private_repo: false`."
        )
    return full


def push_rows(rows: Dataset, selection: Selection, repo: str, source: str, private: bool, token: str | None) -> str:
    """Push the rows as a dataset, with a card that says how they were chosen, and return its address."""
    from huggingface_hub import DatasetCard

    rows.push_to_hub(repo, private=private, token=token)
    card = DatasetCard.load(repo, token=token)  # `datasets` has written about the files
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), "learnalign", "trl"]))
    card.text = dataset_card(selection, source)
    card.push_to_hub(repo, token=token)
    return f"https://huggingface.co/datasets/{repo}"
