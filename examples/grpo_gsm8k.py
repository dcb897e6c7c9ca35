"""
GRPO on the prompts of GSM8K that LearnAlign selects, with the settings of the paper (arXiv 2506.11480).

The full run, on a GPU:

    accelerate launch examples/grpo_gsm8k.py

DAPO-MATH-17K instead, as in the paper:

    accelerate launch examples/grpo_gsm8k.py --config examples/paper/dapo_math_17k_qwen2.5_7b.yaml

The same script on a CPU, on the equations of the real GSM8K rows, with the tiny policy of this repository:

    accelerate launch examples/grpo_gsm8k.py --config examples/equations_cpu.yaml --dataset_path DIR

and with prompts chosen online:

    accelerate launch examples/grpo_gsm8k.py --config examples/equations_online.yaml --dataset_path DIR

where DIR holds `train.jsonl` and `test.jsonl`. `--resume_from_checkpoint true` goes on with a killed run. Every flag
of GRPOConfig, ModelConfig, ScriptArguments and LearnAlignConfig works, on the command line or in the YAML file.
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import yaml
from datasets import Dataset, load_dataset
from equations import equations_reward, generate_chains, load_gsm8k_equations
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler


INSTRUCTION = '\nLet\'s think step by step and output the final answer after "####".'
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*|-?\.\d+")

# The defaults of this script; `--config` and flags override them
PAPER = Path(__file__).parent / "paper" / "gsm8k_qwen2.5_1.5b.yaml"


@dataclass
class ExampleArguments(ScriptArguments):
    """Arguments of this script in addition to TRL's own."""

    dataset_path: str | None = field(
        default=None, metadata={"help": "Directory with train.jsonl and test.jsonl, read instead of the Hub."}
    )
    task: str = field(
        default="gsm8k",
        metadata={
            "help": "GSM8K's word problems, or only their equations, which a tiny policy can work on (generated, "
            "without a `dataset_path`), or the problems of DAPO-MATH-17K.",
            "choices": ["gsm8k", "equations", "dapo_math"],
        },
    )


def last_number_reward(completions, answer, **kwargs):
    """1 if the last number of the completion is the answer."""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        numbers = NUMBER.findall(completion[-1]["content"])
        last = numbers[-1].replace(",", "").rstrip(".") if numbers else ""
        rewards.append(float(last != "" and Decimal(last) == Decimal(expected)))
    return rewards


def load_gsm8k(arguments: ExampleArguments, split: str) -> Dataset:
    """Conversational prompts, and the number after `####` of the solution."""
    if arguments.dataset_path is not None:
        dataset = load_dataset("json", data_files=str(local_file(arguments, split)), split="train")
    else:
        dataset = load_dataset(arguments.dataset_name, arguments.dataset_config, split=split)

    def convert(row):
        answer = row["answer"].rsplit("####", 1)[-1].replace(",", "").strip()
        return {"prompt": [{"role": "user", "content": row["question"] + INSTRUCTION}], "answer": answer}

    return dataset.map(convert, remove_columns=["question"])


def load_dapo_math(arguments: ExampleArguments, split: str) -> Dataset:
    """Conversational prompts and answers, which are whole numbers in this dataset; rows with others are left out."""
    if arguments.dataset_path is not None:
        dataset = load_dataset("json", data_files=str(local_file(arguments, split)), split="train")
    else:
        dataset = load_dataset(arguments.dataset_name, arguments.dataset_config, split=split)
    numbers = dataset.filter(lambda row: NUMBER.fullmatch(row["solution"].replace(",", "")) is not None)
    print(f"{split}: {len(numbers)} rows, {len(dataset) - len(numbers)} without a number as the answer left out")

    def convert(row):
        prompt = [{"role": "user", "content": row["prompt"] + INSTRUCTION}]
        return {"prompt": prompt, "answer": row["solution"].replace(",", "")}

    return numbers.map(convert, remove_columns=numbers.column_names)


def load_equations(arguments: ExampleArguments, split: str) -> Dataset:
    """Plain prompts such as `48/2;48+24=`."""
    if arguments.dataset_path is None:
        return generate_chains(7473 if split == "train" else 1319, seed=1 if split == "train" else 2)
    dataset, dropped = load_gsm8k_equations(local_file(arguments, split))
    print(f"{split}: {len(dataset)} rows with equations, {dropped} without left out")
    return dataset


def local_file(arguments: ExampleArguments, split: str) -> Path:
    path = Path(arguments.dataset_path) / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"`--dataset_path {arguments.dataset_path}` holds no {split}.jsonl. Give a directory with GSM8K's "
            "train.jsonl and test.jsonl, or leave the flag out to read the Hub."
        )
    return path


def main():
    parser = TrlParser((ExampleArguments, GRPOConfig, ModelConfig, LearnAlignConfig))
    parser.set_defaults_with_config(**yaml.safe_load(PAPER.read_text(encoding="utf-8")))
    arguments, training_args, model_args, learnalign = parser.parse_args_and_config()

    load, reward = {
        "gsm8k": (load_gsm8k, last_number_reward),
        "dapo_math": (load_dapo_math, last_number_reward),
        "equations": (load_equations, equations_reward),
    }[arguments.task]
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    trainer = LearnAlignGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward,
        args=training_args,
        train_dataset=load(arguments, "train"),
        eval_dataset=load(arguments, "test") if training_args.do_eval else None,
        peft_config=get_peft_config(model_args),
        train_sampler=LearnAlignSampler(learnalign),
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(training_args.output_dir)
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.accelerator.is_main_process:
            print(f"Success on the test rows: {metrics['eval_reward']:.4f}")
    if trainer.accelerator.is_main_process:
        print(f"Adapter: {training_args.output_dir}; selections: {Path(training_args.output_dir) / 'learnalign'}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
