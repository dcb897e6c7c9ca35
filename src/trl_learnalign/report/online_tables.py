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
from ..curriculum import OnlineCurriculum, OnlineSettings
from ..curriculum.history import History
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
STATES = ("new", "live", "resting", "retired", "parked", "unscored")
_MOST_PERIODS = 20
_BLOCK = 16_384  # prompts whose success is predicted at once, in float64
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
_COUNTS = ("groups", "step", "visited", "retired", "parked", "unscored")
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
    curriculum = schedule.curriculum
    columns = prompt_columns(curriculum)
    write_parquet(directory / PROMPTS_FILE, _prompts_table(columns))
    write_parquet(directory / HISTORY_FILE, _history_table(curriculum.history))
    write_parquet(directory / SUSPECTS_FILE, _suspects_table(curriculum, host.dataset))
    write_json(directory / RUN_FILE, _numbers(schedule, host) | {"samples": _samples(columns, host.dataset)})


def prompt_columns(curriculum: OnlineCurriculum) -> dict[str, np.ndarray]:
    """
    Return by name a value for each prompt that may be trained on, of shape `(n,)`. Where nothing was seen,
    `success_rate` is NaN and `last_draw` -1. docs/files_online.md explains the columns.
    """
    rows, memory = curriculum.pool, curriculum.memory
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    a, b = np.concatenate([np.stack(curriculum.posterior(block)) for block in blocks], axis=1)
    successes, failures, visits = memory.successes[rows], memory.failures[rows], memory.visits[rows]
    trials = successes + failures
    conditions = {
        "unscored": memory.unscored[rows] > 0,
        "retired": memory.is_retired(rows),
        "parked": memory.is_parked(rows),
        "resting": (memory.solved[rows] > 0) | (memory.failed[rows] > 0),
        "live": visits > 0,
    }
    places = [STATES.index(name) for name in conditions]
    return {
        "index": rows,
        "visits": visits,
        "success_rate": np.divide(successes, trials, out=np.full(len(rows), np.nan, np.float32), where=trials > 0),
        "predicted_success": (a / (a + b)).astype(np.float32),
        "utility": curriculum.utility(a, b).astype(np.float32),
        "last_draw": memory.last[rows],
        "ready_draw": memory.ready[rows],
        "state": np.array(STATES)[np.select(list(conditions.values()), places, STATES.index("new"))],
    }


def periods(history: History, settings: OnlineSettings) -> list[dict]:
    """
    Return when prompts were chosen and when drawn uniformly, the last 20 periods, oldest first: `first` and `last`
    group, `choosing`, `skill` and `headroom` at the end, and for uniform draws `why`.
    """
    choosing = history.column("choosing") > 0.5
    groups = history.column("groups").astype(int)
    ends = np.flatnonzero(np.diff(choosing, append=~choosing[-1:]))
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(int)
    skill, headroom = history.column("skill"), history.column("headroom")
    found = []
    for start, end in list(zip(starts.tolist(), ends.tolist(), strict=True))[-_MOST_PERIODS:]:
        if choosing[end]:
            why = None
        elif start == 0 and end + 1 < len(choosing):
            why = (
                f"at the start, until at least {settings.tried} uniform draws had shown that the prediction is better "
                "than the mean and that choosing should help"
            )
        elif start == 0 and groups[end] < settings.tried:
            why = f"the prediction is judged after {settings.tried} uniform draws"
        elif skill[start if start else end] <= settings.begin_skill:
            why = f"the prediction was hardly better than the mean (needed: a skill of {settings.begin_skill})"
        else:
            why = f"choosing would have made little difference (needed: a headroom of {settings.least_headroom})"
        found.append(
            {
                "first": int(groups[start - 1]) if start else 0,
                "last": int(groups[end]) - 1,
                "choosing": bool(choosing[end]),
                "skill": float(skill[end]),
                "headroom": float(headroom[end]),
                "why": why,
            }
        )
    return found


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
    arrays["last_draw"] = pa.array(columns["last_draw"], mask=columns["last_draw"] < 0)
    return pa.table(arrays)


def _history_table(history) -> pa.Table:
    arrays = {name: pa.array(history.column(name), from_pandas=True) for name in history.names}
    arrays |= {name: pa.array(history.column(name).astype(np.int64)) for name in _COUNTS}
    return pa.table(arrays)


def _suspects_table(curriculum, dataset) -> pa.Table:
    rows, chance = curriculum.suspects()
    answers = [name for name in ANSWER_COLUMNS if _is_plain(dataset, name)]
    texts = _texts(dataset, rows, answers)
    completions = [curriculum.completions.get(row) for row in rows.tolist()]
    return pa.table(
        {
            "index": pa.array(rows, pa.int64()),
            "prompt": pa.array(texts["prompt"], pa.string()),
            **{name: pa.array(texts[name], pa.string()) for name in answers},
            "completion": pa.array([text and shortened(text) for text in completions], pa.string()),
            "visits": pa.array(curriculum.memory.visits[rows]),
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
            by = columns["utility" if state == "live" else "last_draw"][places]
            places = places[np.argsort(-by, kind="stable")[:SAMPLES]]
        rows = columns["index"][places]
        numbers = {
            name: [_finite(value) for value in columns[name][places].tolist()]
            for name in ("index", "visits", "success_rate", "predicted_success", "utility", "last_draw")
        }
        numbers["prompt"] = _texts(dataset, rows)["prompt"]
        found[state] = [dict(zip(numbers, values, strict=True)) for values in zip(*numbers.values(), strict=True)]
    return found


def _numbers(schedule, host) -> dict:
    state, config, curriculum = host.trainer.state, host.trainer.model.config, schedule.curriculum
    history, judge = curriculum.history, curriculum.judge
    return {
        "step": state.global_step,
        "max_steps": state.max_steps,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": config._name_or_path or config.model_type,
        "pool": len(schedule.pool),
        "plan": schedule.plan(0, state.max_steps, False),
        "suspects": curriculum.num_suspects(),
        "choosing": judge.choosing,
        "skill": judge.skill,
        "skilled": judge.has_clear_skill,
        "tried": judge.tried,
        "headroom": judge.headroom,
        "pool_success": _finite(judge.pool_success),
        "calibration": history.calibration.tolist(),
        "by_visit": history.by_visit.tolist(),
        "revisits": history.revisits.tolist(),
        "periods": periods(history, schedule.settings),
        "graded": schedule.settings.graded,
        "settings": {
            "config": {
                name: value
                for name, value in schedule.run.config.to_dict().items()
                if name not in ("schedule", "score") and missing(schedule.run.config, name) is None
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
