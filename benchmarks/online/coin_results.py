"""
What the arms made of pools that chance decides in part, and of others beside them.

    python benchmarks/online/coin_results.py [--runs DIR ...] [--pools coins hard]

prints for each pool what the runs of run.py in these folders, and those that are kept in the repository, did with
their rollouts and where they came to, with differences to random prompts and to `online` (pairs of the same seed; 95 %
intervals by Student's t, from three pairs on), and the share of each kind of prompt in each quarter of the run.
"""

import sys
from pathlib import Path
from statistics import fmean


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import results
from pages import columns
from pools import CHANCE, KINDS
from results import ARMS, area_gains, costs, end, gains, of, over, over_run, paired
from skills import LEVELS, TASKS


def totals(run, name="groups") -> list[int]:
    """Groups of each kind in the whole run, or those that were live."""
    return [sum(kind) for kind in zip(*run["quarters"][name], strict=True)]


def chance(run, name="groups") -> int:
    """Groups of chance, or those that were live; of skills there are none."""
    groups = totals(run, name)
    return 0 if run["pool"].startswith("skills") or len(groups) <= CHANCE else groups[CHANCE]


def on_chance(run) -> float:
    """The share of training's rollouts that went to prompts of chance."""
    return chance(run) / sum(totals(run))


def worth(run) -> float:
    """Live groups that are not of chance, of all groups."""
    return (sum(totals(run, "live")) - chance(run, "live")) / sum(totals(run))


def arms(runs, pool) -> str:
    """A row for each arm: where its rollouts went, and what it came to."""
    own = {arm: of(runs, pool, arm) for arm in known(runs, pool)}

    def more(arm):
        both = paired(runs, pool, arm) if arm != "uniform" else []
        return f"{fmean(worth(run) / worth(other) for run, other in both):.2f}" if both else ""

    def less(arm):
        return over(runs, pool, arm, found=lambda both: gains(both, 1, on_chance), form=".3f")

    labels = {
        "prompts chosen by": lambda arm: ARMS.get(arm, arm),
        "seeds": lambda arm: len(own[arm]),
        "rollouts on coins": lambda arm: f"{fmean(map(on_chance, own[arm])):.3f}",
        "less random's": less,
        "live groups that are no coins, per group": lambda arm: f"{fmean(map(worth, own[arm])):.3f}",
        "x random's": more,
        "success over the run, %": lambda arm: f"{100 * fmean(over_run(run['looks']) for run in own[arm]):.1f}",
        "over random": lambda arm: over(runs, pool, arm, "uniform", area_gains),
        "over online": lambda arm: over(runs, pool, arm, "online", area_gains),
        "success at the end, %": lambda arm: f"{100 * fmean(map(end, own[arm])):.1f}",
        "over random ": lambda arm: over(runs, pool, arm),
        "over online ": lambda arm: over(runs, pool, arm, "online"),
    }
    return columns(labels | costs(own.get), own)


def known(runs, pool) -> list[str]:
    """The arms that have runs, those with names in results.ARMS first."""
    found = {run["arm"] for run in runs if run["pool"] == pool}
    return [arm for arm in ARMS if arm in found] + sorted(found - ARMS.keys())


def by_quarter(runs, pool) -> str:
    """Of each arm the share of each kind in each quarter of the rollouts, and of its groups how many were live."""

    def share(row, quarter):
        own, kind = of(runs, pool, row[0]), row[1]
        groups, live = (sum(run["quarters"][key][quarter][kind] for run in own) for key in ("groups", "live"))
        whole = sum(sum(run["quarters"]["groups"][quarter]) for run in own)
        return f"{groups / whole:.2f} ({live / groups:.2f})" if groups else "0"

    labels = {"prompts chosen by": lambda row: ARMS.get(row[0], row[0]), "kind": lambda row: row[2]}
    for quarter, name in enumerate(("first quarter (live)", "second", "third", "last")):
        labels[name] = lambda row, quarter=quarter: share(row, quarter)
    rows = [(arm, *kind) for arm in known(runs, pool) for kind in enumerate(kinds(of(runs, pool, arm)[0]))]
    return columns(labels, rows)


def kinds(run) -> list[str]:
    number = len(run["quarters"]["groups"][0])
    if run["pool"].startswith("skills"):
        return [f"{TASKS[kind // LEVELS].name} {kind % LEVELS}" for kind in range(number)]
    return [KINDS[kind] for kind in range(number)]


def curves(runs, pool) -> str:
    """Success held out of each arm, where it was measured."""

    def curve(arm):
        found = results.curve(of(runs, pool, arm))
        return ", ".join(f"{100 * rate:.1f} ({round(count)})" for count, rate in found)

    labels = {"prompts chosen by": lambda arm: ARMS.get(arm, arm), "success, % (after so many rollouts)": curve}
    return columns(labels, known(runs, pool))


def main():
    arguments = harness.options(__doc__, runs=[Path("runs/online")], pools=([str], "all that have runs by default"))
    runs = [run for run in results.load(arguments.runs) if "quarters" in run]
    found = {run["pool"] for run in runs} & set(arguments.pools or results.POOLS)
    for pool in [name for name in results.POOLS if name in found]:
        print(f"## {pool}", arms(runs, pool), curves(runs, pool), by_quarter(runs, pool), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
