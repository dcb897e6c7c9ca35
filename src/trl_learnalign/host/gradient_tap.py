"""The gradients that training takes, by group: which rows a microbatch has, and when its backward begins and ends."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..gradients.layers import shortened, trainable_layers
from ..gradients.training import GroupGradients
from .names import DIFFERENTIATES
from .taps import for_training, wrap


if TYPE_CHECKING:
    from .trl import Host

_MOST = 1 << 24  # weights of a layer: a gradient of it for each group of a microbatch is in the memory at once
ROW = "learnalign_row"  # key of a trainer's batches: place of each row in the chunk, over all processes


def gradients_obstacle(host: "Host") -> str | None:
    """Return why the gradients of a trainer's own backward passes cannot be watched; `None` if nothing is known."""
    model = host.policy
    if not host.plays(DIFFERENTIATES):
        return f"the host of {type(host.trainer).__name__} does not know its gradients"
    if not host.has_adapter:
        return "the whole model is trained, and not a LoRA adapter (`peft_config`)"
    # `accelerate launch --dynamo_backend` compiles the wrapper; it would compile again for every microbatch
    if host.args.torch_compile or any(map(_is_compiled, host.trainer.model_wrapped.modules())):
        return "the model is compiled, and its layers are not called one by one"
    if host.args.n_gpu > 1:
        return "one process trains on several GPUs (DataParallel); start one process for each"
    adapters = getattr(host.model, "peft_config", {}).values()
    parameters = [getattr(adapter, "target_parameters", None) for adapter in adapters]
    if any(parameters):
        return f"the adapter has `target_parameters`, which are used without a layer: {parameters}"
    layers, unseen = trainable_layers(model)
    if unseen:
        return f"these trainable tensors are no weights of linear layers: {shortened(unseen)}"
    large = [name for name, layer in layers.items() if layer.in_features * layer.out_features > _MOST]
    if large:
        return f"a gradient of these layers for each group would fill the memory: {shortened(large)}"
    return None if layers else "no linear layer is trained"


def _is_known(host: "Host") -> bool:
    """Tell if the loss is one of which padding has no part."""
    try:
        host.check_gradients()
    except (ValueError, RuntimeError):
        return False
    # Older versions of TRL take the mean of this one over the padding, too
    return getattr(host.trainer, "loss_type", None) != "luspo"


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class GradientTap:
    """
    Sums the gradients of the groups of a chunk while a trainer trains on it. A trainer shuffles the rows of a chunk
    and cuts them into microbatches, so each row carries its place in the chunk. Only the first gradient of a row
    counts where a chunk is trained on several times (`num_iterations`).

    Args:
        host ([`Host`]): the trainer, without an [obstacle][gradients_obstacle]; wrapped until [`~GradientTap.undo`].
        dim (`int`, *optional*): length of a sketch; `None` for exact gradients.
        seed (`int`): of the sketch.

    Attributes:
        failure (`str`, *optional*): why there are no gradients, once training has shown it.
    """

    def __init__(self, host: "Host", dim: int | None, seed: int):
        self.trainer, self.group_size = host.trainer, host.group_size
        self._processes, self._rank = host.accelerator.num_processes, host.accelerator.process_index
        self.gradients = GroupGradients(host.policy, dim, seed)
        self._host, self._known_loss = host, _is_known(host)
        self._missing: str | None = None
        self._begun = 0  # chunks since the generation began
        self._rows = range(0)  # places in the chunk of this process's rows
        self._came = np.zeros(0, bool)  # of these rows, those whose gradient was taken
        self._counts = np.zeros(0, np.int64)  # by group: rows whose gradient is in the sums
        self._watched: list[int] = []  # places of the rows of the microbatch under way
        self._in_step = False
        methods: dict[str, Callable] = {
            host.generation_method: self._generate,
            "training_step": self._train,
            "compute_loss": self._loss,
        }
        self._undos = [wrap(self.trainer, name, around) for name, around in methods.items()]

    def undo(self) -> None:
        """Watch nothing any more."""
        self.gradients.rest(keep=False)
        for one in self._undos:
            one()

    @property
    def failure(self) -> str | None:
        return self._missing or self.gradients.failure

    @property
    def begun(self) -> bool:
        """Tell if a chunk was begun."""
        return bool(self._rows)

    def begin(self, groups: int) -> None:
        """Begin a chunk of so many groups, over all processes; in its generation, when its rewards are known."""
        own = groups * self.group_size // self._processes
        self._begun += 1
        self._rows = range(self._rank * own, (self._rank + 1) * own)
        self._came = np.zeros(own, bool)
        self._counts = np.zeros(groups, np.int64)
        self.gradients.begin(len(self._own_groups))

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Return what this process has added since the last call, or since the chunk began: its part of the gradients
        of the groups, `(groups, dim)`, float32; and the number of rows in it, `(groups,)`.
        """
        groups, counts = self._own_groups, self._counts
        sums = np.zeros((len(counts), self.gradients.sink.out_dim), np.float32)
        sums[groups.start : groups.stop] = self.gradients.sums().numpy()
        self._counts = np.zeros_like(counts)
        self.gradients.begin(len(groups))
        return sums, counts

    @property
    def _own_groups(self) -> range:
        """The groups that have rows on this process, of which the first and the last may be on others as well."""
        rows, size = self._rows, self.group_size
        return range(rows.start // size, -(-rows.stop // size)) if rows else range(0)

    def _generate(self, inner, inputs, *args, **kwargs):
        training = for_training(self.trainer)  # asked before the generation, as in `RewardTap`
        if not training:
            return inner(inputs, *args, **kwargs)
        self._begun = 0
        output = inner(inputs, *args, **kwargs)
        if self._begun == 1 and len(output["completion_mask"]) == len(self._rows):
            output[ROW] = torch.arange(self._rows.start, self._rows.stop)
        else:
            self._missing = "the trainer trains on other completions than were rewarded"
        return output

    def _train(self, inner, *args, **kwargs):
        self._in_step, self._watched = True, []
        try:
            output = inner(*args, **kwargs)
        except BaseException:
            self.gradients.rest(keep=False)
            raise
        finally:
            self._in_step = False
        self.gradients.rest()
        if self.failure is None:
            places = np.array(self._watched, np.int64)
            self._came[places - self._rows.start] = True
            np.add.at(self._counts, places // self.group_size, 1)
        return output

    def _loss(self, inner, model, inputs, *args, **kwargs):
        if self._in_step and self.failure is None:
            self._watch(inputs)
        return inner(model, inputs, *args, **kwargs)

    def _watch(self, inputs):
        if ROW not in inputs:
            if self._begun:  # else a batch of a run before
                self._missing = "the trainer's batches do not keep the numbers of their rows"
            return
        places = inputs[ROW].tolist()
        if not self._begun or not all(place in self._rows for place in places):
            return
        if self._watched or self._came[np.array(places) - self._rows.start].any():
            return
        self._watched, first = places, self._own_groups.start
        scaler = self.trainer.accelerator.scaler  # of float16
        scale = 1.0 if scaler is None else scaler.get_scale()
        groups = [place // self.group_size - first for place in places]
        # Training takes the mean over the processes
        self.gradients.watch(groups, self._with_gradient(inputs), 1 / (scale * self._processes))

    def _with_gradient(self, inputs) -> torch.Tensor:
        """Return a mask of the tokens that may have a gradient, `(rows, T)`; all, unless the loss is known well."""
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
        if not self._known_loss:
            return torch.ones_like(mask)
        advantages = inputs.get("advantages")
        if advantages is None or not self._host.needs_advantage:
            return mask
        return mask & (advantages.view(len(mask), -1) != 0).any(1, keepdim=True)
