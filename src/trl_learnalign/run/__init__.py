"""The things that a training run keeps: its layout, its checkpoints, its first weights."""
