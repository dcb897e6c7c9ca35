"""
How long a ranking lasts: prompts scored again after some training, at the grid's learning rate and at a fifth of it.

    python benchmarks/gsm8k_equations/persistence.py [--dataset_path DIR] [--seeds 0 1]

For every seed of the grid, 800 prompts of the pool are scored from fresh rollouts by the policy that the pool was
scored with, and after 16 and 63 steps of training on the grid's 500 random prompts. Each is compared with the grid's
own scores of these prompts. What the policy at step 0 disagrees with itself is the noise of eight rollouts; what comes
on top of that is training. Seeds that the output holds already are left out.
"""

import argparse
import json
import os
import random
from pathlib import Path

import torch
from grid import CURVES_AT, RESULTS, SLOW, build_trainer, choose, conditions_of, read_data, scores, warm_up
from sensitivity import BEST, PROMPTS, agreement
from transformers import TrainerCallback

from trl_learnalign import LearnAlignConfig, select_prompts


STEPS = (16, 63)


class Keep(TrainerCallback):
    """The adapter after each of `STEPS`."""

    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in STEPS:
            model.save_pretrained(self.path / f"step-{state.global_step}")


def rescore(adapter, prompts, seed, arguments):
    trainer = build_trainer(adapter, prompts, 1, 1000 + seed, arguments)  # not the seed of the grid's own rollouts
    return select_prompts(trainer, LearnAlignConfig(num_prompts=BEST)).scores.to_pandas().set_index("index")


def rows_of(seed, pool, arguments) -> list[dict]:
    places = random.Random(seed).sample(range(len(pool)), PROMPTS)
    prompts, warm = pool.select(places), warm_up(seed, pool, arguments)
    base = (
        scores(seed, False, pool, arguments).scores.to_pandas().set_index("index").loc[places].reset_index(drop=True)
    )
    rows = [{"seed": seed, "rate": 0.0, "step": 0, **agreement(rescore(warm, prompts, seed, arguments), base)}]
    dataset = pool.select(choose("random", CURVES_AT, seed, pool, arguments))
    for rate in (1.0, SLOW):
        path = arguments.output_dir / f"seed-{seed}" / f"persistence-{rate}"
        if not all((path / f"step-{step}" / "adapter_model.safetensors").is_file() for step in STEPS):
            build_trainer(warm, dataset, max(STEPS), seed, arguments, [Keep(path)], rate=rate).train()
        for step in STEPS:
            found = agreement(rescore(path / f"step-{step}", prompts, seed, arguments), base)
            rows.append({"seed": seed, "rate": rate, "step": step, **found})
            print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k_equations"))
    parser.add_argument("--output", type=Path, default=RESULTS / "persistence.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    pool, _, source = read_data(arguments)
    arguments.passes = None
    conditions = {**conditions_of(arguments, pool, [], source), "prompts": PROMPTS, "best": BEST}
    saved = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"conditions": None}
    rows = saved["rows"] if saved["conditions"] == conditions else []
    for seed in arguments.seeds:
        if not any(row["seed"] == seed for row in rows):
            rows = rows + rows_of(seed, pool, arguments)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps({"rows": rows, "conditions": conditions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
