"""
Gathers finished runs into benchmarks/results/evidence/*.parquet, which are committed.

    python benchmarks/gsm8k_equations/collect.py [--output_dir runs/gsm8k_equations] [--dataset_path DIR]

Runs that the tables hold already stay if they were made under the same conditions, so that the grid can grow over
several machines and evenings.

- `looks.parquet`: a row per look at a policy: `seed, arm, size, steps` of the run, the `step` of the look, `seconds`
  of training until then, `samples` per test row, `sampled` (list, how many of them succeed, a number per test row),
  `greedy` (list, or null).
- `scores.parquet`: a row per seed, `cold` and pool prompt: what the selection's scores.parquet holds.
- `movement.parquet`: a row per run and prompt: successes of 8 before and after training, and whether it was trained
  on.
- `redundancy.json`, with a dataset: how alike the 500 best of each score are, mean over seeds.
- `runs.json`: the conditions, the finished cells, and what warm-ups and selections took.
"""

import re
import sys
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from grid import MOVEMENT, RESULTS, without_repeated_steps
from harness import DATASET, options, read, write
from policies import read_equations

from trl_learnalign import Selection


COLUMNS = ["index", "success_rate", "alignment", "score", "completion_length_mean", "gradient_norm"]
KEYS = {  # of each table: what a run of it is known by, and how it is sorted
    "looks": (["seed", "arm", "size"], ["size", "arm", "seed", "step"]),
    "movement": (["seed", "arm", "size"], ["arm", "seed", "index"]),
    "scores": (["seed", "cold"], ["cold", "seed", "index"]),
}


def found_in(output_dir: Path):
    looks, movement, cells, conditions, scores, costs = [], [], [], [], [], []
    for file in sorted(output_dir.glob("seed-*/*-*.json")):
        run = read(file)
        keys = {name: run[name] for name in ("seed", "arm", "size")}
        cells.append([run["size"], run["seed"], run["arm"]])
        conditions.append(run["conditions"])
        for look in run["looks"]:
            samples = 8 if "greedy" in look else 2
            looks.append(keys | {"steps": run["steps"], "samples": samples, "greedy": None} | look)
        if "movement" in run:
            moved = pd.DataFrame({name: run["movement"][name] for name in ("index", "before", "after")})
            moved["chosen"] = [place < MOVEMENT["size"] for place in range(len(moved))]
            movement.append(moved.assign(**keys))
    if any(one != conditions[0] for one in conditions):
        raise SystemExit(f"The runs in {output_dir} were made under different conditions. Move the older ones away.")
    for path in sorted(file.parent for file in output_dir.glob("seed-*/*/selection.json")):
        if not path.name.endswith("under way"):
            seed, cold = int(path.parent.name.removeprefix("seed-")), path.name == "cold"
            selection = Selection.load(path)
            table = selection.scores.to_pandas()[COLUMNS]
            scores.append(table.assign(seed=seed, cold=cold).astype(dict.fromkeys(COLUMNS[1:], "float32")))
            warm_up = 0.0 if cold else read(path.parent / "warm" / "done.json")["seconds"]
            cost = {"seed": seed, "cold": cold, "warm_up": warm_up, **selection.provenance["seconds"]}
            costs.append(cost | {"chosen_learnable": selection.num_learnable()})
    frames = {
        name: pd.concat(parts or [pd.DataFrame()]) for name, parts in (("movement", movement), ("scores", scores))
    }
    return conditions[0] if conditions else None, cells, costs, {"looks": pd.DataFrame(looks), **frames}


def merge(conditions, cells, costs, frames):
    """With what the results hold already, where the conditions are the same."""
    saved = read(RESULTS / "runs.json")
    if saved is None or saved["conditions"] != conditions:
        return cells, costs, frames
    known = {(cost["seed"], cost["cold"]) for cost in costs}
    costs = costs + [cost for cost in saved["costs"] if (cost["seed"], cost["cold"]) not in known]
    for name, (keys, _) in KEYS.items():
        file = RESULTS / f"{name}.parquet"
        if file.is_file():
            new, old = frames[name], pd.read_parquet(file)
            if len(new):
                known = set(map(tuple, new[keys].drop_duplicates().itertuples(index=False)))
                old = old[[tuple(row) not in known for row in old[keys].itertuples(index=False)]]
            frames[name] = pd.concat([new, old])
    return cells + [cell for cell in saved["cells"] if cell not in cells], costs, frames


def redundancy(scores, pool, best=500) -> list[dict]:
    """
    Of the best by each score: steps a prompt, share of distinct steps, of shared last steps, and distinct numbers.
    """
    prompts = [prompt.removesuffix("=").split(";") for prompt in pool["prompt"]]
    table = scores[~scores.cold & (scores.success_rate > 0) & (scores.success_rate < 1)]
    table = table.sample(frac=1, random_state=0)
    table = table.assign(
        learnability=table.success_rate * (1 - table.success_rate),
        inner=table.gradient_norm * table.alignment,
        any=range(len(table)),
    )
    rows = []
    for name in ("any", "learnability", "inner", "alignment", "score", "distinct"):
        found, column = [], "score" if name == "distinct" else name
        for _, group in table.groupby("seed"):
            ranked = group.sort_values(column, ascending=False, kind="stable")["index"]
            chosen = without_repeated_steps(ranked, best, pool) if name == "distinct" else ranked.head(best)
            steps = [step for index in chosen for step in prompts[index]]
            last = Counter(prompts[index][-1] for index in chosen)
            numbers = {"steps": len(steps) / best, "distinct_steps": len(set(steps)) / len(steps)}
            numbers["shared_last_step"] = sum(count for count in last.values() if count > 1) / best
            numbers["distinct_numbers"] = len(set(re.findall(r"\d+\.?\d*", " ".join(steps))))
            found.append(numbers)
        means = pd.DataFrame(found).mean()
        rows.append({"chosen_by": name, **{key: round(float(value), 3) for key, value in means.items()}})
    return rows


def main():
    arguments = options(__doc__, output_dir=Path("runs/gsm8k_equations"), dataset_path=DATASET)
    conditions, cells, costs, frames = found_in(arguments.output_dir)
    if conditions is None:
        raise SystemExit(f"No finished run in {arguments.output_dir}.")
    cells, costs, frames = merge(conditions, cells, costs, frames)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        if len(frame):
            frame = frame.sort_values(KEYS[name][1], kind="stable").reset_index(drop=True)
            for column in set(frame.columns) & {"before", "after", "samples"}:
                frame[column] = frame[column].astype("int8")
            frame.to_parquet(RESULTS / f"{name}.parquet", compression="zstd", index=False)
    if arguments.dataset_path is not None and len(frames["scores"]):
        rows = redundancy(frames["scores"], read_equations(arguments.dataset_path)[0])
        write(RESULTS / "redundancy.json", rows)
    costs.sort(key=lambda one: (one["cold"], one["seed"]))
    write(RESULTS / "runs.json", {"conditions": conditions, "cells": sorted(cells), "costs": costs})
    print(f"{len(cells)} runs in {RESULTS}")


if __name__ == "__main__":
    main()
