"""
How long a ranking lasts: prompts scored again after some training, at the grid's learning rate and at a fifth of it.

    python benchmarks/gsm8k_equations/persistence.py [--dataset_path DIR] [--seeds 0 1]

For every seed of the grid, 800 prompts of the pool are scored from fresh rollouts by the policy that the pool was
scored with, and after 16 and 63 steps of training on the grid's 500 random prompts. Each is compared with the grid's
own scores of these prompts. What the policy at step 0 disagrees with itself is the noise of eight rollouts; what comes
on top of that is training. Seeds that the output holds already are left out.
"""

import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grid import CURVES_AT, RESULTS, SLOW, build_trainer, choose, conditions_of, scores, warm_up
from harness import DATASET, options, read, write
from policies import read_equations
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
    common = {"dataset_path": DATASET, "output": RESULTS / "persistence.json", "learning_rate": 1e-3}
    arguments = options(__doc__, output_dir=Path("runs/gsm8k_equations"), seeds=[0, 1, 2, 3, 4], **common)
    pool, _, source = read_equations(arguments.dataset_path)
    arguments.passes = None
    conditions = {**conditions_of(arguments, pool, [], source), "prompts": PROMPTS, "best": BEST}
    saved = read(arguments.output, {"conditions": None})
    rows = saved["rows"] if saved["conditions"] == conditions else []
    for seed in arguments.seeds:
        if not any(row["seed"] == seed for row in rows):
            rows = rows + rows_of(seed, pool, arguments)
            write(arguments.output, {"rows": rows, "conditions": conditions})


if __name__ == "__main__":
    main()
