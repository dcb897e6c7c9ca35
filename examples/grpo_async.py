"""
Asynchronous GRPO on GSM8K with prompts that LearnAlign chooses online. One GPU generates, another trains:

    CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-1.5B-Instruct --max-model-len 1024 \\
        --logprobs-mode processed_logprobs --weight-transfer-config '{"backend":"nccl"}'
    CUDA_VISIBLE_DEVICES=0 accelerate launch examples/grpo_async.py --output_dir runs/async

`--dataset_path DIR` reads GSM8K's train.jsonl there instead of the Hub. `--resume_from_checkpoint true` goes on with a
killed run. Every flag of AsyncGRPOConfig, ScriptArguments and LearnAlignConfig works.
"""

from dataclasses import dataclass, field

from grpo_gsm8k import ExampleArguments, last_number_reward, load_gsm8k
from peft import LoraConfig
from trl import TrlParser
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from trl_learnalign import LearnAlignAsyncMixin, LearnAlignConfig, LearnAlignSampler


class LearnAlignAsyncTrainer(LearnAlignAsyncMixin, AsyncGRPOTrainer):
    """TRL's asynchronous trainer with a `train_sampler`."""


@dataclass
class AsyncArguments(ExampleArguments):
    """Arguments of this script in addition to TRL's own."""

    model: str = field(default="Qwen/Qwen2.5-1.5B-Instruct", metadata={"help": "The policy."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter; 0 trains the whole model."})


# Flags override them
DEFAULTS = {
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "schedule": "online",
    "score": "learnability",
    "learning_rate": 1e-5,
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 8,
    "max_completion_length": 512,
    "max_steps": 200,
    "save_steps": 20,
    "logging_steps": 1,
}


def main():
    parser = TrlParser((AsyncArguments, AsyncGRPOConfig, LearnAlignConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    arguments, training_args, learnalign = parser.parse_args_and_config()
    rank, adapter = arguments.lora_r, {}
    if rank:
        adapter["peft_config"] = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    trainer = LearnAlignAsyncTrainer(
        model=arguments.model,
        reward_funcs=last_number_reward,
        args=training_args,
        train_dataset=load_gsm8k(arguments, "train"),
        train_sampler=LearnAlignSampler(learnalign),
        **adapter,
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
