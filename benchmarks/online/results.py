"""The runs of both run.py as they are kept in the repository, and what is said of several seeds."""

from itertools import pairwise
from statistics import fmean

from harness import RESULTS, read, write
from pages import points
from pools import COINS, POOLS
from side_by_side import rollouts_to


FILE = RESULTS / "online.json"
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


def load(folders=()) -> list[dict]:
    """All runs of the tiny policy that are kept, and those in these folders."""
    return merged(read(FILE, {"runs": []})["runs"], found_in(folders), POOLS, ARMS)


def merged(kept, more, pools, arms) -> list[dict]:
    """Runs by pool, arm and seed. Of two with the same, the later counts."""
    found = {(run["pool"], run["arm"], run["seed"]): run for run in (*kept, *more)}
    order = sorted(found, key=lambda key: ([*pools].index(key[0]), [*arms, key[1]].index(key[1]), *key[1:]))
    return [found[key] for key in order]


def found_in(folders):
    """Yield the runs in these folders; others lie beside them: adapters, policies."""
    for file in sorted(file for folder in folders for file in folder.glob("*/*.json")):
        run = read(file)
        if isinstance(run, dict) and {"pool", "arm", "seed"} <= run.keys() and run["pool"] in POOLS:
            yield run


def collect(folders) -> None:
    """Adds the runs of these folders, the long lists as means."""
    more = [*found_in(folders)]
    for run in more:
        logged = run.pop("logged")
        run["headroom"] = round(fmean(logged["learnalign/headroom"]), 2) if "learnalign/headroom" in logged else None
        run["skill"] = round(logged["learnalign/skill"][-1], 2) if "learnalign/skill" in logged else None
        for name in ("live", "groups", *(["quarters"] if run["pool"] not in COINS else [])):
            run.pop(name, None)
    write(FILE, {"runs": merged(load(), more, POOLS, ARMS)})


def of(runs, pool, arm) -> list[dict]:
    """The runs of an arm, by seed."""
    return [run for run in runs if run["pool"] == pool and run["arm"] == arm]


def paired(runs, pool, arm, other="uniform") -> list[tuple[dict, dict]]:
    """Runs of an arm, each with that of another arm of the same seed; of the chat model those that came as far."""
    others, names = {run["seed"]: run for run in of(runs, pool, other)}, ("data", "steps", "learning_rate")
    pairs = [(run, others[run["seed"]]) for run in of(runs, pool, arm) if run["seed"] in others]
    pairs = [(a, b) for a, b in pairs if "sampled" in a["looks"][0] or len(a["looks"]) == len(b["looks"])]
    for pair in pairs:
        first, second = ({name: run.get("conditions", {}).get(name) for name in names} for run in pair)
        if first != second and all("conditions" in run for run in pair):
            raise ValueError(f"{pool}: {arm} was run with {first}, {other} with {second}.")
    return pairs


def rates(run) -> list[float]:
    """Success at each look, of the chat model the mean over the kinds of questions."""
    return [look["sampled"] if "sampled" in look else look["mean"] for look in run["looks"]]


def end(run, name=None) -> float:
    """What a run came to."""
    return run["looks"][-1][name] if name else rates(run)[-1]


def tokens(run) -> float | None:
    """Tokens that a run generated, those of a selection among them; None where their number was not kept."""
    if "completion_length" not in run:
        return run.get("tokens")
    return run["rollouts"] * run["completion_length"]


def seconds(run) -> float | None:
    """Seconds that training took, without looks; None where they were not kept."""
    return run["looks"][-1].get("seconds", run.get("seconds"))


def costs(runs_of, whose="") -> dict:
    """Columns of a table: tokens and seconds, means over the runs of an item, empty where one of them has none."""

    def mean(item, value, scale):
        found = [value(run) for run in runs_of(item)]
        return f"{scale * fmean(found):,.0f}" if found and None not in found else ""

    return {
        f"tokens generated, thousands{whose}": lambda item: mean(item, tokens, 1e-3),
        f"seconds{whose}": lambda item: mean(item, seconds, 1),
    }


def took(runs) -> str:
    """From the fewest to the most seconds of these runs."""
    found = [seconds(run) for run in runs if seconds(run) is not None]
    return f"{min(found):,.0f} to {max(found):,.0f}"


def gains(pairs, scale=100, value=end) -> list[float]:
    """Points of success at the end over the other run of each pair."""
    return [scale * (value(run) - value(other)) for run, other in pairs]


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


def over(runs, pool, arm, other="uniform", found=gains, form=".1f") -> str:
    """What an arm has over another one; nothing where no run can be compared."""
    both = paired(runs, pool, arm, other) if arm != other else []
    return points(found(both), form) if both else ""


def curve(runs) -> list[tuple[float, float]]:
    """Rollouts and success, means over runs, where all of them were measured."""
    names = ("rollouts", "sampled")
    return [tuple(fmean(look[name] for look in part) for name in names) for part in zip(*shared(runs), strict=True)]


def share(pairs) -> float | None:
    """
    Of the other arm's rollouts the share after which the mean curve of an arm is at the other's mean final success;
    None if it never is.
    """
    runs, others = zip(*pairs, strict=True)
    needed = rollouts_to(curve(runs), fmean(map(end, others)))
    return None if needed is None else needed / fmean(other["rollouts"] for other in others)
