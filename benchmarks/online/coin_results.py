"""
What the arms made of pools that chance decides in part, and of others beside them.

    python benchmarks/online/coin_results.py [--runs DIR ...] [--pools coins hard]

prints for each pool what the runs of run.py in these folders, and those that are kept in the repository, did with
their rollouts and where they came to, with differences to random prompts and to `online` (pairs of the same seed; 95 %
intervals by Student's t, from three pairs on), and the share of each kind of prompt in each quarter of the run.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import results
from coins import CHANCE, KINDS
from pages import points, table
from results import ARMS, area_gains, end, gains, of, over_run, paired
from skills import LEVELS, TASKS


OTHERS = {"uniform": "random", "online": "online"}  # that arms are compared with


def load(folders: list[Path]) -> list[dict]:
    """The runs in these folders, and those that are kept and not there."""
    found = {}
    for run in results.load():
        found[run["pool"], run["arm"], run["seed"]] = run
    for file in sorted(file for folder in folders for file in folder.glob("*/*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if {"pool", "arm", "seed"} <= run.keys():  # others lie beside them: adapters, policies
            found[run["pool"], run["arm"], run["seed"]] = run
    return [run for run in found.values() if "quarters" in run]


def totals(run, name="groups") -> list[int]:
    """Groups of each kind in the whole run, or those that were live."""
    return [sum(kind) for kind in zip(*run["quarters"][name], strict=True)]


def on_chance(run) -> float:
    """The share of training's rollouts that went to prompts of chance."""
    groups = totals(run)
    return groups[CHANCE] / sum(groups) if mixed(run) and len(groups) > CHANCE else 0.0


def worth(run) -> float:
    """Live groups that are not of chance, of all groups."""
    live = totals(run, "live")
    return (sum(live) - (live[CHANCE] if mixed(run) and len(live) > CHANCE else 0)) / sum(totals(run))


def mixed(run) -> bool:
    """Whether kinds are those of coins.py, not skills."""
    return not run["pool"].startswith("skills")


def differences(measure, pairs) -> str:
    return points([measure(run) - measure(other) for run, other in pairs], ".3f") if pairs else ""


def arms(runs, pool) -> str:
    """A row for each arm: where its rollouts went, and what it came to."""
    rows = []
    for arm in known(runs, pool):
        own = of(runs, pool, arm)
        pairs = {name: paired(runs, pool, arm, other) if arm != other else [] for other, name in OTHERS.items()}
        more = [worth(run) / worth(other) for run, other in pairs["random"]]
        rows.append(
            [
                ARMS.get(arm, arm),
                str(len(own)),
                f"{fmean(map(on_chance, own)):.3f}",
                differences(on_chance, pairs["random"]),
                f"{fmean(map(worth, own)):.3f}",
                f"{fmean(more):.2f}" if more else "",
                f"{100 * fmean(over_run(run['looks']) for run in own):.1f}",
                *(points(area_gains(pair)) if pair else "" for pair in pairs.values()),
                f"{100 * fmean(map(end, own)):.1f}",
                *(points(gains(pair)) if pair else "" for pair in pairs.values()),
            ]
        )
    over = [f"over {name}" for name in OTHERS.values()]
    head = ["prompts chosen by", "seeds", "rollouts on coins", "less random's"]
    head += ["live groups that are no coins, per group", "x random's"]
    head += ["success over the run, %", *over, "success at the end, %", *over]
    return table(head, rows)


def known(runs, pool) -> list[str]:
    """The arms that have runs, those with names in results.ARMS first."""
    found = {run["arm"] for run in runs if run["pool"] == pool}
    return [arm for arm in ARMS if arm in found] + sorted(found - ARMS.keys())


def by_quarter(runs, pool) -> str:
    """Of each arm the share of each kind in each quarter of the rollouts, and of its groups how many were live."""
    rows = []
    for arm in known(runs, pool):
        own = of(runs, pool, arm)
        for kind, name in enumerate(kinds(own[0])):
            cells = []
            for quarter in range(4):
                groups, live = (sum(run["quarters"][key][quarter][kind] for run in own) for key in ("groups", "live"))
                whole = sum(sum(run["quarters"]["groups"][quarter]) for run in own)
                cells.append(f"{groups / whole:.2f} ({live / groups:.2f})" if groups else "0")
            rows.append([ARMS.get(arm, arm), name, *cells])
    return table("prompts chosen by | kind | first quarter (live) | second | third | last", rows)


def kinds(run) -> list[str]:
    number = len(run["quarters"]["groups"][0])
    if mixed(run):
        return [KINDS[kind] for kind in range(number)]
    return [f"{TASKS[kind // LEVELS].name} {kind % LEVELS}" for kind in range(number)]


def curves(runs, pool) -> str:
    """Success held out of each arm, where it was measured."""
    rows = []
    for arm in known(runs, pool):
        curve = results.curve(of(runs, pool, arm))
        rows.append([ARMS.get(arm, arm), ", ".join(f"{100 * rate:.1f} ({round(count)})" for count, rate in curve)])
    return table("prompts chosen by | success, % (after so many rollouts)", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[Path("runs/online")])
    parser.add_argument("--pools", nargs="+", help="all that have runs by default")
    arguments = parser.parse_args()
    runs = load(arguments.runs)
    for pool in [name for name in results.POOLS if name in {run["pool"] for run in runs}]:
        if arguments.pools is None or pool in arguments.pools:
            parts = [arms(runs, pool), curves(runs, pool), by_quarter(runs, pool)]
            print(f"## {pool}", *parts, sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
