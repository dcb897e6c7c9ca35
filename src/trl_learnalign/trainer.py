"""Trainers with a `train_sampler`: the mixin for any class that has a host, and the GRPOTrainer with it."""

from pathlib import Path
from typing import TYPE_CHECKING

from trl import GRPOTrainer

from .callback import LearnAlignCallback, LearnAlignHandle
from .data.prompts import check_dataset, check_prompts
from .host import check_kind
from .report.cards import model_card, online_model_card
from .run.trains import TrainsOnPrompts
from .sampler import LearnAlignSampler, check_sampler
from .selection.stages import load_run


if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import torch
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl import GRPOConfig


class LearnAlignMixin(TrainsOnPrompts):
    r"""
    Gives a GRPOTrainer, an RLOOTrainer or an SDPOTrainer (or a subclass of yours) the argument `train_sampler`:

    ```python
    class MyTrainer(LearnAlignMixin, RLOOTrainer): ...
    ```

    Args:
        train_sampler ([`LearnAlignSampler`], *optional*):
            Decides which prompts are trained on. Without a sampler the trainer does not change. All other arguments
            are passed to the trainer.

    Attributes:
        learnalign ([`LearnAlignHandle`]): the schedule of the run, its selections and its report. `None` without a
            sampler.
    """

    learnalign: LearnAlignHandle
    _learnalign: LearnAlignCallback | None

    def __init__(self, *args, train_sampler: LearnAlignSampler | None = None, **kwargs):
        if train_sampler is not None:
            check_sampler(train_sampler)
            check_kind(type(self))  # before the model is loaded, as what follows
        if train_sampler is not None and kwargs.get("train_dataset") is not None:
            check_dataset(kwargs["train_dataset"], needs_prompt=kwargs.get("environment_factory") is None)
            if kwargs.get("rollout_func") is None:
                check_prompts(kwargs["train_dataset"])
        super().__init__(*args, **kwargs)
        self.learnalign = None  # type: ignore[assignment]  # who asks for it has given a sampler
        self._learnalign = None
        if train_sampler is not None:
            self._learnalign = LearnAlignCallback(self, train_sampler)  # sets `learnalign`
            self.add_callback(self._learnalign)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the trainer does, with `learnalign/zero_variance_after` once a selection is in use."""
        if self._learnalign is not None:
            logs = self._learnalign.with_zero_variance(logs)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        """Write the trainer's card, with a section on the prompts: the selections of this run, and the paper."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self._learnalign is None or not self.is_world_process_zero() or not card.is_file():
            return
        online = self._learnalign.announcer.summary()
        if online:
            card.write_text(card.read_text(encoding="utf-8").rstrip() + online_model_card(online), encoding="utf-8")
            return
        try:
            made = self._learnalign.selections  # since this process began
            until = made[-1].provenance["global_step"] if made else self.state.global_step
            summaries = [stage.summary for stage in load_run(self.args.output_dir, until)]
        except (FileNotFoundError, ValueError):  # none yet, or one that was tampered with
            return
        card.write_text(card.read_text(encoding="utf-8").rstrip() + model_card(summaries), encoding="utf-8")


class LearnAlignGRPOTrainer(LearnAlignMixin, GRPOTrainer):
    r"""
    [`~trl.GRPOTrainer`] that trains on the prompts that LearnAlign selects.

    ```python
    sampler = LearnAlignSampler(LearnAlignConfig(num_prompts=1000, warmup_prompts=300))
    trainer = LearnAlignGRPOTrainer(..., train_sampler=sampler)
    trainer.train()
    ```
    """

    if (
        TYPE_CHECKING
    ):  # the arguments of GRPOTrainer by name, so that an editor knows them and a misspelt one is an error

        def __init__(
            self,
            model: str | PreTrainedModel | PeftModel,
            reward_funcs: str | PreTrainedModel | Callable | list[str | PreTrainedModel | Callable] | None = None,
            args: GRPOConfig | None = None,
            train_dataset: Dataset | IterableDataset | None = None,
            eval_dataset: Dataset
            | IterableDataset
            | DatasetDict
            | IterableDatasetDict
            | dict[str, Dataset | IterableDataset]
            | None = None,
            processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
            reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
            callbacks: list[TrainerCallback] | None = None,
            optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
            quantization_config: BitsAndBytesConfig | None = None,
            peft_config: PeftConfig | None = None,
            tools: list[Callable] | None = None,
            rollout_func: Callable | None = None,
            environment_factory: Callable[[], Any] | dict[str, Callable[[], Any]] | None = None,
            *,
            train_sampler: LearnAlignSampler | None = None,
        ) -> None: ...
