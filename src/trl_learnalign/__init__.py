"""LearnAlign inside TRL: train GRPO on the prompts worth training on (arXiv 2506.11480)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callback import LearnAlignCallback
    from .config import LearnAlignConfig
    from .sampler import LearnAlignSampler
    from .schedules.base import Schedule
    from .selection.result import Selection, find_selections
    from .selection.run import select_prompts
    from .trainer import LearnAlignGRPOTrainer, LearnAlignMixin

__all__ = [
    "LearnAlignCallback",
    "LearnAlignConfig",
    "LearnAlignGRPOTrainer",
    "LearnAlignMixin",
    "LearnAlignSampler",
    "Schedule",
    "Selection",
    "find_selections",
    "select_prompts",
]
__version__ = version("trl-learnalign")

# Where each name is defined. It is imported when it is used, so that `trl_learnalign.curriculum` needs NumPy alone
_MODULES = {
    "LearnAlignCallback": "callback",
    "LearnAlignConfig": "config",
    "LearnAlignGRPOTrainer": "trainer",
    "LearnAlignMixin": "trainer",
    "LearnAlignSampler": "sampler",
    "Schedule": "schedules.base",
    "Selection": "selection.result",
    "find_selections": "selection.result",
    "select_prompts": "selection.run",
}


if not TYPE_CHECKING:  # or else a type checker would accept any name

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
