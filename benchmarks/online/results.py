"""The runs of run.py as they are kept in the repository, and what is said of several seeds."""

import json
from pathlib import Path
from statistics import fmean, median, stdev

from pools import POOLS


FILE = Path(__file__).resolve().parents[1] / "results" / "online.json"
ARMS = {
    "uniform": "uniform draws (stock GRPOTrainer)",
    "online": "online",
    "online without features": "online, `prompt_features=False`",
    "mopps": "MoPPS (Beta posterior, Thompson draws)",
    "beta mean": "Beta posterior, its mean",
    "greso": "GRESO (skips after zero variance)",
    "pools": "pools by the last success rate (prime-rl)",
    "refill": "refill (DAPO), at equal rollouts",
}
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # 97.5 % quantiles of t, by degrees of freedom


def load() -> list[dict]:
    """All runs."""
    return json.loads(FILE.read_text(encoding="utf-8"))["runs"] if FILE.is_file() else []


def collect(folders: list[Path]) -> None:
    """Adds the runs of these folders, the long lists as means."""
    known = {_key(run): run for run in load()}
    for file in sorted(file for folder in folders for name in POOLS for file in (folder / name).glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        logged = run.pop("logged")
        run["headroom"] = round(fmean(logged["learnalign/headroom"]), 2) if "learnalign/headroom" in logged else None
        run["skill"] = round(logged["learnalign/skill"][-1], 2) if "learnalign/skill" in logged else None
        for name in ("live", "groups"):
            del run[name]
        known[_key(run)] = run
    FILE.write_text(json.dumps({"runs": [known[key] for key in sorted(known)]}, indent=1) + "\n", encoding="utf-8")


def _key(run):
    return [*POOLS].index(run["pool"]), [*ARMS].index(run["arm"]), run["seed"]


def of(runs, pool, arm) -> list[dict]:
    """The runs of an arm, by seed."""
    return [run for run in runs if run["pool"] == pool and run["arm"] == arm]


def paired(runs, pool, arm, other="uniform") -> list[tuple[dict, dict]]:
    """Runs of an arm, each with that of another arm of the same seed."""
    others = {run["seed"]: run for run in of(runs, pool, other)}
    return [(run, others[run["seed"]]) for run in of(runs, pool, arm) if run["seed"] in others]


def end(run, name="sampled") -> float:
    """What a run came to."""
    return run["looks"][-1][name]


def gains(pairs) -> list[float]:
    """Points of success at the end over the other run of each pair."""
    return [100 * (end(run) - end(other)) for run, other in pairs]


def interval(values) -> tuple[float, float] | None:
    """Of the mean over seeds, 95 %, by Student's t; None of fewer than three."""
    if len(values) < 3:
        return None
    half = STUDENT[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def rollouts_to(run, goal) -> float | None:
    """Rollouts until the success at temperature 1 is `goal`, on the line between two looks; None if it is never."""
    looks = run["looks"]
    for before, after in zip(looks, looks[1:], strict=False):
        if after["sampled"] >= goal:
            share = max(0.0, goal - before["sampled"]) / max(after["sampled"] - before["sampled"], 1e-9)
            return before["rollouts"] + share * (after["rollouts"] - before["rollouts"])
    return None


def shares(pairs) -> list[float | None]:
    """Of the other run's rollouts the share that a run needs to the other's final success; None if it never does."""
    needed = [(rollouts_to(run, end(other)), other["rollouts"]) for run, other in pairs]
    return [None if rollouts is None else rollouts / total for rollouts, total in needed]


def middle(values: list[float | None]) -> float | None:
    """The median; that of values which are mostly None is None."""
    found = median([float("inf") if value is None else value for value in values])
    return None if found == float("inf") else found
