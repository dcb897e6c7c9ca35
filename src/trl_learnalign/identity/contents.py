"""Content of large things: the weights of a model, the numbers of a tensor, a tokenizer, plain containers."""

import hashlib
import json
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_SAMPLE = 64  # numbers of each tensor of a model
_DEEPEST = 50  # containers in containers


def digest_of_tensors(model: nn.Module, chosen: Callable = lambda parameter: True) -> str:
    """
    Hash a model's parameters and persistent buffers for which `chosen` holds: names, types, shapes, and an evenly
    spaced sample of the numbers of each. Quantized weights may be buffers. The numbers are left out where they are
    elsewhere (ZeRO-3, or offloaded to the meta device).
    """
    hashed = hashlib.sha256()
    for name, parameter in (*model.named_parameters(), *_persistent_buffers(model)):
        if chosen(parameter):
            tensor = parameter.detach()
            shape = tuple(getattr(parameter, "ds_shape", tensor.shape))
            hashed.update(repr((name, str(tensor.dtype), shape)).encode())
            if tensor.numel() and tensor.device.type != "meta":
                flat = tensor.reshape(-1)
                hashed.update(tensor_bytes(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]))
    return hashed.hexdigest()


def _persistent_buffers(model) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            if own not in module._non_persistent_buffers_set:
                yield f"{name}.{own}", buffer


def plain_content(value) -> bytes | None:
    """
    Write nested lists, tuples, dicts and sets of plain values as bytes; equal bytes mean equal values. `None` for
    anything else.
    """
    parts: list[str] = []
    return "".join(parts).encode("utf-8", "surrogatepass") if _plain(value, parts.append, 0) else None


def _plain(value, put, depth):
    kind = type(value)
    if kind in ATOMS:
        put(f"{kind.__name__} {value!r},")
        return True
    if kind in (list, tuple, dict):
        put(f"{kind.__name__} {len(value)}(")
        values = value if kind is not dict else (part for pair in value.items() for part in pair)
        return depth < _DEEPEST and all(_plain(part, put, depth + 1) for part in values)
    if kind in (set, frozenset):
        contents = [plain_content(part) for part in value] if depth < _DEEPEST else [None]
        if None in contents:
            return False
        put(f"{kind.__name__} {len(value)}({sorted(contents)!r}")
        return True
    return False


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the numbers of a tensor as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Write all that decides how texts become tokens and back, as JSON; not how the last call padded and cut them."""
    content: object
    try:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: part for name, part in whole.items() if name not in ("padding", "truncation")}
    except AttributeError:  # not a fast one
        content = sorted(tokenizer.get_vocab().items())
    return json.dumps([content, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template])
