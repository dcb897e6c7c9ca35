"""Files of an online run besides its page: prompts, history, suspects, and the numbers of the run."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from ..curriculum.report import finite
from ..ground.disk import make_directory, write_json, write_parquet
from ..selection.excerpt import prompt_texts, shortened


PROMPTS_FILE = "online_prompts.parquet"
HISTORY_FILE = "online_history.parquet"
SUSPECTS_FILE = "suspects.parquet"
NOISE_FILE = "noise.parquet"
RUN_FILE = "online.json"
SAMPLES = 10  # prompts shown of each state
EXAMPLE = 200  # characters of a typical prompt
ANSWER_COLUMNS = (
    *("answer", "final_answer", "expected_answer", "reference_answer"),
    *("solution", "ground_truth", "label", "target"),
)
_PLAIN = ("string", "large_string", "int", "uint", "float", "bool")
_COUNTS = ("groups", "step", "visited", "retired", "parked", "unscored")


def write_tables(found: dict, dataset: Dataset, directory: Path) -> None:
    """
    Write the files, the numbers of the run last.

    Args:
        found (`dict`): see [`OnlineCurriculum.report`]; its `run` also has `step`, `max_steps`, `model`, `plan` and
            `settings`.
        dataset (`Dataset`): the prompts.
        directory (`Path`): is made.
    """
    make_directory(directory)
    prompts, numbers = found["prompts"], found["run"]
    _read_examples(numbers["kinds"], dataset)
    numbers = numbers | {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": _samples(prompts, dataset),
    }
    states, history = (_arrays(columns) for columns in (prompts, found["history"]))
    states["last_draw"] = pa.array(prompts["last_draw"], mask=prompts["last_draw"] < 0)
    history |= {name: pa.array(found["history"][name].astype(np.int64)) for name in _COUNTS}
    write_parquet(directory / PROMPTS_FILE, pa.table(states))
    write_parquet(directory / HISTORY_FILE, pa.table(history))
    write_parquet(directory / SUSPECTS_FILE, _suspects_table(found["suspects"], dataset))
    write_parquet(directory / NOISE_FILE, _suspects_table(found["noise"], dataset))
    write_json(directory / RUN_FILE, numbers)


def _arrays(columns) -> dict[str, pa.Array]:
    return {name: pa.array(values, from_pandas=True) for name, values in columns.items()}  # NaN becomes null


def _read_examples(kinds, dataset):
    """Put texts in place of rows."""
    rows = [row for one in kinds for row in one["examples"]]
    texts = iter([shortened(text, EXAMPLE) for text in prompt_texts(dataset, rows)] if rows else [])
    for one in kinds:
        one["examples"] = [next(texts) for _ in one["examples"]]


def _suspects_table(columns, dataset) -> pa.Table:
    """Return a table of suspects: index, texts, completion, visits and what else is told of them."""
    rows = columns["index"].tolist()
    answers = [name for name in ANSWER_COLUMNS if _is_plain(dataset, name)]
    return pa.table(
        {
            "index": pa.array(rows, pa.int64()),
            "prompt": pa.array(prompt_texts(dataset, rows), pa.string()),
            **{name: pa.array(_plain_texts(dataset, rows, name), pa.string()) for name in answers},
            "completion": pa.array([text and shortened(text) for text in columns["completion"]], pa.string()),
            "visits": pa.array(columns["visits"]),
            **{name: pa.array(columns[name], pa.float64()) for name in ("chance", "success_rate") if name in columns},
        }
    )


def _is_plain(dataset, name) -> bool:
    return name in dataset.column_names and getattr(dataset.features[name], "dtype", "").startswith(_PLAIN)


def _plain_texts(dataset, rows, name) -> list[str | None]:
    column = dataset.with_format(None).select_columns([name])[rows][name]
    return [None if value is None else shortened(str(value)) for value in column]


def _samples(columns, dataset) -> dict[str, list[dict]]:
    """Pick some prompts of each state but `resting`, with their numbers."""
    random = np.random.default_rng(0)
    found = {}
    for state in ("live", "retired", "parked", "new", "unscored"):
        places = np.flatnonzero(columns["state"] == state)
        if state == "new":
            places = random.choice(places, min(SAMPLES, len(places)), replace=False)
        else:
            by = columns["utility" if state == "live" else "last_draw"][places]
            places = places[np.argsort(-by, kind="stable")[:SAMPLES]]
        numbers = {
            name: [finite(value) for value in columns[name][places].tolist()]
            for name in ("index", "visits", "success_rate", "predicted_success", "utility", "last_draw")
        }
        numbers["prompt"] = prompt_texts(dataset, columns["index"][places].tolist())
        found[state] = [dict(zip(numbers, values, strict=True)) for values in zip(*numbers.values(), strict=True)]
    return found


# Reading the files -------------------------------------------------------------------------------------------------


def read_completions(directory: Path, size: int) -> dict[int, str]:
    """
    Read the completions of suspects of a dataset of `size` rows, by row. A file that is missing or damaged has none.
    """
    return _completions(directory / SUSPECTS_FILE, size) | _completions(directory / NOISE_FILE, size)


def _completions(file, size):
    try:
        table = pq.read_table(file, columns=["index", "completion"])
        found = zip(table["index"].to_pylist(), table["completion"].to_pylist(), strict=True)
        return {row: text for row, text in found if 0 <= row < size and isinstance(text, str)}
    except (OSError, pa.ArrowException, TypeError, KeyError):
        return {}


def find_run(path: Path) -> Path | None:
    """
    Find the directory of an online run, if `path`, the `output_dir` of a run or its `learnalign` directory, holds one
    that was written later than all of its selections.
    """
    directory = next((place for place in (path, path / "learnalign") if (place / RUN_FILE).is_file()), None)
    if directory is None:
        return None
    written = (directory / RUN_FILE).stat().st_mtime_ns
    later = (file.stat().st_mtime_ns > written for file in directory.glob("step-*/selection.json"))
    return None if any(later) else directory


def load_tables(directory: Path) -> tuple[pa.Table, pa.Table, pa.Table, pa.Table, dict]:
    """
    Read prompts, history, suspects, noise and numbers as [`write_tables`] wrote them.

    Raises:
        `ValueError`: a file is missing or damaged.
    """
    try:
        prompts, history, suspects, noise = (
            pq.read_table(directory / name, page_checksum_verification=True)
            for name in (PROMPTS_FILE, HISTORY_FILE, SUSPECTS_FILE, NOISE_FILE)
        )
        numbers = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"The files of the online run in '{directory}' cannot be read: {error}. They are written again with the "
            "next checkpoint."
        ) from error
    return prompts, history, suspects, noise, numbers


def count_states(prompts: pa.Table) -> dict[str, int]:
    """Count the prompts in each state."""
    counts = pc.value_counts(prompts["state"]).to_pylist()
    return {one["values"]: one["counts"] for one in counts}
