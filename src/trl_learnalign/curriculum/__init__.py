"""
Chooses every prompt from the rewards of training so far. NumPy alone: no PyTorch, no TRL.

A training loop asks [`OnlineCurriculum`] for draws, hands finished groups back, in any order, and tells how many
optimizer steps it took.
"""

from .events import Draw, Gradient, Group
from .features import make_features
from .online import OnlineCurriculum
from .settings import OnlineSettings
from .states import pack, unpack


__all__ = ["Draw", "Gradient", "Group", "OnlineCurriculum", "OnlineSettings", "make_features", "pack", "unpack"]
