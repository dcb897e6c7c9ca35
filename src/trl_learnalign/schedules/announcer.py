"""What a run says to people: its plan, estimates and warnings, its report, and where that lies."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Describes, Schedule, Selects


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..host import Host


logger = logging.getLogger(__name__)


class Announcer:
    """
    Speaks for a schedule, on the main process.

    Args:
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of its sampler.
        schedule ([`Schedule`]): of the run that begins.
    """

    def __init__(self, host: "Host", config: "LearnAlignConfig", schedule: Schedule):
        self.host, self.config, self.schedule = host, config, schedule
        self._describes = schedule if isinstance(schedule, Describes) else None
        self._since = 0, time.perf_counter()  # the step that time is counted from, and when it was

    @property
    def directory(self) -> Path:
        """`OUTPUT_DIR/learnalign`."""
        return Path(self.host.args.output_dir) / "learnalign"

    def plan(self, step: int, max_steps: int, due: bool) -> list[str]:
        """Returns the lines of the plan; see [`Describes.plan`]."""
        if self._describes is None:
            name = type(self.schedule).__name__
            return [f"steps {step + 1} to {max_steps} train on the prompts that {name} chooses."]
        return self._describes.plan(step, max_steps, due)

    def begin(self, lines: list[str], step: int, max_steps: int) -> None:
        """Prints a plan, and warns of what is odd in a new run."""
        if not self.host.accelerator.is_main_process:
            return
        for line in lines:
            print(f"LearnAlign plan: {line}", flush=True)
        warning = self._describes.warning(max_steps) if self._describes is not None else None
        if warning is not None and step == 0:
            logger.warning(warning)

    def count_from(self, step: int) -> None:
        """Notes that training goes on now, after a step."""
        self._since = step, time.perf_counter()

    def estimate(self, step: int) -> None:
        """Prints how long the selection after a step may take."""
        if self._describes is None:
            return
        since, then = self._since
        line = self._describes.estimate(step, since, time.perf_counter() - then)
        if line is not None and self.host.accelerator.is_main_process:
            print(line, flush=True)

    def report(self) -> None:
        """
        Writes the report, unless every selection writes it. A failure to write it does not end the run.
        """
        if not self.config.write_report or isinstance(self.schedule, Selects):
            return
        try:
            self.write_report()
        except Exception as error:
            logger.warning(f"The report of the schedule could not be written ({error!r}). Training goes on.")

    def write_report(self) -> Path | None:
        """Writes the report. Returns its file, on the main process, where there is something to report."""
        return None if self._describes is None else self._describes.report(self.host, self.directory)

    def summary(self) -> list[str]:
        """Returns sentences about the run, for a model card."""
        return [] if self._describes is None else list(self._describes.summary())

    def end(self) -> None:
        """Prints what came of the run."""
        if self.host.accelerator.is_main_process:
            lines, page = self.summary(), self.directory / "report.html"
            if lines and page.is_file():
                lines.append(f"What was chosen and why: {page}")
            for line in lines:
                print(f"LearnAlign: {line}", flush=True)
