"""The state of a curriculum as plain columns and numbers, for people to read."""

import math
from typing import TYPE_CHECKING

import numpy as np

from .clusters import nearest_rows
from .history import History
from .settings import OnlineSettings


if TYPE_CHECKING:
    from .online import OnlineCurriculum

STATES = ("new", "live", "resting", "retired", "parked", "unscored")
WARNINGS = ("greedy", "lost", "inconsistent")  # about a kind of prompts
_MOST_PERIODS = 20
_EXAMPLES = 3  # typical prompts of a cluster
_BLOCK = 16_384  # prompts whose success is predicted at once, in float64


def read_curriculum(curriculum: "OnlineCurriculum", names: list[str] | None) -> dict:
    """Return columns and numbers of all that is known: see [`OnlineCurriculum.report`]."""
    judge, history, memory = curriculum.judge, curriculum.history, curriculum.memory
    rows, chance = curriculum.suspects()
    noise = curriculum.noise()
    return {
        "prompts": prompt_columns(curriculum),
        "history": {name: history.column(name) for name in history.names},
        "suspects": {
            "index": rows,
            "completion": [curriculum.completions.get(row) for row in rows.tolist()],
            "visits": memory.visits[rows],
            "chance": chance,
        },
        "noise": {
            "index": noise,
            "completion": [curriculum.completions.get(row) for row in noise.tolist()],
            "visits": memory.visits[noise],
            "success_rate": _own_rates(memory, noise),
        },
        "run": {
            "pool": len(curriculum.pool),
            "suspects": curriculum.num_suspects(),
            "target": _target(curriculum.target),
            "kinds": read_kinds(curriculum, names),
            **{name: getattr(judge, name) for name in ("choosing", "skill", "tried", "headroom")},
            "skilled": judge.has_clear_skill,
            "pool_success": finite(judge.pool_success),
            **{name: getattr(history, name).tolist() for name in ("calibration", "by_visit", "revisits")},
            "periods": periods(history, curriculum.settings, judge.wait),
            "graded": curriculum.settings.graded,
        },
    }


def read_kinds(curriculum: "OnlineCurriculum", names: list[str] | None) -> list[dict]:
    """
    Return what is known of each kind of prompts, for JSON, in their order: `name` (of `names`, where a column gives
    them) and `examples` (rows of typical prompts, where kinds are clusters); `prompts`, `groups`, `uniform` draws and
    `inconsistent` rollouts; `share` of the pool, of the `rollouts`, of those of `late`, of the `live` groups; success
    at `first` and `now`, and mean `alignment`, each with its error, else `None`; whether it is `idle`; `warnings`.
    """
    kinds = curriculum.kinds
    typical = {} if names else nearest_rows(curriculum.features, kinds.labels, curriculum.choosable, _EXAMPLES)
    warned = kind_warnings(curriculum)
    idle = np.zeros(len(kinds), bool) if curriculum.progress is None else curriculum.progress.is_idle()
    pairs = {"first": kinds.success_first(), "now": kinds.success_now(), "alignment": kinds.alignment()}
    shares = {
        "share": kinds.shares,
        "rollouts": _part(kinds.total("rollouts")),
        "late": kinds.late_shares,
        "live": _part(kinds.total("live")),
    }
    return [
        {
            "name": names[kind] if names else f"kind {kind + 1}",
            "examples": typical.get(kind, []),
            "prompts": int(kinds.sizes[kind]),
            "groups": int(kinds.total("groups")[kind]),
            "uniform": int(kinds.uniform[kind]),
            "inconsistent": int(kinds.total("inconsistent")[kind]),
            "inconsistent_share": float(kinds.inconsistent_share[kind]),
            **{name: finite(float(values[kind])) for name, values in shares.items()},
            **{name: [finite(float(one[kind])) for one in pair] for name, pair in pairs.items()},
            "best": finite(float(kinds.best[kind, 0])),
            "window": int(kinds.windows[kind]),
            "idle": bool(idle[kind]),
            "warnings": [name for name, found in warned.items() if found[kind]],
        }
        for kind in range(len(kinds))
    ]


def kind_warnings(curriculum: "OnlineCurriculum") -> dict[str, np.ndarray]:
    """Return by name of a warning, in the order of `WARNINGS`, the kinds that it holds for, of shape `(K,)`, bool."""
    kinds = curriculum.kinds
    greedy = kinds.greedy() & curriculum.may_stay()
    return dict(zip(WARNINGS, (greedy, kinds.lost(), kinds.is_inconsistent()), strict=True))


def _target(target):
    """Return the rows of a target, its share of the pool and of the groups, and its success, for JSON."""
    if target is None:
        return None
    shares = {"share": target.share, "drawn": target.share_drawn, "success": target.success}
    return {"rows": len(target.rows)} | {name: finite(value) for name, value in shares.items()}


def _part(values):
    return values / max(values.sum(), 1)


def _own_rates(memory, rows):
    successes, trials = memory.successes[rows], memory.successes[rows] + memory.failures[rows]
    return np.divide(successes, trials, out=np.full(len(rows), np.nan, np.float32), where=trials > 0)


def prompt_columns(curriculum: "OnlineCurriculum") -> dict[str, np.ndarray]:
    """
    Return by name a value for each prompt that may be trained on, of shape `(n,)`. Where nothing was seen,
    `success_rate` is NaN and `last_draw` -1. docs/files.md explains the columns.
    """
    rows, memory = curriculum.pool, curriculum.memory
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    a, b = np.concatenate([np.stack(curriculum.posterior(block)) for block in blocks], axis=1)
    visits = memory.visits[rows]
    conditions = {
        "unscored": memory.unscored[rows] > 0,
        "retired": memory.is_retired(rows),
        "parked": memory.is_parked(rows),
        "resting": (memory.solved[rows] > 0) | (memory.failed[rows] > 0),
        "live": visits > 0,
    }
    places = [STATES.index(name) for name in conditions]
    factor = 1.0 if curriculum.alignment is None else curriculum.alignment.factor(rows)
    return {
        "index": rows,
        "visits": visits,
        "success_rate": _own_rates(memory, rows),
        "predicted_success": (a / (a + b)).astype(np.float32),
        "utility": (curriculum.utility(a, b) * factor).astype(np.float32),
        "last_draw": memory.last[rows],
        "ready_draw": memory.ready[rows],
        "state": np.array(STATES)[np.select(list(conditions.values()), places, STATES.index("new"))],
    }


def periods(history: History, settings: OnlineSettings, wait: int) -> list[dict]:
    """
    Return when prompts were chosen and when drawn uniformly, the last 20 periods, oldest first: `first` and `last`
    group, `choosing`, `skill` and `headroom` at the end, and for uniform draws `why`. The prediction was judged after
    `wait` uniform draws.
    """
    choosing = history.column("choosing") > 0.5
    groups = history.column("groups").astype(int)
    ends = np.flatnonzero(np.diff(choosing, append=~choosing[-1:]))
    starts = np.concatenate([[0], ends + 1])[: len(ends)].astype(int)  # none before the first group
    skill, headroom = history.column("skill"), history.column("headroom")
    found = []
    for start, end in list(zip(starts.tolist(), ends.tolist(), strict=True))[-_MOST_PERIODS:]:
        if choosing[end]:
            why = None
        elif start == 0 and end + 1 < len(choosing):
            why = (
                f"at the start, until at least {wait} uniform draws had shown that the prediction is better "
                "than the mean and that choosing should help"
            )
        elif start == 0 and groups[end] < wait:
            why = f"the prediction is judged after {wait} uniform draws"
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


def finite(value):
    """Replace NaN, which JSON has not, by `None`."""
    return value if math.isfinite(value) else None
