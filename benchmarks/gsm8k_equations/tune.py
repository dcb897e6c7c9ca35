"""
Learning rate and number of passes, chosen on random prompts and on train rows alone, before any arm is looked at.

    python benchmarks/gsm8k_equations/tune.py [--dataset_path DIR] [--learning_rates 2e-4 5e-4 1e-3 2e-3]

The last 600 train rows are held out; the policy trains on 300 and then on 500 random prompts of the others, and is
looked at on the held-out rows after the warm-up and after 1, 2 and 4 passes. Test rows are not read.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from grid import CHUNK, ROOT, SAMPLES, Look, build_trainer, read_data, warm_up


HELD_OUT, SIZE, PASSES = 600, 500, (1, 2, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tune"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "evidence" / "tuning.json")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 2e-3])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, _, source = read_data(arguments)
    pool, held_out = rows.select(range(len(rows) - HELD_OUT)), rows.select(range(len(rows) - HELD_OUT, len(rows)))
    output_dir = arguments.output_dir
    for learning_rate in arguments.learning_rates:
        arguments.learning_rate = learning_rate
        file = output_dir / f"{learning_rate:.0e}.json"
        if file.is_file():
            continue
        arguments.output_dir = file.with_suffix("")
        steps = {math.ceil(passes * SIZE / CHUNK): passes for passes in PASSES}
        chosen = random.Random(arguments.seed).sample(range(len(pool)), SIZE)
        adapter, look = warm_up(arguments.seed, pool, arguments), Look(held_out, steps)
        build_trainer(adapter, pool.select(chosen), max(steps), arguments.seed, arguments, [look]).train()
        result = {steps[one["step"]]: round(sum(one["sampled"]) / HELD_OUT / SAMPLES, 4) for one in look.looks}
        file.write_text(json.dumps(result))
        print(f"learning rate {learning_rate:.0e}: {result}", flush=True)
    runs = {file.stem: json.loads(file.read_text()) for file in sorted(output_dir.glob("*.json"))}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"data": source, "held_out": HELD_OUT, "prompts": SIZE, "seed": arguments.seed}
    arguments.output.write_text(json.dumps({**settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
