"""
What the runs of a real chat model came to.

    python benchmarks/chat/chat_results.py [--runs DIR ...] [--alone] [--unfinished] [--collect]

prints, for each pool, what each arm reached on the questions held out, with differences to random prompts (paired by
seed; 95 % intervals by Student's t from three pairs on), where its rollouts went, and what its steps were like, from
the finished runs of run.py in these folders, and those that are kept in benchmarks/results/chat.json, unless --alone
is given; with --unfinished from those that are under way, too, as far as they have come. With --collect finished runs
are added to that file.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import numpy as np


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from pages import points, table
from questions import GUESSED, KINDS, POOLS, SHARES


FILE = ROOT / "benchmarks" / "results" / "chat.json"
GROUP = 8
ARMS = {
    "random": "random prompts",
    "refill": "refill (DAPO)",
    "online": "online, learnability alone",
    "learnalign-online": "LearnAlign online",
    "learnalign-online-without-kinds": "LearnAlign online, kinds do not count",
    "online-in-proportion": "learnability alone, in proportion",
    "learnalign-online-on-top": "LearnAlign online, the best alone",
}


def read(folder: Path) -> dict:
    """Read a run of run.py: looks, and of each half of the steps the groups and the live groups of each kind."""
    looks = [json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    halves: dict = {"groups": [], "live": []}
    for half in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        kinds = np.array([kind for step in half for kind in step["kinds"]], int)
        live = np.array([0 < number < GROUP for step in half for number in step["successes"]], bool)
        halves["groups"].append(np.bincount(kinds, minlength=len(KINDS)).tolist())
        halves["live"].append(np.bincount(kinds[live], minlength=len(KINDS)).tolist())
    found = {"looks": looks, "steps": len(steps), "halves": halves}
    found["update_norm"] = round(fmean(step["update_norm"] for step in steps), 4)
    done = folder / "done.json"
    if done.is_file():
        conditions = json.loads(done.read_text())
        logged = conditions.pop("logged")
        found["grad_norm"] = round(fmean(value for value in logged["grad_norm"] if value is not None), 4)
        found["entropy"] = round(fmean(logged["entropy"][-10:]), 4)
        found["conditions"] = conditions
    return found


def load(folders: list[Path], unfinished=False, kept=True) -> dict:
    """Read the runs in these folders, and those that are `kept` and not there: by pool, arm and seed."""
    found: dict = {}
    for run in json.loads(FILE.read_text(encoding="utf-8"))["runs"] if kept and FILE.is_file() else []:
        found.setdefault(run["pool"], {}).setdefault(run["arm"], {})[run["seed"]] = run
    for folder in sorted(one for runs in folders for one in runs.glob("*/*-*")):
        steps = folder / "steps.jsonl"
        if steps.is_file() and steps.stat().st_size and folder.parent.name in POOLS:
            arm, seed = folder.name.rsplit("-", 1)
            run = {"pool": folder.parent.name, "arm": arm, "seed": int(seed)} | read(folder)
            if unfinished or "conditions" in run:
                found.setdefault(run["pool"], {}).setdefault(arm, {})[run["seed"]] = run
    return {
        pool: {arm: dict(sorted(found[pool][arm].items())) for arm in sorted(found[pool], key=_place)}
        for pool in POOLS
        if pool in found
    }


def _place(arm):
    return [*ARMS, arm].index(arm)


def collect(runs: dict) -> None:
    """Write the finished runs to the file of results."""
    finished = [
        run for arms in runs.values() for seeds in arms.values() for run in seeds.values() if "conditions" in run
    ]
    FILE.write_text(json.dumps({"runs": finished}, indent=1) + "\n", encoding="utf-8")


def means(run) -> list[float]:
    """Return the mean success on the questions held out at each look."""
    return [look["mean"] for look in run["looks"]]


def by_kind(run) -> dict[str, float]:
    """Return success on the questions held out of each kind, at the last look."""
    return {kind: rate for kind, rate in run["looks"][-1].items() if kind in KINDS}


def pairs(arms, arm, other="random") -> list[tuple[dict, dict]]:
    """Return the runs of an arm, each with that of another arm of the same seed that has come as far."""
    both = [(run, arms[other][seed]) for seed, run in arms.get(arm, {}).items() if seed in arms.get(other, {})]
    return [(run, second) for run, second in both if len(run["looks"]) == len(second["looks"])]


def gains(arms, arm, other="random", over_run=False) -> list[float]:
    """Return by how much an arm's success is above another's: at the last look, or the mean over all but the first."""
    value = (lambda run: fmean(means(run)[1:])) if over_run else (lambda run: means(run)[-1])
    return [value(run) - value(second) for run, second in pairs(arms, arm, other)]


def reached(arms, arm, other="random") -> list[float | None]:
    """Return the part of a run after which a look is not below the other's last, `None` for never."""
    found = []
    for run, second in pairs(arms, arm, other):
        steps = [look["step"] for look in run["looks"] if look["mean"] >= means(second)[-1]]
        found.append(steps[0] / run["steps"] if steps else None)
    return found


def on_guesses(run) -> float:
    """Return the share of the rollouts that went to questions that can only be guessed."""
    groups = np.sum(run["halves"]["groups"], axis=0)
    return float(groups[[KINDS.index(kind) for kind in GUESSED]].sum() / groups.sum())


def _name(arm):
    return ARMS.get(arm, arm)


def table_of_success(arms: dict) -> str:
    """Return success at each look, means over the seeds, and differences to random prompts."""
    steps = max((run["looks"] for runs in arms.values() for run in runs.values()), key=len)
    rows = []
    for arm, runs in arms.items():
        parts = [f"{fmean(part):.3f}" for part in zip(*map(means, runs.values()), strict=False)]
        parts += [""] * (len(steps) - len(parts))
        known = arm != "random" and pairs(arms, arm)
        ends = [points(gains(arms, arm), ".3f"), points(gains(arms, arm, over_run=True), ".3f")] if known else ["", ""]
        rows.append([_name(arm), ", ".join(map(str, runs)), *parts, *ends])
    head = ["prompts chosen by", "seeds", *(f"step {look['step']}" for look in steps)]
    return table([*head, "over random at the end", "mean over the run"], rows)


def table_of_kinds(arms: dict) -> str:
    """Return success by kind at the last look, means over the seeds."""
    names = [*by_kind(next(iter(next(iter(arms.values())).values())))]
    rows = [
        [_name(arm), *(f"{fmean(by_kind(run)[kind] for run in runs.values()):.2f}" for kind in names)]
        for arm, runs in arms.items()
    ]
    return table(["prompts chosen by", *names], rows)


def table_of_shares(arms: dict, pool: str) -> str:
    """Return the share of each kind of the rollouts in the second half of the runs, and how many groups were live."""
    kinds, total = [KINDS.index(kind) for kind in POOLS[pool]], sum(POOLS[pool].values())
    rows = [["the pool", *(f"{number / total:.2f}" for number in POOLS[pool].values())]]
    for arm, runs in arms.items():
        groups, live = (
            np.sum([run["halves"][name][1] for run in runs.values()], axis=0) for name in ("groups", "live")
        )
        cells = [f"{groups[k] / groups.sum():.2f} ({live[k] / groups[k]:.2f})" if groups[k] else "0.00" for k in kinds]
        rows.append([_name(arm), *cells])
    return table(["prompts chosen by", *POOLS[pool]], rows)


def table_of_steps(arms: dict) -> str:
    """Return live share, share of guessed questions, norms, entropy and KL divergence, means over the seeds."""

    def mean(runs, name):
        values = [run[name] for run in runs if name in run]
        return f"{fmean(values):.2f}" if values else ""

    rows = []
    for arm, by_seed in arms.items():
        runs = [*by_seed.values()]
        groups, live = (np.sum([run["halves"][name] for run in runs], axis=0) for name in ("groups", "live"))
        learnt = [k for k, kind in enumerate(KINDS) if kind in SHARES]
        rows.append(
            [
                _name(arm),
                *(f"{live[half].sum() / groups[half].sum():.2f}" for half in (0, 1)),
                f"{fmean(map(on_guesses, runs)):.2f}",
                f"{live[:, learnt].sum() / groups.sum():.2f}",
                *(mean(runs, name) for name in ("update_norm", "grad_norm", "entropy")),
                f"{fmean(run['looks'][-1]['kl'] for run in runs):.2f}",
            ]
        )
    return table(
        "prompts chosen by | live groups, first half | second half | rollouts on guesses | live and no guess | norm "
        "of an update | of a gradient | entropy at the end, nats a token | KL to the start, nats a token",
        rows,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="*", default=[Path("runs/chat")])
    parser.add_argument("--unfinished", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args()
    found = load(options.runs, options.unfinished, kept=not options.alone)
    for pool, arms in found.items():
        tables = {
            "success on questions held out": table_of_success(arms),
            "success by kind at the last look": table_of_kinds(arms),
            "share of the rollouts in the second half (live)": table_of_shares(arms, pool),
            "steps": table_of_steps(arms),
        }
        print(f"## {pool}\n")
        for name, text in tables.items():
            print(f"{name}\n\n{text}\n")
    if options.collect:
        collect(found)


if __name__ == "__main__":
    main()
