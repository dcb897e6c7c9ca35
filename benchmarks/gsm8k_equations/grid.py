"""
Does the selection help, and against what? Every arm, number of prompts and seed on the equations of GSM8K.

    python benchmarks/gsm8k_equations/grid.py [--dataset_path DIR] [--seeds 0 1] [--arms random learnalign] [--sizes
    500]

DIR holds GSM8K's train.jsonl and test.jsonl: all train rows are the pool, all test rows the test. Without it generated
chains stand in, as many. For every seed the policy
is warmed up on 300 random prompts, and the whole pool is scored once after that and once without ("cold"); all arms
choose from these scores. Every arm then trains for the same number of steps on its N prompts with stock GRPOTrainer,
from the warmed-up policy, or, the cold arms, from the first one; "full" trains on as many prompts of the whole pool,
none twice; "staged" chooses half of its prompts, trains on them, and chooses the other half with the policy that this
has made; "learnalign distinct" leaves out prompts that share a step with a better one; the "slow" arms train on the
same prompts from the same policy at a fifth of the learning rate, with 500 prompts only.

A finished run is a file in the output directory. A later call, or another one beside it, leaves out the runs that are
there, and those that benchmarks/results/evidence holds with the same conditions. A run that is under way holds a lock.
"""

import math
import os
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import torch
from equations import equations_reward
from harness import DATASET, claimed, options, versions
from measures import COMPARED, RESULTS, SLOW_ARMS
from peft import PeftModel
from policies import POLICY, Looking, load_policy, read_equations, tiny_trainer, trained
from policies import successes as rewards_of

from trl_learnalign import LearnAlignConfig, LearnAlignSampler, Selection, select_prompts
from trl_learnalign.scores.maths import ranking


WARMUP, CHUNK, SAMPLES, GLANCES = 300, 16, 8, 2
SLOW = 0.2  # of the learning rate
WARMUP_STEPS = math.ceil(WARMUP / CHUNK)
ARMS = ("none", "warm-up", *COMPARED, "random cold", "learnalign cold", "full", "staged", "learnalign distinct")
ARMS += tuple(f"{arm} slow" for arm in SLOW_ARMS)
SIZES = (100, 500, 1000, 2000)
CURVES_AT = 500  # the size whose runs are looked at more often
MOVEMENT = {"size": 500, "arms": ("random", "learnalign"), "seeds": (0, 1), "others": 1000}


def build_trainer(adapter, dataset, steps, seed, arguments, callbacks=(), sampler=None, rate=1.0):
    # Of its own, since an output directory that a run of ours is using is closed to others
    folder = arguments.output_dir / f"trainer-{os.getpid()}"
    rate *= arguments.learning_rate
    return tiny_trainer(
        POLICY, adapter, equations_reward, folder, dataset, rate, steps, seed, callbacks, sampler=sampler
    )


def successes(model, rows, samples=SAMPLES, greedy=True) -> dict[str, list[int]]:
    """Count, for every row, the successes among `samples` completions at temperature 1, and that of the greedy one."""
    tokenizer = load_policy()[1]
    result = {"sampled": rewards_of(model, tokenizer, rows, samples)[0].sum(1).astype(int).tolist()}
    if greedy:
        result["greedy"] = rewards_of(model, tokenizer, rows, 0)[0][:, 0].astype(int).tolist()
    return result


class Look(Looking):
    """
    Measures the policy on `rows`: in full after the steps `full`, with two samples a row after the steps `glances`.
    """

    def __init__(self, rows, full, glances=()):
        super().__init__()
        self.rows, self.full, self.glances = rows, set(full), set(glances) - set(full)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.full | self.glances:
            full = state.global_step in self.full
            self.look(successes, model, self.rows, SAMPLES if full else GLANCES, full, step=state.global_step)


def warm_up(seed, pool, arguments) -> Path:
    """The adapter after the warm-up."""
    return adapter_after(arguments.output_dir / f"seed-{seed}" / "warm", WARMUP_STEPS, seed, pool, arguments)


def adapter_after(path, steps, seed, pool, arguments) -> Path:
    """The adapter after so many steps on random prompts, in the folder `path`."""
    return trained(path, lambda: build_trainer(None, pool, steps, seed, arguments))


def scores(seed, cold, pool, arguments) -> Selection:
    """Score the whole pool with the policy after the warm-up or before it."""
    path = arguments.output_dir / f"seed-{seed}" / ("cold" if cold else "scores")
    adapter = None if cold else warm_up(seed, pool, arguments)
    with claimed(path.with_name(f"{path.name}.lock"), wait=True):
        if (path / "selection.json").is_file():
            return Selection.load(path)
        trainer = build_trainer(adapter, pool, 1, seed, arguments)
        trainer.args.output_dir = str(path.with_name(f"{path.name} under way"))
        selection = select_prompts(trainer, LearnAlignConfig(num_prompts=min(max(SIZES), len(pool))))
        selection.save(path)
        print(f"seed {seed}{', cold' if cold else ''}: {selection.summary()}", flush=True)
        return selection


def choose(arm, size, seed, pool, arguments) -> list[int]:
    arm = arm.removesuffix(" slow")
    if arm.startswith("random"):
        return random.Random(seed).sample(range(len(pool)), size)
    table = scores(seed, arm.endswith("cold"), pool, arguments).scores.to_pandas()
    table = table[table["learnability"] > 0]
    if arm == "filter":
        return random.Random(seed).sample(table["index"].tolist(), size)
    column = {"learnability": "learnability", "alignment": "alignment"}.get(arm, "score")
    values, learnabilities = (torch.tensor(table[name].to_numpy()) for name in (column, "learnability"))
    ranked = table["index"].iloc[ranking(values, learnabilities, seed)]
    if arm == "learnalign distinct":
        return without_repeated_steps(ranked, size, pool)
    return ranked.head(size).tolist()


def without_repeated_steps(ranked, size, pool) -> list[int]:
    """Down the ranking, leaving out every prompt that has a step in common with one already chosen."""
    chosen, seen = [], set()
    for index in ranked:
        steps = set(pool[int(index)]["prompt"].removesuffix("=").split(";"))
        if not steps & seen and len(chosen) < size:
            chosen.append(int(index))
            seen |= steps
    return chosen


def untrained(arm, seed, pool, test, arguments) -> dict:
    model, seconds = load_policy()[0], 0.0
    if arm == "warm-up":
        path = warm_up(seed, pool, arguments)
        model, seconds = PeftModel.from_pretrained(model, path), harness.read(path / "done.json")["seconds"]
    return {"steps": 0, "looks": [{"step": 0, "seconds": seconds, **successes(model, test)}]}


def run(seed, arm, size, pool, test, arguments) -> dict:
    result = {"seed": seed, "arm": arm, "size": size}
    if arm in ("none", "warm-up"):
        return result | untrained(arm, seed, pool, test, arguments)
    steps = math.ceil(arguments.passes * size / CHUNK)
    full = {steps, steps // 2} | ({steps - WARMUP_STEPS} if steps > WARMUP_STEPS else set())
    dataset, sampler, indices = pool, None, []
    if arm == "full":  # one run is looked at where those of each size end
        full |= {math.ceil(arguments.passes * smaller / CHUNK) for smaller in arguments.sizes if smaller < size}
    elif arm == "staged":
        config = LearnAlignConfig(num_prompts=size // 2, warmup_prompts=0, reselect_every=arguments.passes)
        sampler = LearnAlignSampler(config)
    else:
        indices = choose(arm, size, seed, pool, arguments)
        dataset = pool.select(indices)
    glances = {steps // 4, 3 * steps // 4} if size == CURVES_AT or arm == "full" else ()
    look = Look(test, full, glances)
    adapter = None if arm.endswith("cold") else warm_up(seed, pool, arguments)
    rate = SLOW if arm.endswith(" slow") else 1.0
    trainer = build_trainer(adapter, dataset, steps, seed, arguments, [look], sampler, rate)
    moved = size == MOVEMENT["size"] and arm in MOVEMENT["arms"] and seed in MOVEMENT["seeds"]
    if moved:
        others = random.Random(seed).sample(sorted(set(range(len(pool))) - set(indices)), MOVEMENT["others"])
        rows = pool.select(indices + others)
        before = successes(trainer.model, rows, greedy=False)["sampled"]
    trainer.train()
    if moved:
        after = successes(trainer.model, rows, greedy=False)["sampled"]
        result["movement"] = {"index": indices + others, "chosen": size, "before": before, "after": after}
    logs = [log for log in trainer.state.log_history if "reward" in log]
    result["reward"] = [round(log["reward"], 4) for log in logs]
    result["zero_variance"] = [round(log["frac_reward_zero_std"], 4) for log in logs]
    return result | {"steps": steps, "looks": look.looks}


def cells(arguments):
    """(size, seed, arm), the sizes in the order given: what was measured so far always has all arms at some size."""
    for size in arguments.sizes:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                if arm in ("none", "warm-up"):
                    if size == arguments.sizes[0] and (arm == "warm-up" or seed == arguments.seeds[0]):
                        yield 0, seed, arm
                elif (arm != "full" or size == max(arguments.sizes)) and (
                    not arm.endswith(" slow") or size == CURVES_AT
                ):
                    yield size, seed, arm


def conditions_of(arguments, pool, test, source) -> dict:
    found = {"data": source, "passes": arguments.passes, "learning_rate": arguments.learning_rate, "chunk": CHUNK}
    return found | {"pool": len(pool), "test": len(test), "versions": versions("trl-learnalign")}


def first(rows, number):
    return rows.select(range(min(number or len(rows), len(rows))))


def file_of(arguments, size, seed, arm):
    return arguments.output_dir / f"seed-{seed}" / f"{arm.replace(' ', '-')}-{size}.json"


def main():
    files = {"dataset_path": DATASET, "output_dir": Path("runs/gsm8k_equations")}
    runs = {"seeds": [0, 1, 2, 3, 4], "arms": [*ARMS], "sizes": [*SIZES], "passes": 2.0, "learning_rate": 1e-3}
    few = {"pool": (int, "only the first rows of the pool, to try things out"), "test": (int, "and of the test")}
    arguments = options(__doc__, {"arms": ARMS}, **files, **runs, **few)
    pool, test, source = read_equations(arguments.dataset_path)
    pool, test = first(pool, arguments.pool), first(test, arguments.test)
    if max(arguments.sizes) > len(pool):
        sys.exit(f"--sizes {max(arguments.sizes)} are more prompts than the pool's {len(pool)}.")
    conditions = conditions_of(arguments, pool, test, source)
    known = harness.read(RESULTS / "runs.json", {"conditions": None})
    done = {tuple(cell) for cell in known["cells"]} if known["conditions"] == conditions else set()
    todo = [cell for cell in cells(arguments) if cell not in done]
    for number, (size, seed, arm) in enumerate(todo, 1):
        file, own = file_of(arguments, size, seed, arm), (seed, arm, size, pool, test, arguments)
        result = harness.cell(file, conditions, run, *own)
        if result is not None:
            text = f"seed {seed}, {arm}, {size} prompts, {result['steps']} steps: {success(result):.4f}"
            print(f"{number}/{len(todo)}: {text}", flush=True)
    print_means(arguments)


def success(result) -> float:
    """At the end of a run, on the test rows."""
    last = result["looks"][-1]["sampled"]
    return sum(last) / len(last) / SAMPLES


def print_means(arguments):
    """Summarise the runs in the output directory that were asked for, over their seeds."""
    found = {}
    for size, seed, arm in cells(arguments):
        result = harness.read(file_of(arguments, size, seed, arm))
        if result:
            found.setdefault((size, arm), []).append(success(result))
    for (size, arm), values in found.items():
        print(f"{size} prompts, {arm}: {sum(values) / len(values):.4f}, mean over {len(values)} seeds")


if __name__ == "__main__":
    main()
