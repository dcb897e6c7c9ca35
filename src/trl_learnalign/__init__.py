"""
LearnAlign inside TRL: train GRPO on the prompts worth training on (arXiv 2506.11480).

Four words: a *measure* finds out something about prompts (`measures/`), a *score* ranks them (`scores/`), a *choice*
takes some (`choice/`), a *schedule* says which prompt comes when (`schedules/`).

The life of a chunk, the prompts that a trainer generates for at once:
     1 sampler                  is asked for a chunk by the trainer's dataloader
     2 schedules/stream         numbers its draws and keeps those in flight
     3 schedules/online         asks the curriculum
     4 curriculum/online        ranks candidates and chooses
     5 curriculum/flight        notes what is expected of each draw
     6 host/taps                hands over the rewards of the chunk
     7 schedules/tap            checks the rows and makes groups
     8 curriculum/batch         groups as arrays
     9 curriculum/predictor     learns what predicts success; so do memory, judge and history
    10 schedules/checkpoint     writes state and draws in flight

The life of a selection, a fixed set of prompts:
     1 report/selecting         callback notices that one is due; or `select_prompts` is called
     2 selection/run            takes it phase by phase
     3 host/checks              refuses what cannot work
     4 choice/table             the pool
     5 selection/keys           what the result depends on
     6 measures/rollouts        rollouts and rewards
     7 measures/alignments      gradients and their cosines
     8 scores/builtin           ranks
     9 choice/choose            takes
    10 selection/result         table, provenance, files
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callback import LearnAlignCallback
    from .config import LearnAlignConfig
    from .host import register_host
    from .report.selecting import select_prompts
    from .sampler import LearnAlignSampler
    from .schedules.base import Schedule
    from .selection.result import Selection, find_selections
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
    "register_host",
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
    "register_host": "host",
    "select_prompts": "report.selecting",
}


if not TYPE_CHECKING:  # or else a type checker would accept any name

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
