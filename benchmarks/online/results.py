"""The runs of run.py as they are kept in the repository, and what is said of several seeds."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

from coins import POOLS as COINS
from side_by_side import rollouts_to
from pools import POOLS


FILE = ROOT / "benchmarks" / "results" / "online.json"
ARMS = {
    "uniform": "random prompts (stock GRPOTrainer)",
    "online": "online",
    "learnalign online": "LearnAlign online",
    "learnalign online without kinds": "LearnAlign online, kinds do not count",
    "online with kinds": "learnability alone, in proportion, kinds count",
    "online without features": "online, `prompt_features=False`",
    "online with groups": "online, `group_column`",
    "online without fading": "online, observations never fade",
    "online without longer rests": "online, the same rest after every visit",
    "online with reviews": "online, with reviews (an earlier schedule)",
    "online with reviews without fading": "the earlier schedule, observations never fade",
    "mopps": "MoPPS (Beta posterior, Thompson draws)",
    "beta mean": "Beta posterior, its mean",
    "greso": "GRESO (skips after zero variance)",
    "pools": "pools by the last success rate (prime-rl)",
    "refill": "refill (DAPO), at equal rollouts",
    "filter": "filter: random among the learnable",
    "learnability": "selection by learnability",
    "learnalign": "selection by LearnAlign",
    "target": "selection by the target: learnability x alignment",
    "target alignment": "selection by the target: alignment alone",
    "learnalign then online": "LearnAlign's better half of the learnable, then online",
    "target online": "online, by the target: learnability x predicted alignment",
    "target then online": "the half of the learnable best aligned with the target, then online",
}


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
        if run["pool"] not in COINS:
            run.pop("quarters", None)
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
    pairs = [(run, others[run["seed"]]) for run in of(runs, pool, arm) if run["seed"] in others]
    for pair in pairs:
        first, second = (
            {name: run["conditions"][name] for name in ("data", "steps", "learning_rate")} for run in pair
        )
        if first != second:
            raise ValueError(f"{pool}: {arm} was run with {first}, {other} with {second}.")
    return pairs


def end(run, name="sampled") -> float:
    """What a run came to."""
    return run["looks"][-1][name]


def gains(pairs) -> list[float]:
    """Points of success at the end over the other run of each pair."""
    return [100 * (end(run) - end(other)) for run, other in pairs]


def area_gains(pairs) -> list[float]:
    """
    Points of mean success over the whole run, by the trapezoid rule over rollouts, over the other run of each pair.
    Where one run of a pair was measured less often, only what both have counts; before a selection ends, success is
    that of the start.
    """
    found = []
    for pair in pairs:
        selected = any(run.get("selection_rollouts") for run in pair)
        first, second = [run["looks"] for run in pair] if selected else shared(pair)
        found.append(100 * (over_run(first) - over_run(second)))
    return found


def over_run(looks) -> float:
    """Mean success over the rollouts of a run, by the trapezoid rule."""
    places = [(0, looks[0]["sampled"]), *((look["rollouts"], look["sampled"]) for look in looks)]
    parts = [(after - before) * (low + high) / 2 for (before, low), (after, high) in pairwise(places)]
    return sum(parts) / places[-1][0]


def shared(runs) -> list[list[dict]]:
    """
    The measurements that all runs have, a list of each run's: those nearest to the ones of the run that was measured
    least often. Their rollouts differ by a step's at most.
    """
    least = min((run["looks"] for run in runs), key=len)
    return [
        [min(run["looks"], key=lambda look: abs(look["rollouts"] - known["rollouts"])) for known in least]
        for run in runs
    ]


def curve(runs) -> list[tuple[float, float]]:
    """Rollouts and success, means over runs, where all of them were measured."""
    return [
        tuple(fmean(look[name] for look in looks) for name in ("rollouts", "sampled"))
        for looks in zip(*shared(runs), strict=True)
    ]


def share(pairs) -> float | None:
    """
    Of the other arm's rollouts the share after which the mean curve of an arm is at the other's mean final success;
    None if it never is.
    """
    runs, others = zip(*pairs, strict=True)
    needed = rollouts_to(curve(runs), fmean(map(end, others)))
    return None if needed is None else needed / fmean(other["rollouts"] for other in others)
