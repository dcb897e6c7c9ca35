"""
A thousand prompts of a million: columns, a forward, rollouts. Survivors, seconds and memory of each stage.

    python benchmarks/funnel.py [--prompts 5000] [--candidate_score column:quality confidence]

The prompts are generated chains with a made-up column `quality`, read from a file as those of a large dataset are; the
policy is the tiny one. Each score of `--candidate_score` leaves a tenth of its prompts, and learnability, by a race,
chooses a tenth of the last. Memory is the most that the process had resident, above what it had before the selection.
"""

import random
import tempfile
import time
import warnings
from pathlib import Path

import harness
from datasets import Dataset
from equations import equations_reward, generate_chains
from policies import arguments_of, load_policy, trainer_of

from trl_learnalign import LearnAlignConfig, Selection, select_prompts


BLOCK = 10_000  # prompts that are generated at once


def rows_of(num):
    draws = random.Random(0)
    for start in range(0, num, BLOCK):
        for row in generate_chains(min(BLOCK, num - start), seed=1000 + start):
            yield row | {"quality": draws.random()}


def main():
    arguments = harness.options(
        __doc__,
        {"rollouts": ("all", "racing")},
        prompts=1_000_000,
        candidate_score=["column:quality", "confidence"],
        rollouts="racing",
        directory=Path(tempfile.gettempdir()),
        output="funnel",
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    sizes = [arguments.prompts // 10 ** (stage + 1) for stage in range(len(arguments.candidate_score))]
    config = LearnAlignConfig(
        num_prompts=max(sizes[-1] // 10, 1),
        num_rollouts=8,
        score="learnability",
        rollouts=arguments.rollouts,
        candidate_score=arguments.candidate_score,
        candidate_prompts=sizes,
        answer_column="answer",
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        dataset = Dataset.from_generator(rows_of, gen_kwargs={"num": arguments.prompts}, cache_dir=scratch)
        batch = {"per_device_train_batch_size": 256, "max_completion_length": 56}
        args = arguments_of(Path(scratch) / "run", seed=0, **batch)
        trainer = trainer_of(load_policy(), equations_reward, args, dataset)
        before, started = harness.most_memory(anew=True), time.perf_counter()  # what made the prompts does not count
        selection = select_prompts(trainer, config)
        seconds, most = time.perf_counter() - started, harness.most_memory()
        step = Path(scratch) / "run" / "learnalign" / "step-000000"
        assert Selection.load(step).indices == selection.indices
        written = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    provenance = selection.provenance
    values = {
        "prompts": len(dataset),
        "chosen": len(selection.indices),
        "candidates": provenance["candidates"],
        "race": provenance.get("race"),
        "seconds_of": provenance["seconds"],
        "seconds": seconds,
        "resident_before": before,
        "resident_more": most - before,
        "bytes_written": written,
        "mean_success": selection.mean_success_rates(),
    }
    harness.report(arguments.output, harness.conditions(**values))


if __name__ == "__main__":
    main()
