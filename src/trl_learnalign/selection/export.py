"""The chosen rows as other trainers read them: verl, OpenRLHF and slime."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..data.columns import check_named, root_of
from ..data.reading import has_transform, read_rows
from ..ground.disk import make_directory, write_bytes, write_parquet


# Trainers, with how the name of a file for each ends
EXPORTS = {"verl": "parquet", "openrlhf": "jsonl", "slime": "jsonl"}
_BATCH = 1000  # rows in memory at once
_IMAGES = ("image", "images")
_VERL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("split", pa.string()),
                    ("learnalign_score", pa.float64()),
                    ("success_rate", pa.float64()),
                ]
            ),
        ),
    ]
)


def check_export(kind: str, dataset: Dataset, answer_column: str | None) -> None:
    """
    Check that rows can be written for the trainer `kind`, before anything is measured.

    Raises:
        `ValueError`: the trainer is unknown, there is no column of answers, or prompts have images.
    """
    if kind not in EXPORTS:
        raise ValueError(f"`kind` is {kind!r}, but rows are written for {', '.join(EXPORTS)}. Name one of these.")
    if answer_column is None:
        raise ValueError(
            f"Rows for {kind} have the right answers, but `answer_column` is not set. Name the column of the dataset "
            "that holds them."
        )
    check_named(dataset, "answer_column", answer_column, [answer_column])
    images = [name for name in _IMAGES if name in dataset.column_names]
    if images:
        raise ValueError(
            f"The dataset has a column '{images[0]}', but rows for {kind} are written without images. Use "
            "`--format parquet`, or `Selection.to_dataset`, and convert the rows yourself."
        )


def export(
    kind: str,
    path: Path,
    chosen: Dataset,
    found: Sequence[tuple[int, float | None, float | None]],
    answer_column: str | None,
    source: str,
    split: str,
    prompt_column: str = "prompt",
) -> None:
    """
    Write chosen rows for the trainer `kind`, best first, see [`Selection.export`].

    Args:
        kind (`str`): one of [`EXPORTS`].
        path (`Path`): the file.
        chosen (`Dataset`): n rows.
        found (`Sequence[tuple]` of length n): the row in the whole dataset, the score and the success rate of each.
        answer_column (`str`): column, or field such as `extra.answer`, of the right answers.
        source, split (`str`): names of the dataset and its split. A column `data_source` of the rows comes first.
        prompt_column (`str`): column of the prompts.

    Raises:
        `ValueError`: see [`check_export`]; or a row has no answer, or, for verl, a message that is not text.
    """
    check_export(kind, chosen, answer_column)
    assert answer_column is not None  # checked
    root = root_of(chosen, answer_column)
    names = {prompt_column, root, *({"data_source", "ability"} & set(chosen.column_names))}
    lines = []
    for row, (index, *values) in zip(_read(chosen, sorted(names)), found, strict=True):
        score, rate = (None if value is None or math.isnan(value) else float(value) for value in values)
        about = {"index": index, "split": split, "learnalign_score": score, "success_rate": rate}
        prompt, answer = _prompt(row[prompt_column]), _answer(row, root, answer_column, index)
        of = row.get("data_source") or source
        if kind == "verl":
            lines.append(
                {
                    "data_source": of,
                    "prompt": _texts(prompt, index),
                    "ability": row.get("ability") or "unknown",
                    "reward_model": {"style": "rule", "ground_truth": answer},
                    "extra_info": about,
                }
            )
        elif kind == "openrlhf":
            lines.append({"prompt": prompt, "label": answer, "datasource": of} | about)
        else:
            lines.append({"prompt": prompt, "label": answer, "metadata": {"source_name": of} | about})
    make_directory(path.parent)
    if kind == "verl":
        write_parquet(path, pa.Table.from_pylist(lines, schema=_VERL))
        return
    write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def _read(chosen, names) -> Iterator[dict]:
    """Read columns of rows as Python values; through the transform of a dataset that has one."""
    stored = chosen if has_transform(chosen) else chosen.with_format(None).select_columns(names)
    for start in range(0, len(stored), _BATCH):
        yield from read_rows(stored, range(start, min(start + _BATCH, len(stored))))


def _prompt(prompt) -> Any:
    """Return a text as it is, and messages without the empty fields that arrow adds to them."""
    if isinstance(prompt, str):
        return prompt
    return [{name: value for name, value in message.items() if value is not None} for message in prompt]


def _texts(prompt, index) -> list[dict]:
    """Return a prompt as messages of texts: a text is one of the user."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise ValueError(
                f"The prompt of row {index} has a message that is more than a role and a text "
                f"({', '.join(message)}), which cannot be written for verl. Use `--format parquet`, or "
                "`Selection.to_dataset`, and convert the rows yourself."
            )
    return messages


def _answer(row, root, name, index) -> str:
    """Return the answer of a row as text: texts as they are, other values in JSON."""
    value = row[root]
    for part in name.removeprefix(root).split(".")[1:]:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or value != value or value == "":
        raise ValueError(
            f"`answer_column` is {name!r}, but row {index} has no answer there. Leave such rows out with "
            f"`where='{name} is not None'`, or fill them in."
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
