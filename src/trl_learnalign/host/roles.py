"""The three roles of a trainer: it generates, it differentiates, it trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..gradients.modes import dropout_off
from ..ground.peers import Peers
from . import batches, generation, gradient_tap, taps
from .facts import Facts
from .generation import NoLogps
from .groups import RolloutGroup, Row
from .names import DIFFERENTIATES, TRAINS
from .trial import try_rewards


CheckpointWriter = Callable[[Path, bool, Peers], None]


class Generates(Facts):
    """
    Rollouts and rewards outside of training.

    Attributes:
        generation_method (`str`): the trainer's method that makes a batch for training of rows of the dataset, a dict
            with `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`, and calls `_calculate_rewards`.
        logps_method (`str`, *optional*): its method that computes log-probabilities for that batch.
        books (`tuple[str, ...]`): its attributes that a generation changes, which are put back.
    """

    generation_method = "_generate_and_score_completions"
    logps_method: str | None = "_get_per_token_logps_and_entropies"
    books: tuple[str, ...] = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")

    @contextmanager
    def left_as_found(self, num_rollouts: int | None) -> Iterator[None]:
        """
        Let the trainer generate `num_rollouts` completions for a prompt, with dropout off and no log-probabilities
        computed, and undo on exit all that a generation changes: metrics, logs, counters, modes, random states. `None`
        if nothing is generated, for trainers that do not play this role as well.
        """
        with generation.left_as_found(self, num_rollouts), dropout_off(self.trainer.model):
            yield

    def generate(self, dataset: Dataset, rows: list[int], seed: int, gradients: bool = True) -> list[RolloutGroup]:
        """Roll out prompts of this process: [`~trl_learnalign.host.generation.generate_groups`]."""
        return generation.generate_groups(self, dataset, rows, seed, gradients)

    @property
    def has_penalties(self) -> bool:
        """Tell if [`RolloutGroup`] has penalties where gradients will be taken, and only there."""
        return False

    def stand_in(self, gradients: bool) -> NoLogps:
        """Return what takes the place of the log-probabilities that the trainer computes after generating."""
        return NoLogps()

    def try_rewards(self, row: int) -> None:
        """Call the reward functions on a made-up completion: [`~trl_learnalign.host.trial.try_rewards`]."""
        try_rewards(self, row)


class Differentiates(Facts):
    """
    Gradients of the trainer's own loss. A host without this role keeps the methods as they are here.

    Attributes:
        loss_methods (`tuple[str, ...]`): methods with the loss: a subclass that overrides one has other gradients.
    """

    loss_methods: tuple[str, ...] = ("compute_loss", "_compute_loss", "compute_liger_loss")

    def check_loss(self) -> None:
        """Raise a `ValueError` for a loss whose gradient [`objective`] does not know."""

    def check_gradients(self) -> None:
        """
        Raise an error if gradients would not be those of the trainer's loss.

        Raises:
            `ValueError`: the host knows no gradient, or not that of this loss; or the trainer's class overrides the
                loss of the class that the host is registered for.
            `RuntimeError`: a version of TRL that lacks what is used here.
        """
        self.require(DIFFERENTIATES)
        # The functions, not where they are defined: a method that was replaced on the instance is another loss as well
        ours = self.loss_methods
        functions = {name: [taps.own_function(owner, name) for owner in (self.trainer, self.served)] for name in ours}
        changed = [f"`{name}`" for name, (own, served) in functions.items() if own is not served]
        if changed:
            kind, served = type(self.trainer).__name__, self.served.__name__
            raise ValueError(
                f"{kind} has its own {', '.join(changed)}, so its gradients may differ from those of {served}, which "
                "are the ones that LearnAlign knows. Use `score='learnability'` or `schedule='online'`, which take no "
                f"gradients. Or register a host that knows this loss with `trl_learnalign.host.register_host`: "
                f"`register_host({kind}, {type(self).__name__})` if it is that of {served} as far as gradients go."
            )
        self.check_loss()

    def objective(self, rows: list[Row]) -> torch.Tensor:
        """
        Return the scalar whose gradient is that of the trainer's own loss, with the sign of an objective, summed over
        `rows`.
        """
        raise NotImplementedError

    def scale_alone(self, tokens: float) -> float:
        """
        Return the length of training's gradient on a batch of one group, whose rows have `tokens` trained ones in the
        mean, over that of [`objective`] with weights that are the same for all rows and sum up to 1.
        """
        return 1.0

    def filler(self) -> Row:
        """Return a row of weight 0. TRL makes sure that there is a padding token."""
        token = self.trainer._tokenizer.pad_token_id
        return Row(np.array([token]), np.array([token]), np.array([1]), 0.0, 0.0)

    @property
    def runs_reference(self) -> bool:
        """Tell if a gradient takes a forward of the reference policy."""
        return False

    @property
    def needs_advantage(self) -> bool:
        """Tell if a row of advantage 0 has no gradient in training."""
        trainer = self.trainer
        extra = ("aux_loss_enabled", "_entropy_bonus_enabled", "entropy_coef", "use_adaptive_entropy")
        return not self.runs_reference and not any(getattr(trainer, name, None) for name in extra)

    @property
    def counts_without_advantage(self) -> bool:
        """
        Tell if a row of advantage 0 matters to a gradient: by its KL term, or by entropies that others are compared
        with.
        """
        return self.runs_reference or self.entropy_share < 1

    @property
    def entropy_share(self) -> float:
        """
        Share of the tokens, those of the highest entropy, that the loss trains on. A host with less than 1 has the
        methods `entropies` and `mark_high_entropies`.
        """
        return 1.0


class Trains(Facts):
    """
    Events of the trainer's training, and the sampler that it draws prompts from.

    Attributes:
        composes (`bool`): whether a batch may be put together of several generations, by [`assemble`].
    """

    generation_method: str  # as in [`Generates`]
    composes = False
    _passes_chosen: taps.Undo = staticmethod(lambda: None)  # ends what the run before chose by

    inputs_of, assemble, gathered = batches.inputs_of, batches.assemble, batches.gathered
    gradients_obstacle = gradient_tap.gradients_obstacle

    @contextmanager
    def with_logps(self) -> Iterator[None]:
        """Let a generation for training return the log-probabilities of what it has drawn, always."""
        yield

    def layout(self) -> dict:
        """
        Return the shape of the stream of prompts: the fields of [`Layout`] but for those of a LearnAlignConfig.

        Raises:
            `ValueError`, `RuntimeError`: the prompts of this trainer cannot be chosen, see [`Facts.require`].
        """
        self.require(TRAINS)
        args = self.args
        return {
            "pool_size": len(self.dataset),
            "chunk_prompts": args.generation_batch_size // self.group_size,
            "repeats": args.steps_per_generation * self.trainer.num_iterations,
            "group_size": self.group_size,
            "accumulation": args.gradient_accumulation_steps,
            "read_ahead": 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2),
            "epochs": args.num_train_epochs,
            "shuffle": self.trainer.shuffle_dataset,
            "seed": args.seed,
        }

    def replace_sampler(self, make: Callable[[Dataset | None], Sampler]) -> None:
        """Let `make(dataset)` make the sampler of training from now on; `None` stands for the training dataset."""
        vars(self.trainer)["_get_train_sampler"] = make

    def on_rewards(
        self,
        observer: taps.RewardObserver,
        check: taps.RowCheck | None = None,
        compose: taps.Compose | None = None,
    ) -> taps.Undo:
        """Report every generation for training: [`~trl_learnalign.host.taps.RewardTap`]."""
        return taps.RewardTap(self.trainer, self.generation_method, observer, check, compose).undo

    def choose_passes(self, passes_of: Callable[[int], tuple[int, int]]) -> None:
        """Let `passes_of(batch)` choose `num_iterations`: [`~trl_learnalign.host.taps.choose_passes`]."""
        self._passes_chosen()
        self._passes_chosen = taps.choose_passes(self.trainer, passes_of)

    def forget_rollouts(self) -> None:
        """Forget the rollouts that a run before has left, which a run of the same trainer would train on first."""
        self.trainer._step, self.trainer._buffered_inputs = 0, None

    def tap_gradients(self: Any, dim: int | None, seed: int) -> gradient_tap.GradientTap:
        """Sum the gradients of training by group: [`~trl_learnalign.host.gradient_tap.GradientTap`]."""
        return gradient_tap.GradientTap(self, dim, seed)

    def before_checkpoint(self, write: CheckpointWriter) -> taps.Undo:
        """
        Call `write(directory, is_writer, peers)` on every process whenever a checkpoint is saved, before anything else
        of it is written: `trainer_state.json` comes later, so it can hold a checksum of what was written. The
        directory exists; only processes with `is_writer` write what all have in common. An exception on one process
        ends all.

        Returns:
            a function that ends it.
        """
        trainer = self.trainer

        def save(inner, model, trial, *args, **kwargs):
            number = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
            directory = Path(trainer._get_output_dir(trial=trial), number)
            with Peers(trainer.accelerator) as peers:
                directory.mkdir(parents=True, exist_ok=True)
                write(directory, trainer.args.should_save, peers)
                peers.wait()
            return inner(model, trial, *args, **kwargs)

        return taps.wrap(trainer, "_save_checkpoint", save)

    def on_resume(self, read: Callable[[Path], None]) -> taps.Undo:
        """
        Call `read(directory)` on every process when a run is resumed from the checkpoint in `directory`, before
        training begins.

        Returns:
            a function that ends it.
        """

        def load(inner, checkpoint, *args, **kwargs):
            if checkpoint is not None:
                read(Path(checkpoint))
            return inner(checkpoint, *args, **kwargs)

        return taps.wrap(self.trainer, "_load_optimizer_and_scheduler", load)

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to those whose mean the next entry of the training's log shows."""
        self.trainer._metrics["train"][name].append(value)

    def add_tag(self, tag: str) -> None:
        """Add a tag to the cards that the trainer and PEFT write."""
        self.trainer.model.add_model_tags(tag)
        self.trainer._tag_names = [*self.trainer._tag_names, tag]

    def weights_were_set(self) -> None:
        """Note that the weights were changed by something else than a step: vLLM still holds the old ones."""
        if getattr(self.args, "use_vllm", False):
            self.trainer._last_loaded_step = -1
