"""Train and eval mode of the modules of a policy: dropout off for a while, and no other module touched."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


# transformers 6 renames the first into the second
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def checkpoints(module: nn.Module) -> bool:
    """Tell whether a module computes activations again in the backward pass, for which it must be in train mode."""
    return any(getattr(module, name, False) is True for name in _CHECKPOINTING)


def turn_dropout_off(model: nn.Module) -> None:
    """
    Put every module in eval mode, but not the root, off which TRL reads its own mode; not modules that checkpoint
    activations, which need train mode for it; and not layers that only multiply by a weight: they drop nothing, and
    quantized ones may pack their weight for good in eval mode, and have no gradient then.
    """
    _to_eval(model, but=checkpoints)
    model.training = True


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """
    Call [`turn_dropout_off`], and put all modes back on exit. Meanwhile `nn.functional.dropout` does nothing: layers
    that checkpoint activations stay in train mode, and some (OPT's, for one) call it themselves.
    """
    # For the whole process: the backward of a checkpointed layer runs its forward again in a thread of autograd,
    # where a mode of this thread, such as a `TorchFunctionMode`, would not hold
    dropout = nn.functional.dropout
    with _restored(model):
        turn_dropout_off(model)
        nn.functional.dropout = lambda input, p=0.5, training=True, inplace=False: input
        try:
            yield
        finally:
            nn.functional.dropout = dropout


@contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """
    Put every module in eval mode but layers that only multiply by a weight, see [`turn_dropout_off`], and put all
    modes back on exit.
    """
    with _restored(model):
        _to_eval(model)
        yield


@contextmanager
def _restored(model):
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _to_eval(model, but=lambda module: False):
    for module in model.modules():
        if not _only_multiplies(module):
            module.training = but(module)


def _only_multiplies(module) -> bool:
    """Recognise a linear layer, or a quantized one: a leaf with a matrix of packed numbers."""
    if isinstance(module, nn.Linear):
        return True
    own = [one for one in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if one.dim() > 1]
    packed = any(not one.dtype.is_floating_point or one.dtype.itemsize == 1 for one in own)
    return packed and not any(module.children())
