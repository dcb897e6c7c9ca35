"""A digest of the trainable weights, sharded or not."""

import hashlib
from collections.abc import Iterator

import torch
from transformers import Trainer

from ..gradients.layers import clean_name


def weights_digest(trainer: Trainer) -> str:
    """
    Return the SHA-256 of the names, types, shapes and bytes of the trainable weights: the same for any number of
    processes, and for weights that are sharded or not. All processes must call this; the main process gets the digest,
    the others an empty string.
    """
    hashes = {}
    for name, tensor in _trainable(trainer):
        if trainer.accelerator.is_main_process:
            # A copy even on the CPU: FSDP frees the storage, which a NumPy array would hold on to
            content = tensor.detach().to("cpu", copy=True).contiguous().flatten().view(torch.uint8).numpy().data
            hashes[clean_name(name)] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest() if hashes else ""


def _trainable(trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yield one complete tensor after another, in the same order on every process, since all gather each sharded tensor.
    Between forwards ZeRO-3 keeps no numbers in a parameter, FSDP2 those of this process's shard, FSDP1 the same or
    none.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        yield from _of_fsdp1(trainer.model_wrapped)
        return
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        for name, parameter in named:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter
        return
    for name, parameter in named:
        if hasattr(parameter, "full_tensor"):
            # With CPU offload the shards lie where no collective may run
            yield name, parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
        else:
            yield name, parameter


def _of_fsdp1(root):
    from torch.distributed.fsdp import FullyShardedDataParallel

    prefixes = {module: name for name, module in root.named_modules()}
    with FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False):
        pass  # the first unit that is used becomes the root
    for unit in FullyShardedDataParallel.fsdp_modules(root):
        inner = [other for other in FullyShardedDataParallel.fsdp_modules(unit) if other is not unit]
        inner = {parameter for other in inner for parameter in other.parameters()}
        if not any(parameter.requires_grad for parameter in set(unit.parameters()) - inner):
            continue
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for name, parameter in unit.named_parameters():
                if parameter.requires_grad and parameter not in inner:
                    yield f"{prefixes[unit]}.{name}".lstrip("."), parameter  # the root has no name
