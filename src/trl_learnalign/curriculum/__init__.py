"""Chooses every prompt from the rewards of training so far. NumPy alone: no PyTorch, no TRL."""
