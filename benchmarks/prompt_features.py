"""
What the hidden states of the prompts cost that `schedule="online"` predicts success from, as a share of an epoch of
rollouts: in FLOPs on the tiny policy, and in time on a real chat model.

    python benchmarks/prompt_features.py [--model DIR]

FLOPs and time of the rollouts are those of some prompts, times the prompts. Both times are of the same process, one
after the other, so that other work on the machine counts for both.
"""

import random
import tempfile
from pathlib import Path

import harness
import torch
from datasets import Dataset
from equations import generate_chains
from policies import GROUP, POLICY, arguments_of, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from workload import flops, no_reward, seconds

from trl_learnalign.ground.peers import Peers
from trl_learnalign.host import find_host
from trl_learnalign.measures.hidden_states import hidden_states


def sums(number):
    """Questions of the kind that a small chat model is asked."""
    draw = random.Random(0)
    asked = [f"What is {draw.randrange(100)} + {draw.randrange(100)}? Give the number." for _ in range(number)]
    system = {"role": "system", "content": "Answer briefly."}
    return Dataset.from_dict({"prompt": [[system, {"role": "user", "content": text}] for text in asked]})


def trainer_around(folder, dataset, length, dtype=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    args = arguments_of(tempfile.mkdtemp(), per_device_train_batch_size=GROUP, max_completion_length=length)
    return trainer_of((model, AutoTokenizer.from_pretrained(folder, padding_side="left")), no_reward, args, dataset)


def measured(trainer, prompts, at_once, measure):
    """`measure` of the hidden states of all prompts, and of the rollouts of some, for each prompt."""
    host, dataset = find_host(trainer), trainer.train_dataset
    with Peers(trainer.accelerator) as peers:
        features = measure(lambda: hidden_states(host, Path(trainer.args.output_dir), peers)) / len(dataset)
    with host.left_as_found(GROUP):
        batches = [list(range(start, min(start + at_once, prompts))) for start in range(0, prompts, at_once)]
        rollouts = measure(lambda: [host.generate(dataset, rows, 0, gradients=False) for rows in batches]) / prompts
    return features, rollouts


def tiny(args):
    trainer = trainer_around(POLICY, generate_chains(args.prompts, seed=1), 56)
    features, rollouts = measured(trainer, args.rolled_out, 32, lambda call: flops(call)[0])
    return {"prompts": args.prompts, "features": features, "rollouts": rollouts, "share": features / rollouts}


def real(args):
    trainer = trainer_around(args.model, sums(args.asked), args.length, torch.bfloat16)
    measured(trainer, 1, 1, seconds)  # warm
    trainer.args.output_dir = tempfile.mkdtemp()
    features, rollouts = measured(trainer, args.answered, 2, seconds)
    found = {"prompts": args.asked, "tokens": args.length, "features_seconds": features}
    return found | {"rollouts_seconds": rollouts, "share": features / rollouts}


def main():
    sizes = {"prompts": 4096, "rolled_out": 128, "asked": 256, "answered": 4, "length": 32}
    args = harness.options(__doc__, **sizes, model=(Path, "a chat model's directory"), output="prompt_features")
    found = {"rollouts": GROUP, "tiny": tiny(args)} | ({"real": real(args)} if args.model else {})
    harness.report(args.output, harness.conditions(**found))


if __name__ == "__main__":
    main()
