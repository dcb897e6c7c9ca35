"""
What test_gradients.py starts: a whole selection with a model whose layers are on two devices, the second of them made
up.
"""

import sys
from pathlib import Path

import torch
from tiny import config, lora, make_model, make_trainer
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from trl_learnalign import select_prompts


MOVES = (torch.ops.aten._copy_from.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Other(torch.Tensor):
    """
    A tensor of the device `other`: what it holds is on the CPU, and computed there, if all tensors are of `other`.
    """

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("other:0"), **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, *args, **(kwargs or {}))


def compute(op, *args, **kwargs):
    values, spec = tree_flatten((args, kwargs))
    for value in values:
        if isinstance(value, torch.Tensor) and not isinstance(value, Other) and value.dim() and op not in MOVES:
            raise RuntimeError(f"{op} got tensors of two devices")
        if value is torch.float64 or (isinstance(value, torch.Tensor) and value.dtype == torch.float64):
            raise TypeError(f"{op}: the device has no float64")  # as MPS
    ours = {id(value.held): value for value in values if isinstance(value, Other)}
    there = [
        getattr(value, "held", torch.device("cpu") if isinstance(value, torch.device) else value) for value in values
    ]
    args, changed = tree_unflatten(there, spec)
    result = op(*args, **changed)
    if op is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
        return result

    def made(out):
        return (ours[id(out)] if id(out) in ours else Other(out)) if isinstance(out, torch.Tensor) else out

    return tree_map(made, result)


def spread(model):
    """Put layers on two devices, as `device_map="auto"` does, and take hidden states along."""

    def follow(device):
        def move(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return lambda module, args, kwargs: tree_map(move, (args, kwargs))

    model.model.layers[1].to("other")
    model.model.layers[1].register_forward_pre_hook(follow("other"), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(follow("cpu"), with_kwargs=True)
    model.hf_device_map = {"model": "cpu", "model.layers.1": "other:0"}
    return model


def main(path):
    _setup_privateuseone_for_python_backend("other")
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, dispatch_key="PrivateUse1")
    for peft in (lora(), False):
        tables = []
        for where in (lambda model: model, spread):
            model = where(make_model())  # which seeds the adapter, too
            run = f"{path}/{'lora' if peft else 'probe'}-{len(tables)}"
            trainer = make_trainer(run, model=model, peft=peft, generation_kwargs={"use_cache": False})
            tables.append(select_prompts(trainer, config(projection_dim=512)).to_pandas())
        assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cpu", "other"}
        expected, ours = (table[["success_rate", "alignment", "gradient_norm"]].to_numpy(float) for table in tables)
        torch.testing.assert_close(*map(torch.tensor, (ours, expected)), rtol=1e-4, atol=1e-6, equal_nan=True)
    Path(path, "done").touch()


if __name__ == "__main__":
    main(sys.argv[1])
