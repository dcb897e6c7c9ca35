"""
How far LESS with Adam's direction and with several checkpoints ranks as with plain gradients of the policy as it is.

    python benchmarks/less.py --dataset_path DIR

DIR is as for benchmarks/projection.py. The demo's policy is trained for six steps, with checkpoints after three and
six; every sixth row of the pool is the target. All rows but `other rollouts` are of the same rollouts.
"""

from dataclasses import replace
from pathlib import Path

import harness
from projection import arguments_of, spearman, warmed_up

from trl_learnalign import LearnAlignConfig, select_prompts


def main():
    arguments = arguments_of(__doc__, "less")
    arguments.pool, arguments.num_prompts = 150, 50
    changes = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "max_steps": 6}
    with warmed_up(arguments, **changes) as (trainer, pool, source):
        target = pool.select(range(0, len(pool), 6))
        plain = LearnAlignConfig(num_prompts=50, score="target_alignment", target_dataset=target, write_report=False)
        saved = [str(Path(trainer.args.output_dir) / f"checkpoint-{step}") for step in (3, 6)]
        cases = {
            "plain": {},
            "adam": {"gradient_direction": "adam"},
            "two checkpoints": {"target_checkpoints": saved},
            "adam, two checkpoints": {"gradient_direction": "adam", "target_checkpoints": saved},
            "other rollouts": {"selection_seed": 1},
        }
        chosen = {name: select_prompts(trainer, replace(plain, **settings)) for name, settings in cases.items()}
    rows, first = [], chosen["plain"].scores.to_pandas()
    for name, selection in chosen.items():
        ours = selection.scores.to_pandas()
        both = (ours["learnability"] > 0) & (first["learnability"] > 0)
        alignments = ours["alignment"][both]
        row = {
            "case": name,
            "prompts": int(both.sum()),
            "spearman": spearman(alignments, first["alignment"][both]),
            "same_chosen": len(set(selection.indices) & set(chosen["plain"].indices)) / len(selection.indices),
            "mean_alignment": float(alignments.mean()),
            "seconds": selection.provenance["seconds"],
        }
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    results = {"data": source, "pool": len(pool), "target": len(target), "rows": rows}
    harness.report(arguments.output, harness.conditions(**results))


if __name__ == "__main__":
    main()
