"""
Two rewards, for right and for short answers. The first decides success. Takes a minute or two on a CPU.

    python examples/multi_reward.py [--output_dir runs/multi_reward]
"""

import argparse
from pathlib import Path

from equations import equations_reward, generate_chains
from peft import LoraConfig
from trl import GRPOConfig

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler


def brevity_reward(completions: list[str], **kwargs) -> list[float]:
    """In [0, 1]: 1 for an empty completion, 0 from 56 characters on."""
    return [max(0.0, 1 - len(completion) / 56) for completion in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/multi_reward")
    arguments = parser.parse_args()
    trainer = LearnAlignGRPOTrainer(
        model=str(Path(__file__).parent / "assets" / "tiny-policy"),
        reward_funcs=[equations_reward, brevity_reward],
        args=GRPOConfig(
            output_dir=arguments.output_dir,
            reward_weights=[1.0, 0.1],  # both go into the advantages, of training and of the gradients
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=56,
            learning_rate=5e-4,
            num_train_epochs=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=generate_chains(200, seed=1),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        train_sampler=LearnAlignSampler(
            LearnAlignConfig(num_prompts=48, warmup_prompts=32, success_reward="equations_reward")
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
