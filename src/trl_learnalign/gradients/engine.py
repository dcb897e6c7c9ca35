"""
Per-prompt gradients of LoRA weights from one backward pass.

The forward of every `nn.Linear` that holds a trainable weight is replaced, inside the context, by an autograd
function whose backward computes the weight gradient of each prompt's rows, adds it to a sketch, and returns the input
gradient. `weight.grad` is never written, so neither optimizers nor reduction hooks are affected.

    microbatch   row 0  row 1  row 2 | row 3  row 4 | row 5      <- rows of a prompt are neighbours
    prompts      ------ prompt 0 ----|-- prompt 1 --|- 2 ->      <- a prompt may continue in the next microbatch
"""

import itertools
from collections.abc import Callable

import torch
from torch import nn

from ..ground.hashing import stable_hash
from .layers import UnseenParametersError, clean_name, trainable_layers, unseen_message
from .modes import checkpoints
from .sketch import Concatenation, Sketch


PROBE_RANK = 16


class _Tap:
    """An observed linear layer. With a probe, the gradient is that of a LoRA B = 0 added to the layer."""

    def __init__(self, name: str, module: nn.Linear, probe: torch.Tensor | None):
        self.name = name
        self.module = module
        self.probe = probe
        self.size = module.out_features * (module.in_features if probe is None else len(probe))


class _TappedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, tap, report):
        # `anchor` requires a gradient, so that a wholly frozen model has a graph to walk
        ctx.tap, ctx.report = tap, report
        ctx.save_for_backward(x)
        return nn.functional.linear(x, tap.module.weight, tap.module.bias)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        ctx.report(ctx.tap, x, grad_output)
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad_output @ ctx.tap.module.weight.to(grad_output.dtype)).to(x.dtype)
        return grad_input, None, None, None


class PromptGradients:
    r"""
    Context manager that collects per-prompt gradients of a model's trainable linear weights.

    Args:
        model (`nn.Module`):
            A PEFT model: the weights of its active LoRA adapters are observed. With `probe=True` any model: every
            linear layer but the output head is observed through a virtual LoRA adapter of rank 16 whose A is random
            and whose B is zero; only B has a gradient then. Nothing is added to the model.
        dim (`int` or `None`): length of a feature; `None` for the exact gradient.
        seed (`int`): seed of the projection and of the probe.
        probe (`bool`): see `model`.

    Attributes:
        sizes (`dict[str, int]`): observed weights of each layer, in their order.

    Raises:
        [`UnseenParametersError`]: the model has trainable tensors that this engine cannot observe.
    """

    def __init__(self, model: nn.Module, dim: int | None, seed: int, probe: bool = False):
        self.model = model
        self.probe = probe
        self._taps = _probe_taps(model, seed) if probe else _lora_taps(model)
        self.sizes = {tap.name: tap.size for tap in self._taps}
        self._sink = Concatenation(self.sizes) if dim is None else Sketch(self.sizes, dim, seed)
        # By device, since the layers may be spread over several, and offloaded weights lie elsewhere than their
        # gradients
        self._anchors: dict[torch.device, torch.Tensor] = {}
        self._rows_per_prompt: list[int] = []
        self._num_tokens = 0
        self._out: dict[torch.device, torch.Tensor] = {}
        self._seen: set[str] = set()
        self._checked = False

    @property
    def feature_dim(self) -> int:
        """Length of a feature: `dim`, or the number of observed weights in exact mode."""
        return self._sink.out_dim

    def __enter__(self):
        self._restore = []
        self._forwards = [vars(tap.module).get("forward") for tap in self._taps]  # somebody else's patch, if any
        for tap in self._taps:
            tap.module.forward = self._tapped_forward(tap)
        if self.probe:
            self._restore = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            for parameter in self._restore:
                parameter.requires_grad_(False)
        self._hook = None
        if self.probe and any(map(checkpoints, self.model.modules())):
            # Reentrant checkpointing drops the graph of a block none of whose inputs requires a gradient
            embeddings = self.model.get_input_embeddings()
            self._hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        return self

    def __exit__(self, *exc):
        for tap, forward in zip(self._taps, self._forwards, strict=True):
            del tap.module.forward
            if forward is not None:
                tap.module.forward = forward
        for parameter in self._restore:
            parameter.requires_grad_(True)
        if self._hook is not None:
            self._hook.remove()

    def collect(
        self, rows_per_prompt: list[int], num_tokens: int, objective: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """
        Run one forward and backward, and return a feature per prompt.

        Args:
            rows_per_prompt (`list[int]`): how many neighbouring rows of the microbatch belong to each of P prompts.
            num_tokens (`int`): length of a row with its padding.
            objective (`Callable`): returns the scalar to differentiate, a sum of terms of one row each.

        Returns:
            `torch.Tensor` of shape `(P, feature_dim)`, float32: the (projected) gradient of each prompt's rows. On the
            device of the layers; on the CPU if there are several.
        """
        self._rows_per_prompt, self._num_tokens = rows_per_prompt, num_tokens
        self._out = {}
        try:
            if self._checked:
                objective().backward()
            else:
                self._checked_backward(objective)
            if len(self._out) == 1:
                return next(iter(self._out.values()))
            return sum((out.cpu() for out in self._out.values()), torch.zeros(len(rows_per_prompt), self.feature_dim))
        finally:
            self._rows_per_prompt, self._out = [], {}

    def _tapped_forward(self, tap):
        def forward(x):
            kind = x.device.type
            if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
                # As autocast does inside of `linear`; there it would be too late, the wider x being saved already
                x = x.to(torch.get_autocast_dtype(kind))
            if x.device not in self._anchors:
                self._anchors[x.device] = torch.zeros((), device=x.device, requires_grad=True)
            return _TappedLinear.apply(x, self._anchors[x.device], tap, self._report)

        return forward

    def _report(self, tap, x, grad_output):
        num_rows = sum(self._rows_per_prompt)
        x = x.to(grad_output.dtype)
        if x.dim() == 2 and x.shape[0] == num_rows * self._num_tokens:  # flattened, as in blocks with experts
            x, grad_output = x.unflatten(0, (num_rows, -1)), grad_output.unflatten(0, (num_rows, -1))
        if x.dim() != 3 or x.shape[0] != num_rows:
            raise RuntimeError(
                f"The layer `{tap.name}` got an input of shape {tuple(x.shape)} for a microbatch of {num_rows} rows, "
                "so its tokens cannot be assigned to prompts (routed experts mix them). Leave the layer out of the "
                "adapter's `target_modules`, or use `score='learnability'`, which takes no gradients."
            )
        if tap.probe is not None:
            tap.probe = tap.probe.to(x.device)
            x = x @ tap.probe.to(x.dtype).T
        counts = self._rows_per_prompt
        if x.device not in self._out:
            self._out[x.device] = torch.zeros(len(counts), self.feature_dim, device=x.device)
        out = self._out[x.device]
        first = start = 0
        for count, run in itertools.groupby(counts):  # neighbouring prompts with equally many rows at once
            prompts = len(list(run))
            rows = slice(start, start + prompts * count)
            inputs, outputs = (part[rows].reshape(prompts, -1, part.shape[2]) for part in (x, grad_output))
            gradients = torch.bmm(outputs.transpose(1, 2), inputs)
            self._sink.add_(out, tap.name, slice(first, first + prompts), gradients.flatten(1))
            first, start = first + prompts, rows.stop
        self._seen.add(tap.name)

    def _checked_backward(self, objective):
        """Run the first backward, after which a weight that was not used by its layer's forward has a `.grad`."""
        without = {name: parameter for name, parameter in self.model.named_parameters() if parameter.grad is None}
        objective().backward()
        missed = [name for name, parameter in without.items() if parameter.grad is not None]
        for name in missed:
            without[name].grad = None
        if missed or not self._seen:
            raise UnseenParametersError(unseen_message(missed or [tap.name for tap in self._taps]))
        self._checked = True


def check_parameters(model: nn.Module, probe: bool) -> None:
    """Raise the [`UnseenParametersError`] that [`PromptGradients`] would, without building anything."""
    _probe_layers(model) if probe else _lora_taps(model)


def _lora_taps(model) -> list[_Tap]:
    layers, unseen = trainable_layers(model)
    if unseen or not layers:
        raise UnseenParametersError(unseen_message(unseen))
    return [_Tap(name, module, None) for name, module in layers.items()]


def _probe_layers(model) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    layers = {
        clean_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        raise UnseenParametersError(
            f"{type(model).__name__} has no LoRA adapter and no `nn.Linear` layer to put a probe on, so no gradients "
            "can be taken. Pass a `peft_config` to the trainer, or use `score='learnability'`."
        )
    return layers


def _probe_taps(model, seed) -> list[_Tap]:
    taps = []
    for name, module in _probe_layers(model).items():
        generator = torch.Generator().manual_seed(stable_hash("probe", seed, name))
        bound = module.in_features**-0.5  # the range of PEFT's initial A
        probe = torch.empty(PROBE_RANK, module.in_features).uniform_(-bound, bound, generator=generator)
        taps.append(_Tap(name, module, probe))
    return taps
