"""Methods that every trainer with a `train_sampler` has, whether it generates beside its training or between."""

from typing import TYPE_CHECKING, Protocol

from .checkpoints import checkpoint_to_resume


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # stands before a class of trainers


class RunsPrompts(Protocol):
    """Looks after the prompts of a trainer."""

    def ended(self) -> None: ...
    def warn_of_uploads(self, now: bool = False) -> None: ...


class TrainsOnPrompts(_Trainer):
    """A trainer whose prompts are looked after by `_learnalign`, or by nobody."""

    _learnalign: RunsPrompts | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train as the trainer does, but `resume_from_checkpoint=True` resumes from the last complete checkpoint: a run
        killed while writing one goes on from the one before it, and a run killed before its first starts from the
        beginning.

        Raises:
            `ValueError`: the checkpoint that was asked for is not complete, or there are checkpoints and none is.
        """
        if self._learnalign is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(self, resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._learnalign.ended()

    def push_to_hub(self, *args, **kwargs):
        """Push as the trainer does, with a warning if prompts go to a repository that is public, or may be."""
        if self._learnalign is not None:
            self._learnalign.warn_of_uploads(now=True)
        return super().push_to_hub(*args, **kwargs)
