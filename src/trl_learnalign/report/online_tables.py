"""
The files of an online run except its report: every prompt, every chunk, the suspects, and the numbers of the run.
"""

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..choice.idle import missing
from ..data.prompts import prompt_text
from ..data.reading import columns_read, read_prompts, read_rows
from ..ground.disk import make_directory, write_json, write_parquet
from ..selection.samples import shortened
from ..selection.texts import columns_text


PROMPTS_FILE = "online_prompts.parquet"
HISTORY_FILE = "online_history.parquet"
SUSPECTS_FILE = "suspects.parquet"
RUN_FILE = "online.json"
SAMPLES = 10  # prompts shown of each kind
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "expected_answer",
    "reference_answer",
    "solution",
    "ground_truth",
    "label",
    "target",
)
_PLAIN = ("string", "large_string", "int", "uint", "float", "bool")
_COUNTS = ("chunk", "visited", "retired", "parked", "unscored")
_PACKAGES = ("trl-learnalign", "trl", "transformers", "accelerate", "torch")


def write_tables(schedule, host, directory: Path) -> None:
    """
    Writes the files, the numbers of the run last.

    Args:
        schedule ([`OnlineSchedule`]): after its first observation.
        host ([`Host`]): the trainer.
        directory (`Path`): `OUTPUT_DIR/learnalign`.
    """
    make_directory(directory)
    columns = schedule.prompt_columns()
    write_parquet(directory / PROMPTS_FILE, _prompts_table(columns))
    write_parquet(directory / HISTORY_FILE, _history_table(schedule.history))
    write_parquet(directory / SUSPECTS_FILE, _suspects_table(schedule, host.dataset))
    write_json(directory / RUN_FILE, _numbers(schedule, host) | {"samples": _samples(columns, host.dataset)})


def read_completions(directory: Path, size: int) -> dict[int, str]:
    """
    The completions of suspects of a dataset of `size` rows, by row. None if the file is missing or cannot be read.
    """
    try:
        table = pq.read_table(directory / SUSPECTS_FILE, columns=["index", "completion"])
        found = zip(table["index"].to_pylist(), table["completion"].to_pylist(), strict=True)
        return {row: text for row, text in found if 0 <= row < size and isinstance(text, str)}
    except (OSError, pa.ArrowException, TypeError, KeyError):
        return {}


def _prompts_table(columns) -> pa.Table:
    arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}  # NaN becomes null
    arrays["last_chunk"] = pa.array(columns["last_chunk"], mask=columns["last_chunk"] < 0)
    return pa.table(arrays)


def _history_table(history) -> pa.Table:
    arrays = {name: pa.array(history.column(name), from_pandas=True) for name in history.names}
    arrays |= {name: pa.array(history.column(name).astype(np.int64)) for name in _COUNTS}
    return pa.table(arrays | {"choosing": pa.array(history.column("choosing") > 0)})


def _suspects_table(schedule, dataset) -> pa.Table:
    rows, chance = schedule.suspects()
    answers = [name for name in ANSWER_COLUMNS if _is_plain(dataset, name)]
    texts = _texts(dataset, rows, answers)
    completions = [schedule.completions.get(row) for row in rows.tolist()]
    return pa.table(
        {
            "index": pa.array(rows, pa.int64()),
            "prompt": pa.array(texts["prompt"], pa.string()),
            **{name: pa.array(texts[name], pa.string()) for name in answers},
            "completion": pa.array([text and shortened(text) for text in completions], pa.string()),
            "visits": pa.array(schedule.memory.visits[rows]),
            "chance": pa.array(chance, pa.float64()),
        }
    )


def _is_plain(dataset, name) -> bool:
    return name in dataset.column_names and getattr(dataset.features[name], "dtype", "").startswith(_PLAIN)


def _texts(dataset, rows, answers=()) -> dict[str, list]:
    """Prompt and answers of these rows as text."""
    rows = [int(row) for row in rows]
    named = "prompt" in columns_read(dataset)
    found = read_prompts(dataset, rows) if named else read_rows(dataset, rows)
    texts = {"prompt": [shortened(prompt_text(one) if named else columns_text(one)) for one in found]}
    for name in answers:
        column = dataset.with_format(None).select_columns([name])[rows][name]
        texts[name] = [None if value is None else shortened(str(value)) for value in column]
    return texts


def _samples(columns, dataset) -> dict[str, list[dict]]:
    """Some prompts of each state but `resting`, with their numbers."""
    random = np.random.default_rng(0)
    found = {}
    for state in ("live", "retired", "parked", "new", "unscored"):
        places = np.flatnonzero(columns["state"] == state)
        if state == "new":
            places = random.choice(places, min(SAMPLES, len(places)), replace=False)
        else:
            by = columns["utility" if state == "live" else "last_chunk"][places]
            places = places[np.argsort(-by, kind="stable")[:SAMPLES]]
        rows = columns["index"][places]
        numbers = {
            name: [_finite(value) for value in columns[name][places].tolist()]
            for name in ("index", "visits", "success_rate", "predicted_success", "utility", "last_chunk")
        }
        numbers["prompt"] = _texts(dataset, rows)["prompt"]
        found[state] = [dict(zip(numbers, values, strict=True)) for values in zip(*numbers.values(), strict=True)]
    return found


def _numbers(schedule, host) -> dict:
    state, history, config = host.trainer.state, schedule.history, host.trainer.model.config
    return {
        "step": state.global_step,
        "max_steps": state.max_steps,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": config._name_or_path or config.model_type,
        "pool": len(schedule.pool),
        "chunk_prompts": schedule.layout.chunk_prompts,
        "plan": schedule.plan(0, state.max_steps, False),
        "suspects": schedule.num_suspects(),
        "choosing": schedule.judge.choosing,
        "skill": schedule.judge.skill,
        "skilled": schedule.judge.skilled,
        "tried": schedule.judge.tried,
        "headroom": schedule.judge.headroom,
        "pool_success": _finite(schedule.judge.pool_success),
        "calibration": history.calibration.tolist(),
        "by_visit": history.by_visit.tolist(),
        "revisits": history.revisits.tolist(),
        "periods": schedule.periods(),
        "graded": schedule.graded,
        "settings": {
            "config": {
                name: value
                for name, value in schedule.config.to_dict().items()
                if name not in ("schedule", "score") and missing(schedule.config, name) is None
            },
            "stream": {_SHOWN_AS.get(name, name): value for name, value in asdict(schedule.layout).items()},
            "num_processes": host.accelerator.num_processes,
            "versions": {package: version(package) for package in _PACKAGES},
        },
    }


_SHOWN_AS = {"num_prompts": "prompts_per_epoch"}  # which is what it is without a selection


def _finite(value):
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def find_run(path: Path) -> Path | None:
    """
    The directory of an online run, if `path`, the `output_dir` of a run or its `learnalign` directory, holds one that
    was written later than all of its selections.
    """
    directory = next((place for place in (path, path / "learnalign") if (place / RUN_FILE).is_file()), None)
    if directory is None:
        return None
    written = (directory / RUN_FILE).stat().st_mtime_ns
    later = (file.stat().st_mtime_ns > written for file in directory.glob("step-*/selection.json"))
    return None if any(later) else directory


def load_tables(directory: Path) -> tuple[pa.Table, pa.Table, pa.Table, dict]:
    """
    Prompts, history, suspects and numbers as [`write_tables`] wrote them.

    Raises:
        `ValueError`: a file is missing or damaged.
    """
    try:
        prompts, history, suspects = (
            pq.read_table(directory / name, page_checksum_verification=True)
            for name in (PROMPTS_FILE, HISTORY_FILE, SUSPECTS_FILE)
        )
        numbers = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"The files of the online run in '{directory}' cannot be read: {error}. They are written again with the "
            "next checkpoint."
        ) from error
    return prompts, history, suspects, numbers


def count_states(prompts: pa.Table) -> dict[str, int]:
    """How many prompts are in each state."""
    counts = pc.value_counts(prompts["state"]).to_pylist()
    return {one["values"]: one["counts"] for one in counts}
