"""Digests of large things: the weights of a model, what a tokenizer does, an array."""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


_SAMPLE = 64  # numbers of each tensor of a model


def digest_of_tensors(model: nn.Module, chosen: Callable = lambda parameter: True) -> str:
    """
    Of a model's parameters for which `chosen` holds: names, types, shapes, and a sample of the numbers of each, evenly
    spaced. Of those whose numbers are elsewhere (ZeRO-3, or offloaded to the meta device) the rest alone.
    """
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if chosen(parameter):
            tensor = parameter.detach()
            shape = tuple(getattr(parameter, "ds_shape", tensor.shape))
            hashed.update(repr((name, str(tensor.dtype), shape)).encode())
            if tensor.numel() and tensor.device.type != "meta":
                flat = tensor.reshape(-1)
                hashed.update(tensor_bytes(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]))
    return hashed.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Its numbers."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes tokens of texts and texts of tokens, as JSON; not how the last call padded and cut them."""
    try:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: part for name, part in whole.items() if name not in ("padding", "truncation")}
    except AttributeError:  # not a fast one
        content = sorted(tokenizer.get_vocab().items())
    return json.dumps([content, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template])
