"""
Per-group gradients of LoRA weights from the backward passes of training itself, which stay what they were.

While a microbatch is watched, the output y of every linear layer with a trainable weight goes through an autograd
function that changes nothing. It saves the layer's input x, which autograd has saved anyway, and in training's own
backward it sees dL/dy, whose product with x is the gradient of each row. The products are added by group, sketched,
and added to the group's sum. Weights, their `grad` and hooks on them are never touched.

    microbatch   row 9  row 2  row 8  row 0     <- a trainer may have shuffled the rows
    group            2      0      2      0     <- their groups: sums of a microbatch are added to those of before
"""

import torch
from torch import nn

from .layers import shortened, trainable_layers
from .sketch import Concatenation, Sketch


class _Watch(torch.autograd.Function):
    """The identity, in whose backward the gradient of a layer's output meets the layer's input."""

    @staticmethod
    def forward(ctx, output, x, name, microbatch):
        ctx.name, ctx.microbatch = name, microbatch
        ctx.save_for_backward(x)  # through hooks on saved tensors, so with gradient checkpointing as well
        return output

    @staticmethod
    def backward(ctx, grad_output):
        ctx.microbatch.add(ctx.name, ctx.saved_tensors[0], grad_output)
        return grad_output, None, None, None


class GroupGradients:
    r"""
    Sums of the gradients of groups, as a trainer's backward passes take them.

        gradients.begin(groups=3)
        for rows in microbatches:
            gradients.watch(groups_of(rows), mask_of(rows))
            loss(rows).backward()
            gradients.rest()
        gradients.sums()

    Args:
        model (`nn.Module`): the policy, as it is run, with a LoRA adapter. Trainable tensors that are no weights of
            linear layers are left out, see [`trainable_layers`].
        dim (`int` or `None`): length of a sketch; `None` for the exact gradient.
        seed (`int`): of the sketch.

    Attributes:
        failure (`str`, *optional*): why the sums are not the gradients, once a backward has shown it.
    """

    def __init__(self, model: nn.Module, dim: int | None, seed: int):
        self._layers, _ = trainable_layers(model)
        sizes = {name: layer.out_features * layer.in_features for name, layer in self._layers.items()}
        self.sink = Concatenation(sizes) if dim is None else Sketch(sizes, dim, seed)
        self.failure: str | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._microbatch: _Microbatch | None = None
        self._checked = False
        self.begin(0)

    def begin(self, groups: int) -> None:
        """Begin new sums, of so many groups."""
        self._groups = groups
        self._sums: dict[torch.device, torch.Tensor] = {}  # by device, as layers may be spread over several

    def sums(self) -> torch.Tensor:
        """Return the sums so far, of shape `(groups, dim)`, float32, on the CPU."""
        whole = torch.zeros(self._groups, self.sink.out_dim)
        for part in self._sums.values():
            whole += part.cpu()
        return whole

    def watch(self, groups: list[int], mask: torch.Tensor, factor: float = 1.0) -> None:
        """
        Watch the forward and the backward that follow.

        Args:
            groups (`list[int]`): of each row of the microbatch, counted from 0.
            mask (`torch.Tensor` of shape `(rows, T)`): 0 for tokens that have no gradient, such as padding, else 1.
            factor (`float`): the gradients are multiplied by it.
        """
        self.rest(keep=False)
        if self.failure is not None:
            return
        self._microbatch = _Microbatch(groups, mask, factor, self.sink)
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(_narrowed))
            self._hooks.append(layer.register_forward_hook(self._watched(name, self._microbatch)))

    def rest(self, keep: bool = True) -> None:
        """Watch no more. The gradients of the microbatch are added to the sums, or left out where not `keep`."""
        for hook in self._hooks:
            hook.remove()
        microbatch, self._hooks, self._microbatch = self._microbatch, [], None
        if microbatch is None or not keep:
            return
        self.failure = microbatch.failure or self.failure
        if not self._checked:
            self._check(microbatch.seen)
        if self.failure is not None:
            return
        for device, part in microbatch.sums.items():
            if device not in self._sums:
                self._sums[device] = torch.zeros(self._groups, self.sink.out_dim, device=device)
            # No group twice, so that the order of additions is always the same
            self._sums[device].index_add_(0, microbatch.groups.to(device), part, alpha=microbatch.factor)

    def _check(self, seen):
        """Compare with what training itself has: a weight may be used without its layer's forward."""
        missed = [name for name, layer in self._layers.items() if name not in seen and layer.weight.grad is not None]
        if missed or not seen:
            self.failure = f"these weights are not used through their layers: {shortened(missed or [*self._layers])}"
        self._checked = True

    @staticmethod
    def _watched(name, microbatch):
        def hook(layer, args, output):
            if torch.is_grad_enabled() and output.requires_grad:
                return _Watch.apply(output, args[0].detach(), name, microbatch)
            return None  # the first forward of a block that is checkpointed with `use_reentrant=True`

        return hook


def _narrowed(layer, args):
    """
    Cast the input of a layer as autocast does inside of `linear`; there it would be too late: what is watched would be
    the wider input, which autograd does not keep.
    """
    x = args[0]
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return (x.to(torch.get_autocast_dtype(kind)), *args[1:])
    return None


class _Microbatch:
    """
    Rows that one backward is taken of, and their gradients.

    Attributes:
        groups: the groups that have rows here, of shape `(k,)`.
        sums: gradients of these groups by device, of shape `(k, dim)` each.
        seen: layers that were heard of.
    """

    def __init__(self, groups: list[int], mask: torch.Tensor, factor: float, sink):
        self.factor, self.sink = factor, sink
        self._rows, self._mask = torch.tensor(groups), mask.cpu().bool()
        # Rows without a gradient, as those of dead groups, are left out
        live = self._mask.any(1)
        self.groups = torch.tensor([*dict.fromkeys(self._rows[live].tolist())], dtype=torch.int64)
        self.sums: dict[torch.device, torch.Tensor] = {}
        self.seen: set[str] = set()
        self.failure: str | None = None
        self._plans: dict[tuple[int, torch.device], _Plan] = {}

    def add(self, name: str, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        """Add the gradients of a layer's weight, from its input and the gradient of its output."""
        self.seen.add(name)
        if self.failure is not None or not len(self.groups):
            return
        rows, tokens = self._mask.shape
        # Flattened as in blocks with experts; the head of a model may get the last tokens alone
        tokens = x.shape[1] if x.dim() == 3 else tokens
        if x.dim() not in (2, 3) or x.shape[:-1].numel() != rows * tokens or x.shape[0] not in (rows, rows * tokens):
            self.failure = (
                f"the layer `{name}` got an input of shape {tuple(x.shape)} for a microbatch of {rows} rows, so its "
                "tokens cannot be assigned to prompts"
            )
            return
        if x.device not in self.sums:
            self.sums[x.device] = torch.zeros(len(self.groups), self.sink.out_dim, device=x.device)
        if (tokens, x.device) not in self._plans:
            self._plans[tokens, x.device] = self._plan(tokens, x.device)
        plan = self._plans[tokens, x.device]
        gradients = plan.gradients(x.flatten(0, -2).to(grad_output.dtype), grad_output.flatten(0, -2))
        self.sink.add_(self.sums[x.device], name, slice(None), gradients.flatten(1))

    def _plan(self, tokens, device):
        mask = self._mask
        if tokens != mask.shape[1]:
            mask = mask.any(1, keepdim=True).expand(-1, tokens)
        flat = torch.arange(mask.numel()).view(mask.shape)
        own = [flat[self._rows == group][mask[self._rows == group]] for group in self.groups]
        return _Plan(own, device)


class _Plan:
    """Sums outer products of tokens by group, from the places of each group's tokens among all of a microbatch."""

    def __init__(self, places: list[torch.Tensor], device: torch.device):
        self._sizes = [len(part) for part in places]
        self._index = torch.cat(places).to(device)

    def gradients(self, x: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        """Return the gradients of the groups, of shape `(k, out, in)`; always the same bits for the same input."""
        found = x.new_empty(len(self._sizes), grad_output.shape[1], x.shape[1])
        parts = (torch.index_select(tensor, 0, self._index).split(self._sizes) for tensor in (x, grad_output))
        for out, own, theirs in zip(found, *parts, strict=True):
            torch.mm(theirs.T, own, out=out)
        return found
