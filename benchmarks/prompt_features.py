"""
What the hidden states of the prompts cost that `schedule="online"` predicts success from, as a share of an epoch of
rollouts: in FLOPs on the tiny policy, and in time on a real chat model.

    python benchmarks/prompt_features.py [--model DIR]

FLOPs and time of the rollouts are those of some prompts, times the prompts. Both times are of the same process, one
after the other, so that other work on the machine counts for both.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from workload import ROOT, save_results

from trl_learnalign.ground.peers import Peers
from trl_learnalign.host import find_host
from trl_learnalign.measures.hidden_states import hidden_states


sys.path.insert(0, str(ROOT / "examples"))

from equations import generate_chains


ROLLOUTS = 8


def sums(number):
    """Questions of the kind that a small chat model is asked."""
    draw = random.Random(0)
    asked = [f"What is {draw.randrange(100)} + {draw.randrange(100)}? Give the number." for _ in range(number)]
    system = {"role": "system", "content": "Answer briefly."}
    return Dataset.from_dict({"prompt": [[system, {"role": "user", "content": text}] for text in asked]})


def trainer_of(model, tokenizer, dataset, length, **changes):
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=ROLLOUTS,
        num_generations=ROLLOUTS,
        max_completion_length=length,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    adapter = LoraConfig(r=16, target_modules="all-linear")
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=dataset,
        peft_config=adapter,
    )


def measured(trainer, prompts, at_once, measure):
    """`measure` of the hidden states of all prompts, and of the rollouts of some, for each prompt."""
    host, dataset = find_host(trainer), trainer.train_dataset
    with Peers(trainer.accelerator) as peers:
        features = measure(lambda: hidden_states(host, Path(trainer.args.output_dir), peers)) / len(dataset)
    with host.left_as_found(ROLLOUTS):
        batches = [list(range(start, min(start + at_once, prompts))) for start in range(0, prompts, at_once)]
        rollouts = measure(lambda: [host.generate(dataset, rows, 0, gradients=False) for rows in batches]) / prompts
    return features, rollouts


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def tiny(args):
    directory = ROOT / "examples/assets/tiny-policy"
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    dataset = generate_chains(args.prompts, seed=1)
    trainer = trainer_of(AutoModelForCausalLM.from_pretrained(directory), tokenizer, dataset, 56)
    features, rollouts = measured(trainer, args.rolled_out, 32, flops)
    return {"prompts": args.prompts, "features": features, "rollouts": rollouts, "share": features / rollouts}


def real(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    trainer = trainer_of(model, tokenizer, sums(args.asked), args.length)
    measured(trainer, 1, 1, seconds)  # warm
    trainer.args.output_dir = tempfile.mkdtemp()
    features, rollouts = measured(trainer, args.answered, 2, seconds)
    return {
        "prompts": args.asked,
        "tokens": args.length,
        "features_seconds": features,
        "rollouts_seconds": rollouts,
        "share": features / rollouts,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4096)
    parser.add_argument("--rolled_out", type=int, default=128, help="of them")
    parser.add_argument("--model", help="directory of a chat model")
    parser.add_argument("--asked", type=int, default=256)
    parser.add_argument("--answered", type=int, default=4, help="of them")
    parser.add_argument("--length", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/prompt_features.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"rollouts": ROLLOUTS, "tiny": tiny(args)}
    if args.model:
        found["real"] = real(args)
    save_results(args.output, found)


if __name__ == "__main__":
    main()
