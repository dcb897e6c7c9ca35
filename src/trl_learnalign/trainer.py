"""GRPOTrainer with a `train_sampler`."""

from trl import GRPOTrainer

from .callback import LearnAlignCallback
from .disk import whole_checkpoint
from .rollouts import check_dataset
from .sampler import LearnAlignSampler


class LearnAlignMixin:
    r"""
    Gives a GRPOTrainer (or a subclass of yours) the argument `train_sampler`:

    ```python
    class MyTrainer(LearnAlignMixin, MyGRPOTrainer): ...
    ```

    Args:
        train_sampler ([`LearnAlignSampler`], *optional*):
            Decides which prompts are trained on. Without it the trainer is what it was. All other arguments go on to
            the trainer.
    """

    def __init__(self, *args, train_sampler: LearnAlignSampler | None = None, **kwargs):
        if train_sampler is not None and not isinstance(train_sampler, LearnAlignSampler):
            raise TypeError(f"`train_sampler` must be a LearnAlignSampler, but is a {type(train_sampler).__name__}.")
        if train_sampler is not None and kwargs.get("train_dataset") is not None:
            check_dataset(kwargs["train_dataset"])  # before a model is loaded in vain
        super().__init__(*args, **kwargs)
        self._learnalign = None
        if train_sampler is not None:
            self._learnalign = LearnAlignCallback(self, train_sampler)
            self.add_callback(self._learnalign)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As the trainer's, but `resume_from_checkpoint=True` resumes from the last checkpoint that is whole: a run killed
        while it wrote one goes on from the one before it, and a run killed before its first starts from the beginning.

        Raises:
            `ValueError`: the checkpoint that was asked for is not whole.
        """
        if self._learnalign is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            shared = not self.args.save_on_each_node
            resume_from_checkpoint = whole_checkpoint(self.args.output_dir, resume_from_checkpoint, shared)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._learnalign.unlock()


class LearnAlignGRPOTrainer(LearnAlignMixin, GRPOTrainer):
    r"""
    [`~trl.GRPOTrainer`] that trains on the prompts that LearnAlign selects.

    ```python
    sampler = LearnAlignSampler(LearnAlignConfig(num_prompts=1000, warmup_prompts=300))
    trainer = LearnAlignGRPOTrainer(..., train_sampler=sampler)
    trainer.train()
    ```
    """
