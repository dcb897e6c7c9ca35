"""
Does the selection help, and against what? Every arm, number of prompts and seed on the equations of GSM8K.

    python benchmarks/gsm8k_equations/grid.py --dataset_path DIR [--seeds 0 1] [--arms random learnalign] [--sizes 500]

DIR holds GSM8K's train.jsonl and test.jsonl: all train rows are the pool, all test rows the test. For every seed the policy
is warmed up on 300 random prompts, and the whole pool is scored once after that and once without ("cold"); all arms choose
from these scores. Every arm then trains for the same number of steps on its N prompts with stock GRPOTrainer, from the
warmed-up policy, or, the cold arms, from the first. A run is looked at twice, at equal steps after the warm-up and at equal
steps with the warm-up counted in. Each finished run is a file in the output directory, and a later call, or another one
beside it, leaves out the runs that are there.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import torch
from demo import POLICY
from equations import equations_reward, load_gsm8k_equations
from peft import LoraConfig, PeftModel
from train_tiny_policy import generate
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignConfig, Selection, select_prompts


WARMUP, CHUNK, SAMPLES = 300, 32, 8
WARMUP_STEPS = math.ceil(WARMUP / CHUNK)
ARMS = ("random", "filter", "learnability", "alignment", "learnalign", "random cold", "learnalign cold")
SIZES = (100, 500, 1000, 2000)


def build_trainer(adapter, dataset, steps, seed, arguments, callbacks=()):
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if adapter is not None:
        model, lora = PeftModel.from_pretrained(model, adapter, is_trainable=True), None
    args = GRPOConfig(
        output_dir=str(arguments.output_dir / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8 * CHUNK,
        num_generations=8,
        max_completion_length=56,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        max_steps=steps,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=equations_reward,
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(POLICY),
        peft_config=lora,
        callbacks=list(callbacks),
    )


def successes(model, test) -> dict[str, list[int]]:
    """Of every test row: how many of 8 samples at temperature 1 succeed, and whether the greedy completion does."""
    tokenizer, state = AutoTokenizer.from_pretrained(POLICY), torch.get_rng_state()
    torch.manual_seed(0)
    training = model.training
    prompts = [prompt for prompt in test["prompt"] for _ in range(SAMPLES)]
    answers = [answer for answer in test["answer"] for _ in range(SAMPLES)]
    rewards = torch.tensor(equations_reward(generate(model, tokenizer, prompts, do_sample=True), answers))
    greedy = equations_reward(generate(model, tokenizer, list(test["prompt"]), do_sample=False), list(test["answer"]))
    model.train(training)
    torch.set_rng_state(state)
    return {"sampled": rewards.view(-1, SAMPLES).sum(1).int().tolist(), "greedy": [int(reward) for reward in greedy]}


class Look(TrainerCallback):
    """Measures the policy after given steps."""

    def __init__(self, steps, test):
        self.steps, self.test, self.results, self.seconds = steps, test, {}, 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            started = time.perf_counter()
            self.results[state.global_step] = successes(model, self.test)
            self.seconds += time.perf_counter() - started


def warm_up(seed, pool, arguments) -> Path:
    """The adapter after the warm-up."""
    path = arguments.output_dir / f"seed-{seed}" / "warm"
    if not (path / "adapter_model.safetensors").is_file():
        print(f"seed {seed}: warm-up", flush=True)
        trainer = build_trainer(None, pool, WARMUP_STEPS, seed, arguments)
        trainer.train()
        trainer.model.save_pretrained(path)
    return path


def scores(seed, cold, pool, arguments) -> Selection:
    """Of the whole pool, with the policy after the warm-up or before it."""
    path = arguments.output_dir / f"seed-{seed}" / ("cold" if cold else "scores")
    if not (path / "selection.json").is_file():
        print(f"seed {seed}: scoring {len(pool)} prompts{', cold' if cold else ''}", flush=True)
        trainer = build_trainer(None if cold else warm_up(seed, pool, arguments), pool, 1, seed, arguments)
        trainer.args.output_dir = str(path.with_name(f"{path.name} under way"))
        select_prompts(trainer, LearnAlignConfig(num_prompts=max(SIZES))).save(path)
    return Selection.load(path)


def choose(arm, size, seed, pool, arguments) -> list[int]:
    if arm.startswith("random"):
        return random.Random(seed).sample(range(len(pool)), size)
    table = scores(seed, arm.endswith("cold"), pool, arguments).scores.to_pandas()
    table = table[table["learnability"] > 0]
    if arm == "filter":
        return random.Random(seed).sample(table["index"].tolist(), size)
    column = {"learnability": "learnability", "alignment": "alignment"}.get(arm, "score")
    return table.sort_values([column, "index"], ascending=[False, True])["index"].head(size).tolist()


def run(seed, arm, size, pool, test, arguments) -> dict:
    indices = choose(arm, size, seed, pool, arguments)
    adapter = None if arm.endswith("cold") else warm_up(seed, pool, arguments)
    steps = math.ceil(arguments.passes * size / CHUNK)
    look = Look({steps, max(1, steps - WARMUP_STEPS)}, test)
    started = time.perf_counter()
    trainer = build_trainer(adapter, pool.select(indices), steps, seed, arguments, [look])
    trainer.train()
    return {
        "seed": seed,
        "arm": arm,
        "size": size,
        "steps": steps,
        "train_seconds": round(time.perf_counter() - started - look.seconds, 1),
        "train_reward": [round(log["reward"], 4) for log in trainer.state.log_history if "reward" in log],
        "results": look.results,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k_equations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--passes", type=float, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--pool", type=int, help="only the first rows of the pool, to try things out")
    parser.add_argument("--test", type=int, help="only the first rows of the test")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool, _ = load_gsm8k_equations(arguments.dataset_path / "train.jsonl")
    test, _ = load_gsm8k_equations(arguments.dataset_path / "test.jsonl")
    pool = pool.select(range(arguments.pool)) if arguments.pool else pool
    test = test.select(range(arguments.test)) if arguments.test else test
    conditions = {
        **{name: getattr(arguments, name) for name in ("passes", "learning_rate", "threads")},
        "pool": len(pool),
        "test": len(test),
        "cpu_count": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "trl-learnalign")},
    }
    for seed in arguments.seeds:
        for size in arguments.sizes:
            for arm in arguments.arms:
                file = arguments.output_dir / f"seed-{seed}" / f"{arm.replace(' ', '-')}-{size}.json"
                if file.is_file():
                    continue
                result = run(seed, arm, size, pool, test, arguments) | {"conditions": conditions}
                temporary = file.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps(result) + "\n")
                temporary.replace(file)
                last = result["results"][max(result["results"])]["sampled"]
                rate = sum(last) / len(last) / SAMPLES
                print(f"seed {seed}, {arm}, {size} prompts, {result['steps']} steps: {rate:.4f}", flush=True)


if __name__ == "__main__":
    main()
