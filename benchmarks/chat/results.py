"""
Tables of the runs of a real chat model.

    python benchmarks/chat/results.py --runs runs/chat

prints, for each pool, what each arm reached on the questions held out, with differences to random prompts (paired by
seed; 95 % intervals by t from three pairs on), where its rollouts went, and what its steps were like. With --output it
writes all numbers to a JSON file. Runs that are still under way are shown as far as they have come.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from questions import GUESSED, KINDS, POOLS


GROUP = 8
# Quantiles of t, 97.5 %, by degrees of freedom
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def read(folder: Path) -> dict:
    """Read a run: its looks as a table by step, its steps as arrays."""
    looks = pd.DataFrame([json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()])
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    done = folder / "done.json"
    logged = json.loads(done.read_text())["logged"] if done.is_file() else {}
    kinds = [np.array(step["kinds"]) for step in steps]
    live = [(np.array(step["successes"]) % GROUP > 0) for step in steps]
    return {
        "looks": looks.set_index("step"),
        "kinds": kinds,
        "live": live,
        "update_norm": [step["update_norm"] for step in steps],
        "entropy": [value for value in logged.get("entropy", []) if value is not None],
        "grad_norm": [value for value in logged.get("grad_norm", []) if value is not None],
        "rollouts": sum(map(len, kinds)) * GROUP,
    }


def collect(runs: Path) -> dict:
    """Read all runs, by pool, arm and seed."""
    found: dict = {}
    for folder in sorted(runs.glob("*/*-*")):
        if (folder / "looks.jsonl").is_file() and folder.parent.name in POOLS:
            arm, seed = folder.name.rsplit("-", 1)
            found.setdefault(folder.parent.name, {}).setdefault(arm, {})[int(seed)] = read(folder)
    return found


def interval(values: list[float]) -> str:
    """Write a mean of differences with its 95 % interval, or the differences themselves where they are few."""
    if len(values) < 3:
        return ", ".join(f"{value:+.3f}" for value in values)
    half = _T[len(values) - 1] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):+.3f} [{np.mean(values) - half:+.3f}, {np.mean(values) + half:+.3f}]"


def table_of_success(arms: dict) -> pd.DataFrame:
    """Return success on the questions held out at each look, by arm: means over the seeds."""
    rows = {
        arm: pd.concat([run["looks"]["mean"] for run in runs.values()], axis=1).mean(axis=1)
        for arm, runs in arms.items()
    }
    return pd.DataFrame(rows).T.rename_axis(columns="step").round(3)


def table_of_kinds(arms: dict) -> pd.DataFrame:
    """Return success by kind at the last look, by arm."""
    last = {
        arm: pd.concat([run["looks"].iloc[-1].drop(["kl", "mean"]) for run in runs.values()], axis=1).mean(axis=1)
        for arm, runs in arms.items()
    }
    return pd.DataFrame(last).T.astype(float).round(2)


def table_of_shares(arms: dict, pool: str) -> pd.DataFrame:
    """Return the share of each kind of the rollouts, in the second half of the runs, and that of the pool."""
    total = sum(POOLS[pool].values())
    rows = {"pool": {kind: number / total for kind, number in POOLS[pool].items()}}
    for arm, runs in arms.items():
        kinds = np.concatenate([np.concatenate(run["kinds"][len(run["kinds"]) // 2 :]) for run in runs.values()])
        rows[arm] = {kind: float((kinds == KINDS.index(kind)).mean()) for kind in POOLS[pool]}
    return pd.DataFrame(rows).T.round(3)


def table_of_steps(arms: dict) -> pd.DataFrame:
    """Return live share, share of guessed questions, norms, entropy and KL divergence, by arm."""
    rows = {}
    for arm, runs in arms.items():
        halves = [[part[: len(part) // 2], part[len(part) // 2 :]] for run in runs.values() for part in [run["live"]]]
        kinds = np.concatenate([np.concatenate(run["kinds"]) for run in runs.values()])
        live = np.concatenate([np.concatenate(run["live"]) for run in runs.values()])
        guessed = np.isin(kinds, [KINDS.index(kind) for kind in GUESSED])
        rows[arm] = {
            "live, first half": np.mean([np.concatenate(first).mean() for first, _ in halves if first]),
            "second half": np.mean([np.concatenate(second).mean() for _, second in halves if second]),
            "guessed": guessed.mean(),
            "live and not guessed": (live & ~guessed).mean(),
            "update norm": np.mean([np.mean(run["update_norm"]) for run in runs.values()]),
            "gradient norm": np.mean(
                [np.mean(run["grad_norm"]) for run in runs.values() if run["grad_norm"]] or [np.nan]
            ),
            "entropy, end": np.mean(
                [np.mean(run["entropy"][-10:]) for run in runs.values() if run["entropy"]] or [np.nan]
            ),
            "KL": np.mean([run["looks"]["kl"].iloc[-1] for run in runs.values()]),
        }
    return pd.DataFrame(rows).T.round(3)


def differences(arms: dict, to: str) -> pd.Series:
    """Return the differences of each arm's success at the end, and of its mean over the looks, to those of another."""
    rows = {}
    for arm, runs in arms.items():
        pairs = [
            (run["looks"]["mean"], arms[to][seed]["looks"]["mean"]) for seed, run in runs.items() if seed in arms[to]
        ]
        pairs = [(own, other) for own, other in pairs if len(own) == len(other)]  # finished alike
        if arm != to and pairs:
            rows[arm] = {
                "at the end": interval([own.iloc[-1] - other.iloc[-1] for own, other in pairs]),
                "over the run": interval([own.iloc[1:].mean() - other.iloc[1:].mean() for own, other in pairs]),
            }
    return pd.DataFrame(rows).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/chat"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    pd.set_option("display.width", 200, "display.max_columns", 30)
    numbers = {}
    for pool, arms in collect(options.runs).items():
        tables = {
            "success on questions held out, by step": table_of_success(arms),
            "success by kind at the last look": table_of_kinds(arms),
            "share of the rollouts in the second half": table_of_shares(arms, pool),
            "steps": table_of_steps(arms),
        }
        if "random" in arms:
            tables["difference to random prompts"] = differences(arms, "random")
        seeds = ", ".join(f"{arm} {sorted(runs)}" for arm, runs in arms.items())
        print(f"\n## {pool}\n\nSeeds: {seeds}")
        for name, table in tables.items():
            print(f"\n{name}\n{table.to_string()}")
        numbers[pool] = {name: json.loads(table.to_json(orient="index")) for name, table in tables.items()}
    if options.output is not None:
        options.output.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
