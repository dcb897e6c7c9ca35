"""The hidden states of prompts after half of a policy's layers, without the other half and without the head."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..host import Host
from .forwards import Forward, tokens_at_once


_COMPARED = 32  # tokens that the short way is compared with the whole policy on


class _Reached(Exception):
    """The first layer that is not needed was about to run."""


class HalfForward(Forward):
    """
    Mean hidden states of prompts, of shape `(n, hidden size)`, float32.

    The layers run as far as they are needed. The first prompt, or its beginning, goes through the whole policy as
    well: where it does not have the same states there, or where the weights are sharded, so that a forward must not be
    left in the middle, the whole policy always runs, with the last token alone in the head.

    Args:
        host ([`Host`]): of the trainer.
    """

    remedy = "Set `prompt_features=False`, or leave out the longest prompts (`where`)."

    def __init__(self, host: Host):
        super().__init__(host, tokens_at_once(host))
        self._decoder: nn.Module | None
        self._layers: list[nn.Module]
        self._after: nn.Module | None
        self._decoder, self._layers, self._after = (None, [], None) if host.is_sharded else _first_half(host.model)
        self._compared = self._decoder is None

    @property
    def parameters(self) -> int:
        """Number of the parameters that each token meets."""
        layers = self._layers or [self.host.model]
        return sum(parameter.numel() for layer in layers for parameter in layer.parameters())

    def run(self, ids: Sequence[list[int]]) -> np.ndarray:
        """
        Run half of the policy over prompts.

        Raises:
            `ValueError`: a state is not finite.
        """
        device = self.host.accelerator.device
        lengths = torch.tensor([len(prompt) for prompt in ids], device=device)
        # Padded on the right, where causal attention keeps it out whatever a model makes of the mask
        input_ids = pad_sequence([torch.tensor(prompt) for prompt in ids], batch_first=True).to(device)
        mask = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
        if not self._compared:
            if not self._is_the_same(input_ids[:1, : min(_COMPARED, len(ids[0]))]):
                self._decoder, self._layers = None, []
            self._compared = True
        states = (self._whole if self._decoder is None else self._half)(input_ids, mask).float()
        means = ((states * mask[:, :, None]).sum(1) / lengths[:, None]).cpu().numpy()
        if not np.isfinite(means).all():
            raise ValueError(
                "The policy's hidden states of a prompt are NaN or infinite, so success cannot be predicted from "
                "them. Set `prompt_features=False`, or train in a precision in which they are finite."
            )
        return means

    def _is_the_same(self, input_ids):
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        whole = self._whole(input_ids, mask).float()
        try:
            half = self._half(input_ids, mask).float()
        except Exception:  # a model may need anything
            return False
        limit = 1e-2 * whole.abs().mean().item()
        return half.shape == whole.shape and torch.allclose(half, whole, rtol=1e-2, atol=limit)

    def _half(self, input_ids, mask):
        reached = []

        def stop(module, args, kwargs):
            reached.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = self._after.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self.host.accelerator.autocast():
                self._decoder(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return reached[0]

    def _whole(self, input_ids, mask):
        last = last_logits(self.host.model, 1)
        with self.host.accelerator.autocast():
            states = self.host.policy(
                input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False, **last
            ).hidden_states
        return states[len(states) // 2]  # the first of them are the embeddings


def base_of(model: Any) -> Any:
    """Return a model without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def last_logits(model: nn.Module, number: int) -> dict[str, int]:
    """Return the argument by which a model computes its last logits alone, where it has one."""
    parameters = inspect.signature(base_of(model).forward).parameters
    return {"logits_to_keep": number} if "logits_to_keep" in parameters else {}


def layers_of(model: nn.Module) -> tuple[nn.Module | None, list[nn.Module]]:
    """Return the backbone of a causal language model and its layers, none where they do not show."""
    base = base_of(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else getattr(base, "base_model", None)
    number = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    lists = [] if decoder is None else [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
    return decoder, next((list(part) for part in lists if len(part) == number), [])


def _first_half(model) -> tuple[nn.Module | None, list[nn.Module], nn.Module | None]:
    """Return the backbone, its layers that are needed, and the one after them; where they show."""
    decoder, layers = layers_of(model)
    half = (len(layers) + 1) // 2  # of the states, whose first are the embeddings, the one in the middle
    return (decoder, layers[:half], layers[half]) if half < len(layers) else (None, [], None)
