"""LearnAlign inside TRL: train GRPO on the prompts worth training on (arXiv 2506.11480)."""

from importlib.metadata import version

from .callback import LearnAlignCallback
from .config import LearnAlignConfig
from .sampler import LearnAlignSampler
from .selection import Selection
from .selector import select_prompts
from .trainer import LearnAlignGRPOTrainer, LearnAlignMixin


__all__ = [
    "LearnAlignCallback",
    "LearnAlignConfig",
    "LearnAlignGRPOTrainer",
    "LearnAlignMixin",
    "LearnAlignSampler",
    "Selection",
    "select_prompts",
]
__version__ = version("trl-learnalign")
