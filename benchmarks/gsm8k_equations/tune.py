"""
Learning rate and number of passes, chosen on random prompts and on train rows alone, before any arm is looked at.

    python benchmarks/gsm8k_equations/tune.py [--dataset_path DIR] [--learning_rates 2e-4 5e-4 1e-3 2e-3]

The last 600 train rows are held out; the policy trains on 300 and then on 500 random prompts of the others, and is
looked at on the held-out rows after the warm-up and after 1, 2 and 4 passes. Test rows are not read.
"""

import math
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grid import CHUNK, RESULTS, SAMPLES, Look, build_trainer, warm_up
from harness import DATASET, cell, options, read, write
from policies import read_equations


HELD_OUT, SIZE, PASSES = 600, 500, (1, 2, 4)


def run(arguments, pool, held_out) -> dict:
    """Success after each number of passes."""
    steps = {math.ceil(passes * SIZE / CHUNK): passes for passes in PASSES}
    chosen = random.Random(arguments.seed).sample(range(len(pool)), SIZE)
    adapter, look = warm_up(arguments.seed, pool, arguments), Look(held_out, steps)
    build_trainer(adapter, pool.select(chosen), max(steps), arguments.seed, arguments, [look]).train()
    return {str(steps[one["step"]]): round(sum(one["sampled"]) / HELD_OUT / SAMPLES, 4) for one in look.looks}


def main():
    files = {"dataset_path": DATASET, "output_dir": Path("runs/tune"), "output": RESULTS / "tuning.json"}
    arguments = options(__doc__, **files, seed=100, learning_rates=[2e-4, 5e-4, 1e-3, 2e-3])
    rows, _, source = read_equations(arguments.dataset_path)
    pool, held_out = rows.select(range(len(rows) - HELD_OUT)), rows.select(range(len(rows) - HELD_OUT, len(rows)))
    settings = {"data": source, "held_out": HELD_OUT, "prompts": SIZE, "seed": arguments.seed}
    folder = arguments.output_dir
    for rate in arguments.learning_rates:
        file = folder / f"{rate:.0e}.json"
        vars(arguments).update(learning_rate=rate, output_dir=file.with_suffix(""))
        cell(file, settings, run, arguments, pool, held_out)
    runs = {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
    for found in runs.values():
        print(found, flush=True)
        del found["conditions"]
    write(arguments.output, {**settings, "runs": runs})


if __name__ == "__main__":
    main()
