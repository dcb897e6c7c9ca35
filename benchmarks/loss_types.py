"""
How far the ranking moves with the loss that the gradient is of: TRL's default `dapo`, which sums over tokens, beside
`grpo`, the mean over each completion of the paper's Eq. 7. On the demo's pool after its warm-up.

    python benchmarks/loss_types.py --dataset_path DIR

DIR holds GSM8K's train.jsonl and test.jsonl; without it generated chains stand in. Both losses score the same
rollouts; as a yardstick `grpo` also scores other rollouts of the same policy. Without a KL term every other loss of
TRL has the direction of one of the two.
"""

import harness
from projection import arguments_of, compared, warmed_up

from trl_learnalign import LearnAlignConfig, select_prompts
from trl_learnalign.host import generation


def main():
    arguments = arguments_of(__doc__, "loss_types")
    with warmed_up(arguments) as (trainer, pool, source):
        kept, generate = {}, generation.generate_groups

        def once(host, dataset, indices, seed, gradients):
            """Every group is rolled out once; the policy stays what it is."""
            key = seed, *indices
            if key not in kept:
                kept[key] = generate(host, dataset, indices, seed, gradients)
            return kept[key]

        generation.generate_groups = once

        def table(loss_type, score, seed=0):
            trainer.loss_type = loss_type
            config = LearnAlignConfig(
                num_prompts=128, score=score, projection_dim=None, selection_seed=seed, write_report=False
            )
            return select_prompts(trainer, config).scores.to_pandas()

        rows = []
        for score in ("learnalign", "alignment"):
            grpo, dapo, other = table("grpo", score), table("dapo", score), table("grpo", score, seed=1)
            assert grpo["success_rate"].equals(dapo["success_rate"])  # the same rollouts
            rows.append({"score": score, "loss": compared(grpo, dapo), "rollouts": compared(grpo, other)})
    results = {
        "data": source,
        "pool": len(pool),
        "completion_length": round(float(grpo["completion_length_mean"].mean()), 1),
        "rows": rows,
        "threads": arguments.threads,
    }
    harness.report(arguments.output, harness.conditions(**results))


if __name__ == "__main__":
    main()
