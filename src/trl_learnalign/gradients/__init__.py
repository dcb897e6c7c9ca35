"""Per-prompt LoRA gradients, in PyTorch alone."""
