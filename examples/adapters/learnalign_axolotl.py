"""
Axolotl: prompts chosen online in its GRPO trainer. Written for Axolotl 0.19, not run with it.

    rl: grpo
    trainer_cls: learnalign_axolotl.OnlineGRPOTrainer  # this file where Python finds it

Axolotl's asynchronous trainer and its sequence parallelism make samplers of their own: leave both off.
"""

from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer

from trl_learnalign import LearnAlignConfig, LearnAlignMixin, LearnAlignSampler


CONFIG = LearnAlignConfig(schedule="online")


class OnlineGRPOTrainer(LearnAlignMixin, AxolotlGRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, train_sampler=LearnAlignSampler(CONFIG), **kwargs)
