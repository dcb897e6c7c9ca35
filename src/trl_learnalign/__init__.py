"""
LearnAlign inside TRL: train GRPO on the prompts worth training on (arXiv 2506.11480).

Four words: a *measure* finds out something about prompts (`measures/`), a *score* ranks them (`scores/`), a *choice*
takes some (`choice/`), a *schedule* says which prompt comes when (`schedules/`).

The life of a chunk, the prompts that a trainer generates for at once:
     1 sampler                  is asked for a chunk by the trainer's dataloader
     2 schedules/stream         numbers its draws and keeps those in flight
     3 schedules/online         asks the curriculum
     4 curriculum/online        ranks candidates and chooses
     5 curriculum/flight        notes what is expected of each draw; then the trainer generates
     6 host/taps                reports the rewards
     7 schedules/tap            checks the rows that they are of
     8 schedules/stream         makes groups, with the numbers of the draws
     9 schedules/online         hands them on, and warns
    10 curriculum/online        turns rewards into outcomes, by curriculum/rewards, in a curriculum/batch
    11 curriculum/predictor     learns what predicts success; curriculum/memory, judge, history and kinds learn as well
    12 schedules/checkpoint     writes the state and the draws in flight, which a resumed run begins with

The life of a selection, a fixed set of prompts:
     1 report/selecting         is called when one is due (callback), or as `select_prompts`
     2 selection/run            takes it phase by phase, on every process
     3 selection/checks         refuses what cannot work, before anything is generated
     4 choice/table             draws the pool: rows that may be chosen
     5 selection/keys           names what the result depends on: a finished selection is read again
     6 measures/rollouts        rolls out and rewards, or another measure does its work
     7 measures/gradients       differentiates, and measures/alignments compares, if the score asks for it
     8 scores/builtin           ranks
     9 choice/choose            takes
    10 selection/result         holds table and provenance, and writes the files; then report/selection_page draws
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .async_trainer import LearnAlignAsyncMixin
    from .callback import LearnAlignCallback
    from .config import LearnAlignConfig
    from .host import register_host
    from .report.selecting import select_prompts
    from .sampler import LearnAlignSampler
    from .schedules.base import Schedule
    from .selection.preferences import preference_pairs
    from .selection.result import Selection, find_selections
    from .trainer import LearnAlignGRPOTrainer, LearnAlignMixin

__all__ = [
    "LearnAlignAsyncMixin",
    "LearnAlignCallback",
    "LearnAlignConfig",
    "LearnAlignGRPOTrainer",
    "LearnAlignMixin",
    "LearnAlignSampler",
    "Schedule",
    "Selection",
    "find_selections",
    "preference_pairs",
    "register_host",
    "select_prompts",
]
__version__ = version("trl-learnalign")

# Where each name is defined. It is imported when it is used, so that `trl_learnalign.curriculum` needs NumPy alone
_MODULES = {
    "LearnAlignAsyncMixin": "async_trainer",
    "LearnAlignCallback": "callback",
    "LearnAlignConfig": "config",
    "LearnAlignGRPOTrainer": "trainer",
    "LearnAlignMixin": "trainer",
    "LearnAlignSampler": "sampler",
    "Schedule": "schedules.base",
    "Selection": "selection.result",
    "find_selections": "selection.result",
    "preference_pairs": "selection.preferences",
    "register_host": "host",
    "select_prompts": "report.selecting",
}


if not TYPE_CHECKING:  # or else a type checker would accept any name

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = import_module(f".{_MODULES[name]}", __name__)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            raise ModuleNotFoundError(
                f"`{__name__}.{name}` needs the package {package!r}, which is not installed. Install "
                f"trl-learnalign with what it depends on, without `--no-deps`. `{__name__}.curriculum` works without.",
                name=package,
            ) from error
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
