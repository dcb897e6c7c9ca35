"""The linear layers with trainable weights, such as LoRA's, and trainable tensors that are no such weights."""

from torch import nn


_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


class UnseenParametersError(ValueError):
    """Trainable tensors whose gradient would be missed."""


def clean_name(name: str) -> str:
    """Return the name of a module or parameter without the names of modules wrapped around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def trainable_layers(model: nn.Module) -> tuple[dict[str, nn.Linear], list[str]]:
    """Return the linear layers whose weight is trainable, by name, and the names of all other trainable tensors."""
    layers, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            layers[clean_name(name)] = module
            seen.add(id(module.weight))
    return layers, [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in seen]


def unseen_message(names: list[str]) -> str:
    """Write the message of an [`UnseenParametersError`] about these tensors."""
    if not names:
        return (
            "The model has no trainable parameter, so no gradients can be taken. Check that the adapter is active and "
            "not in inference mode."
        )
    return (
        "Per-prompt gradients cover the weights of linear layers, such as LoRA's A and B, but these trainable "
        f"tensors would be missed: {shortened(names)}. Train without them (no `use_dora`, `bias`, `modules_to_save`, "
        "`target_parameters` or LoRA on embeddings), or use `score='learnability'`, which takes no gradients."
    )


def shortened(names: list[str]) -> str:
    """List the first names of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
