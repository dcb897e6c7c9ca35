"""Measures: what can be found out about prompts, one module each, behind the interface in `base`."""

from .base import Context, Finding, Measure
from .registry import MEASURES


__all__ = ["MEASURES", "Context", "Finding", "Measure"]
