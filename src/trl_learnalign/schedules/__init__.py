"""Schedules, which decide which prompt is trained on when."""

from .base import Schedule
from .online import OnlineSchedule
from .staged import StagedSchedule


# By the name that `LearnAlignConfig(schedule=...)` has for them
SCHEDULES: dict[str, type[Schedule]] = {"staged": StagedSchedule, "online": OnlineSchedule}

__all__ = ["SCHEDULES", "OnlineSchedule", "Schedule", "StagedSchedule"]
