"""The prompts of a dataset: checks that something can be generated for each, equal prompts, and a prompt as text."""

import hashlib
import json
import warnings
import weakref
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from .reading import columns_read, has_transform, read_prompts, read_rows


_SHOWN = 10  # rows that an error names
_BATCH = 1000
# Arguments that TRL passes to reward functions beside the columns
_OF_REWARDS = {
    "prompts": "the prompts",
    "completions": "what was generated",
    "completion_ids": "the tokens generated",
    "trainer_state": "the state of the trainer",
}
_ASKED = ("prompt", "image", "images")  # columns that GRPOTrainer makes a prompt from
_LOOKS: "weakref.WeakKeyDictionary[Dataset, _Look]" = weakref.WeakKeyDictionary()


def check_dataset(dataset, needs_prompt: bool = True) -> None:
    """
    Check that prompts can be chosen from a dataset.

    Args:
        dataset: the training dataset.
        needs_prompt (`bool`): whether no environment supplies the prompts.

    Raises:
        `ValueError`: rows cannot be picked by number, there are none, the column `prompt` is missing, or a column has
            the name of an argument of reward functions.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"The training dataset {_kind_and_remedy(dataset)}")
    if len(dataset) == 0:
        raise ValueError("The training dataset is empty, so there is no prompt to choose.")
    if needs_prompt and "prompt" not in (columns := columns_read(dataset)):
        raise ValueError(
            f"The training dataset has no column `prompt`. Its columns are: {', '.join(columns)}. Rename "
            "the one that holds the prompts with `dataset.rename_column`, or name it with `--prompt_column` on the "
            "command line."
        )
    for name in set(_OF_REWARDS) & set(dataset.column_names):
        raise ValueError(
            f"The training dataset has a column '{name}', but TRL passes {_OF_REWARDS[name]} to reward functions "
            "under that name. Rename the column with `dataset.rename_column`, or in the file, or remove it."
        )


def _kind_and_remedy(dataset) -> str:
    """Describe a training dataset that is no `datasets.Dataset`, and how to make it one."""
    kind = type(dataset).__name__
    if isinstance(dataset, dict) and any(isinstance(part, Dataset | IterableDataset) for part in dataset.values()):
        splits = ", ".join(map(str, dataset))
        return f'is a {kind} with the splits {splits}. Pass one of them, such as `dataset["{next(iter(dataset))}"]`.'
    if isinstance(dataset, IterableDataset):
        return (
            f"has the type {kind}, which can be read only once and in order, but prompts are chosen by their rows. "
            "Load it without streaming, or use `Dataset.from_list(list(stream.take(n)))`."
        )
    makers: dict[type, str] = {list: "from_list(rows)", tuple: "from_list(list(rows))", dict: "from_dict(columns)"}
    makers[pd.DataFrame] = "from_pandas(frame)"
    how = next((f" with `Dataset.{make}`" for made, make in makers.items() if isinstance(dataset, made)), "")
    return f"has the type {kind}, but prompts are chosen from the rows of a `datasets.Dataset`. Make one{how}."


def warn_of_answers(dataset: Dataset) -> None:
    """Warn of prompts that end with a message of the assistant, with their number."""
    if "prompt" not in columns_read(dataset):
        return
    if has_transform(dataset):
        answered = _look(dataset).answered
    else:
        tables = _batches(dataset, ["prompt"])
        answered = sum(_answered(chunk) for table in tables for chunk in table["prompt"].chunks)
    if answered:
        warnings.warn(
            f"{answered:,} of {len(dataset):,} prompts end with a message of the assistant, so the policy reads the "
            "answer and is then asked for another one. Let the prompts end with the question, for example with "
            "`dataset.map(lambda row: {'prompt': row['prompt'][:-1]})`.",
            stacklevel=4,
        )


def _answered(column: pa.Array) -> int:
    kind = column.type
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        return 0
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    last = pc.list_flatten(column).take(pa.array(np.cumsum(lengths)[lengths > 0] - 1))
    if pa.types.is_struct(kind.value_type):
        messages = last.to_pylist()
    else:  # messages with different members are JSON texts
        messages = [json.loads(text or "null") for text in last.to_pylist()]
    return sum(map(_is_answer, messages))


def _is_answer(message) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def check_prompts(dataset: Dataset, what: str = "The training dataset") -> None:
    """
    Look at every prompt before anything is generated: column by column, or, with a transform, row by row as the
    trainer reads them. A dataset without a column `prompt` passes. Messages call the dataset `what`.

    Raises:
        `ValueError`: a prompt is null, an empty text or an empty list of messages, or one of its messages has neither
            content nor tool calls. The message names the rows.
    """
    if "prompt" not in columns_read(dataset):
        return
    found = _look(dataset).faults if has_transform(dataset) else _stored_faults(dataset)
    if found:
        reasons = "; ".join(f"{reason}: {_listed(rows)}" for reason, rows in found.items())
        raise ValueError(
            f"{what} has prompts that nothing can be generated for ({reasons}). Correct these rows "
            "(counted from 0), or leave them out with `dataset.filter` or `dataset.select`."
        )


def equal_prompts(dataset: Dataset) -> np.ndarray:
    """
    Find the first row with the same prompt for each of n rows: the row itself if there is none before it, of shape
    `(n,)`. Prompts are the same if their texts (or messages) and their images are; answers and other columns are not
    compared. Without a column `prompt` no two rows are the same.
    """
    if "prompt" not in columns_read(dataset):
        return np.arange(len(dataset))
    if has_transform(dataset):
        keys = _look(dataset).keys
    else:
        keys = bytearray()  # a dict would take ten times the memory
        for table in _batches(dataset, [name for name in _ASKED if name in dataset.column_names]):
            for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                keys += _key(row)
    _, first, places = np.unique(np.frombuffer(keys, "S16"), return_index=True, return_inverse=True)
    return first[places]


def prompt_lengths(dataset: Dataset) -> np.ndarray:
    """Count the characters of each prompt's text, of shape `(N,)`, float64."""
    if has_transform(dataset):
        return np.array(_look(dataset).lengths, dtype=float)
    batches = (range(start, min(start + _BATCH, len(dataset))) for start in range(0, len(dataset), _BATCH))
    lengths = [len(prompt_text(prompt)) for batch in batches for prompt in read_prompts(dataset, batch)]
    return np.array(lengths, dtype=float)


def _key(values) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).digest()


@dataclass
class _Look:
    """Everything that one pass through a transform shows of every row."""

    transform: object
    faults: dict[str, list[int]] = field(default_factory=dict)
    keys: bytearray = field(default_factory=bytearray)  # of 16 bytes each, the same for equal prompts
    lengths: list[int] = field(default_factory=list)
    answered: int = 0  # prompts that end with a message of the assistant


def _look(dataset) -> _Look:
    """Read all rows once for each transform of a dataset, which may be slow."""
    transform, known = dataset.format["format_kwargs"], _LOOKS.get(dataset)
    if known is not None and known.transform == transform:
        return known
    look = _Look(transform)
    for start in range(0, len(dataset), _BATCH):
        for place, row in enumerate(read_rows(dataset, range(start, min(start + _BATCH, len(dataset)))), start):
            prompt = row["prompt"]
            if (reason := _fault(prompt)) is not None:
                look.faults.setdefault(reason, []).append(place)
            look.keys += _key([_plain(row[name]) for name in _ASKED if name in row])
            look.lengths.append(len(prompt_text(prompt)))
            look.answered += isinstance(prompt, list) and len(prompt) > 0 and _is_answer(prompt[-1])
    _LOOKS[dataset] = look
    return look


def _fault(prompt) -> str | None:
    """Name the fault of one prompt, as [`_faults`] does for a column."""
    if prompt is None:
        return "null"
    if not isinstance(prompt, str | list):
        return None
    if not prompt:
        return "empty"
    silent = isinstance(prompt, list) and any(
        message is None
        or (
            isinstance(message, dict)
            and "content" in message
            and message["content"] is message.get("tool_calls") is None
        )
        for message in prompt
    )
    return "a message without content" if silent else None


def _plain(value):
    """Replace images, which a transform has decoded, by their content."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return [type(value).__name__, value.tobytes()] if callable(getattr(value, "tobytes", None)) else value


def _stored_faults(dataset: Dataset) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    start = 0
    for table in _batches(dataset, ["prompt"]):
        for reason, rows in _faults(table.combine_chunks()["prompt"].chunk(0)).items():  # a chunk might be one row
            found.setdefault(reason, []).extend(start + row for row in rows)
        start += len(table)
    return found


def _batches(dataset, columns):
    return dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH)


def _faults(column: pa.Array) -> dict[str, list[int]]:
    """Find the faults of a column of prompts, each with its rows."""
    faults = {"null": column.is_null()}
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        faults["empty"] = pc.equal(pc.binary_length(column), 0)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        faults["empty"] = pc.equal(pc.list_value_length(column), 0)
        if pa.types.is_struct(kind.value_type):
            rows = pc.list_parent_indices(column).filter(_silent(pc.list_flatten(column))).unique()
            faults["a message without content"] = pc.is_in(
                pa.array(range(len(column))), value_set=rows.cast(pa.int64())
            )
    found = {reason: pc.indices_nonzero(mask.fill_null(False)).to_pylist() for reason, mask in faults.items()}
    return {reason: rows for reason, rows in found.items() if rows}


def _silent(messages: pa.StructArray) -> pa.BooleanArray:
    """
    Mark messages that say nothing: null, or with neither content nor tool calls. Empty text is left to the chat
    template.
    """
    names = [field.name for field in messages.type]
    silent = messages.is_null()
    if "content" in names:
        empty = pc.struct_field(messages, "content").is_null()
        if "tool_calls" in names:
            empty = pc.and_(empty, pc.struct_field(messages, "tool_calls").is_null())
        silent = pc.or_(silent, empty)
    return silent


def _listed(rows):
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows[:_SHOWN])) + more


def check_duplicates(dataset: Dataset, deduplicate: bool, warn: bool) -> None:
    """
    Warn of rows with equal prompts, if `warn` is set and several of them could be chosen.

    Raises:
        `ValueError`: `deduplicate` without a column `prompt`.
    """
    if deduplicate and "prompt" not in (columns := columns_read(dataset)):
        raise ValueError(
            "`deduplicate=True` compares the column `prompt`, but the training dataset has only these: "
            f"{', '.join(columns)}. Set `deduplicate=False`."
        )
    if deduplicate or not warn:
        return
    rows, distinct = len(dataset), len(np.unique(equal_prompts(dataset)))
    if distinct < rows:
        warnings.warn(
            f"The training dataset has {rows:,} rows, but only {distinct:,} different prompts, so a prompt may be "
            "chosen several times. Set `deduplicate=True` to use only one row of each.",
            stacklevel=4,
        )


def prompt_text(prompt) -> str:
    """Format a prompt for people: text as it is, messages one after another, anything else as Python prints it."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return str(prompt)
    texts = [_content_text(message.get("content")) for message in prompt]
    if len(prompt) == 1:
        return texts[0]
    return "\n".join(f"{message.get('role')}: {text}" for message, text in zip(prompt, texts, strict=True))


def _content_text(content) -> str:
    """Format the content of a message: text, the parts of a multimodal one, or nothing."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    return " ".join(
        part.get("text") or f"[{part.get('type')}]" if isinstance(part, dict) else str(part) for part in content
    )
