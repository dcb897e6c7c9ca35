"""Schedules, which decide which prompt is trained on when."""

from .base import Describes, LearnsFromGradients, Prepares, Run, Schedule, Selects, Ticks
from .online import OnlineSchedule
from .published import PUBLISHED
from .staged import StagedSchedule


# Schedules by the name that `LearnAlignConfig(schedule=...)` has for them
SCHEDULES: dict[str, type[Schedule]] = {"staged": StagedSchedule, "online": OnlineSchedule, **PUBLISHED}

__all__ = [
    "PUBLISHED",
    "SCHEDULES",
    "Describes",
    "LearnsFromGradients",
    "OnlineSchedule",
    "Prepares",
    "Run",
    "Schedule",
    "Selects",
    "StagedSchedule",
    "Ticks",
]
