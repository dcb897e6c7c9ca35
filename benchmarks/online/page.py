"""
Collects the runs of run.py and writes docs/online.md from them, so that nobody types a number.

    python benchmarks/online/page.py [--runs DIR ...] [--check]

--runs: folders of finished runs, which are added to benchmarks/results/online.json. The words of the page are in
online.md.in.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from pages import ROOT, fill, publish, table


FILE = ROOT / "benchmarks" / "results" / "online.json"
PAGE = ROOT / "docs" / "online.md"
NAMES = {
    "uniform": "uniform draws (stock GRPOTrainer)",
    "online": "online",
    "online without features": "online, `prompt_features=False`",
    "mopps": "MoPPS (Beta posterior, Thompson draws)",
    "beta mean": "Beta posterior, its mean",
    "greso": "GRESO (skips after zero variance)",
    "pools": "pools by the last success rate (prime-rl)",
    "refill": "refill (DAPO), at equal rollouts",
}
POOLS = ("hard", "clean", "live", "hard-wrong", "clean-wrong")


def collect(folders: list[Path]) -> None:
    """Adds the runs of these folders, the long lists as means."""
    known = {key(run): run for run in json.loads(FILE.read_text())["runs"]} if FILE.is_file() else {}
    for file in sorted(file for folder in folders for name in POOLS for file in (folder / name).glob("*.json")):
        run = json.loads(file.read_text())
        logged = run.pop("logged")
        run["headroom"] = round(fmean(logged["learnalign/headroom"]), 2) if "learnalign/headroom" in logged else None
        run["skill"] = round(logged["learnalign/skill"][-1], 2) if "learnalign/skill" in logged else None
        for name in ("live", "groups"):
            del run[name]
        known[key(run)] = run
    runs = [known[one] for one in sorted(known)]
    FILE.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def key(run) -> tuple:
    return POOLS.index(run["pool"]), [*NAMES].index(run["arm"]), run["seed"]


RUNS = json.loads(FILE.read_text())["runs"] if FILE.is_file() else []


def of(pool, arm) -> list[dict]:
    """The runs of an arm, by seed."""
    return [run for run in RUNS if run["pool"] == pool and run["arm"] == arm]


def paired(pool, arm) -> list[tuple[dict, dict]]:
    """Runs of an arm, each with the uniform one of the same seed."""
    uniform = {run["seed"]: run for run in of(pool, "uniform")}
    return [(run, uniform[run["seed"]]) for run in of(pool, arm) if run["seed"] in uniform]


def values(numbers, digits=3) -> str:
    """One for each seed."""
    return ", ".join(f"{number:.{digits}f}" for number in numbers)


def rollouts_to(run, goal) -> float | None:
    """Rollouts until the success at temperature 1 is `goal`, on the line between two looks; None if it is never."""
    looks = run["looks"]
    for before, after in zip(looks, looks[1:], strict=False):
        if after["sampled"] >= goal:
            share = max(0.0, goal - before["sampled"]) / max(after["sampled"] - before["sampled"], 1e-9)
            return before["rollouts"] + share * (after["rollouts"] - before["rollouts"])
    return None


def share_of_rollouts(run, uniform) -> float | None:
    """Of uniform's rollouts, how many this run takes to uniform's final success."""
    needed = rollouts_to(run, uniform["looks"][-1]["sampled"])
    return None if needed is None else needed / uniform["rollouts"]


def _shares(pool, arm):
    shares = [share_of_rollouts(*pair) for pair in paired(pool, arm)]
    return ", ".join("not reached" if share is None else f"{share:.2f}" for share in shares)


def arms(pool) -> str:
    """A row for each arm: one number for each seed."""
    rows = []
    for arm, name in NAMES.items():
        runs = of(pool, arm)
        if not runs:
            continue
        rows.append(
            [
                name,
                values(run["live_share"] for run in runs),
                "" if arm == "refill" else values(run["looks"][1]["sampled"] for run in runs),  # its steps cost more
                values(run["looks"][-1]["sampled"] for run in runs),
                "" if arm == "uniform" else _shares(pool, arm),
                values(run["looks"][-1]["pass@8"] for run in runs),
                ", ".join(f"{run['distinct']:,}" for run in runs),
            ]
        )
    quarter = of(pool, "uniform")[0]["looks"][1]["step"] if of(pool, "uniform") else 0
    head = f"prompts chosen by | live groups | success at step {quarter} | at the end | rollouts to uniform's end"
    return table(f"{head} | pass@8 | distinct prompts", rows)


def hard() -> str:
    return arms("hard")


def clean() -> str:
    return arms("clean")


def live() -> str:
    return arms("live")


def dirt() -> str:
    rows = []
    for pool in ("hard-wrong", "clean-wrong"):
        for run, uniform in paired(pool, "online"):
            found = {int(first): right for first, right in run["suspects"].items()}
            first = " / ".join(f"{right} of the first {number}" for number, right in sorted(found.items())[:3])
            rows.append(
                [
                    f"{pool}, seed {run['seed']}",
                    f"{8 * run['wrong']:,} ({8 * uniform['wrong']:,})",
                    f"{run['looks'][-1]['sampled']:.3f} ({uniform['looks'][-1]['sampled']:.3f})",
                    first,
                ]
            )
    return table(
        "pool | rollouts on wrong labels (uniform) | success at the end (uniform) | suspects that are wrong", rows
    )


def bars() -> str:
    """The goals that were set before, and whether they are met on every seed."""
    goals = [
        ("hard", 2.5, 1 / 3, "the hard pool"),
        ("clean", 1.2, 1 / 1.5, "all equations, after a warm-up"),
    ]
    rows = []
    for pool, factor, most, name in goals:
        pairs = paired(pool, "online")
        ratios = [run["live_share"] / uniform["live_share"] for run, uniform in pairs]
        shares = [share_of_rollouts(run, uniform) for run, uniform in pairs]
        ends = [run["looks"][-1]["sampled"] - uniform["looks"][-1]["sampled"] for run, uniform in pairs]
        met = [
            all(ratio >= factor for ratio in ratios),
            all(share is not None and share <= most for share in shares),
            all(end >= 0 for end in ends),
        ]
        texts = [
            f">= {factor} x: {values(ratios, 2)}",
            f"<= {most:.2f}: {', '.join('not reached' if share is None else f'{share:.2f}' for share in shares)}",
            f"not below: {', '.join(f'{100 * end:+.1f}' for end in ends)} points",
        ]
        rows.append(
            [name, *(f"{text} ({'met' if good else 'missed'})" for text, good in zip(texts, met, strict=True))]
        )
    return table("pool | live groups against uniform | rollouts to uniform's end | success at the end", rows)


def headroom_live() -> str:
    return ", ".join(f"{run['headroom']:.2f}" for run in of("live", "online"))


def end_live() -> str:
    return ", ".join(
        f"{run['looks'][-1]['sampled']:.3f} and {uniform['looks'][-1]['sampled']:.3f}"
        for run, uniform in paired("live", "online")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, default=[])
    parser.add_argument("--check", action="store_true", help="only whether the page is what the results say")
    arguments = parser.parse_args()
    if arguments.runs:
        collect(arguments.runs)
        RUNS[:] = json.loads(FILE.read_text())["runs"]
    publish({PAGE: fill((HERE / "online.md.in").read_text(encoding="utf-8"), globals())}, "benchmarks/online/page.py")


if __name__ == "__main__":
    main()
