"""
How far a selection depends on num_rollouts, projection_dim, the warm-up and chance: 800 prompts scored in several
ways.

    python benchmarks/gsm8k_equations/sensitivity.py [--dataset_path DIR]

Every way is compared with the defaults (8 rollouts, 300 warm-up prompts, d = 32,768, the grid's first seed): rank
correlations over the prompts that are learnable in both, and the Jaccard index of the best 200. Success rates from 32
other rollouts stand for the true ones. Trains nothing but the warm-ups.
"""

import math
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grid import CHUNK, RESULTS, adapter_after, build_trainer, conditions_of
from harness import DATASET, options, write
from policies import read_equations
from projection import spearman

from trl_learnalign import LearnAlignConfig, select_prompts


PROMPTS, BEST, TRUE_ROLLOUTS = 800, 200, 32
BASE = {"num_rollouts": 8, "projection_dim": 32768, "warmup": 300, "seed": 0}
WAYS = {
    "another seed": {"seed": 1},
    "4 rollouts": {"num_rollouts": 4},
    "16 rollouts": {"num_rollouts": 16},
    "d = 1,024": {"projection_dim": 1024},
    "d = 8,192": {"projection_dim": 8192},
    "exact gradients": {"projection_dim": None},
    "no warm-up": {"warmup": 0},
    "100 warm-up prompts": {"warmup": 100},
    "1,000 warm-up prompts": {"warmup": 1000},
}


def table_of(way, pool, arguments, score="learnalign"):
    """The scores of `PROMPTS` prompts of the pool, as the grid makes them."""
    way = BASE | way
    path, steps = arguments.output_dir / f"warm-up-{way['warmup']}", math.ceil(way["warmup"] / CHUNK)
    adapter = adapter_after(path, steps, 0, pool, arguments) if steps else None
    prompts = pool.select(random.Random(0).sample(range(len(pool)), PROMPTS))
    trainer = build_trainer(adapter, prompts, 1, way["seed"], arguments)
    config = LearnAlignConfig(
        num_prompts=BEST, num_rollouts=way["num_rollouts"], projection_dim=way["projection_dim"], score=score
    )
    return select_prompts(trainer, config).scores.to_pandas().set_index("index")


def chosen(rows) -> set[int]:
    return set(rows[rows["learnability"] > 0].sort_values("score", ascending=False).index[:BEST])


def agreement(table, base) -> dict[str, float]:
    """Compare two tables of the same prompts."""
    ours, theirs = chosen(table), chosen(base)
    both = (table["learnability"] > 0) & (base["learnability"] > 0)
    result = {
        f"spearman_{column}": spearman(table.loc[both, column], base.loc[both, column])
        for column in ("score", "alignment")
    }
    result["spearman_learnability"] = spearman(table["learnability"], base["learnability"])
    result["jaccard"] = len(ours & theirs) / len(ours | theirs)
    result["learnable"] = (table["learnability"] > 0).mean()
    # Chosen for an alignment that is high by chance? The best of `base`, as they were measured and as `table` sees
    # them
    kept = [index for index in sorted(theirs) if both[index]]
    result["alignment_of_best"] = base.loc[kept, "alignment"].mean()
    result["alignment_of_best_seen_again"] = table.loc[kept, "alignment"].mean()
    result["alignment_of_all"] = table.loc[table["learnability"] > 0, "alignment"].mean()
    return {name: round(float(value), 4) for name, value in result.items()}


def compare(table, base, truth) -> dict[str, float]:
    # Chosen for a V that is high by chance? `truth` comes from other rollouts of the default policy
    ours = sorted(chosen(table))
    seen = {"chosen_learnability": table, "chosen_true_learnability": truth}
    return agreement(table, base) | {
        name: round(float(rows.loc[ours, "learnability"].mean()), 4) for name, rows in seen.items()
    }


def main():
    common = {"dataset_path": DATASET, "output": RESULTS / "sensitivity.json", "learning_rate": 1e-3}
    arguments = options(__doc__, output_dir=Path("runs/sensitivity"), **common)
    pool, _, source = read_equations(arguments.dataset_path)
    truth = table_of({"num_rollouts": TRUE_ROLLOUTS, "seed": 2}, pool, arguments, score="learnability")
    base = table_of({}, pool, arguments)
    rows = [{"way": "the defaults", **compare(base, base, truth)}]
    for name, way in WAYS.items():
        rows.append({"way": name, **compare(table_of(way, pool, arguments), base, truth)})
        print(rows[-1], flush=True)
    pool_truth = round(float(truth["learnability"].mean()), 4)
    arguments.passes = None
    result = {
        "prompts": PROMPTS,
        "best": BEST,
        "true_rollouts": TRUE_ROLLOUTS,
        "pool_true_learnability": pool_truth,
        "spearman_learnability_with_true": round(spearman(base["learnability"], truth["learnability"]), 4),
        "rows": rows,
        "conditions": conditions_of(arguments, pool, [], source),
    }
    write(arguments.output, result)


if __name__ == "__main__":
    main()
