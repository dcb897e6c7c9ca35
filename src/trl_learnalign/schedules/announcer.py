"""Announcements of a run: its plan, estimates, warnings and report."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Describes
from .stream import Stream


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..host import Host


logger = logging.getLogger(__name__)


class Announcer:
    """
    Speaks for the schedule of a run, on the main process.

    Args:
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of its sampler.
        stream ([`Stream`]): of the run that begins.
    """

    def __init__(self, host: "Host", config: "LearnAlignConfig", stream: Stream):
        self.host, self.config, self.stream = host, config, stream
        self._since = 0, time.perf_counter()  # the step that time is counted from, and when it was
        self._begun = False  # before, a schedule has not seen its trainer
        self._reported: int | None = None  # the step of the last report

    @property
    def directory(self) -> Path:
        """`OUTPUT_DIR/learnalign`."""
        return Path(self.host.args.output_dir) / "learnalign"

    @property
    def describes(self) -> Describes:
        """The schedule, as far as it says something."""
        return self.stream.describes

    def plan(self, step: int, max_steps: int, due: bool) -> list[str]:
        """Return the lines of the plan; see [`Describes.plan`]."""
        name = type(self.stream.schedule).__name__
        by_default = [f"steps {step + 1} to {max_steps} train on the prompts that {name} chooses."]
        return self.describes.plan(step, max_steps, due) or by_default

    def begin(self, lines: list[str], warning: str | None = None) -> None:
        """Print the lines of a plan, and a warning."""
        self._begun = True
        if not self.host.accelerator.is_main_process:
            return
        for line in lines:
            print(f"LearnAlign plan: {line}", flush=True)
        if warning is not None:
            logger.warning(warning)

    def count_from(self, step: int) -> None:
        """Begin to measure the time of training, after a step."""
        self._since = step, time.perf_counter()

    def estimate(self, step: int) -> None:
        """Print how long the selection after a step may take."""
        since, then = self._since
        line = self.describes.estimate(step, since, time.perf_counter() - then)
        if line is not None and self.host.accelerator.is_main_process:
            print(line, flush=True)

    def report(self) -> None:
        """Write the report, once for a step. A failure to write the report does not end the run."""
        step = self.host.trainer.state.global_step
        # A selection writes the report when it is made, to which training adds reviews alone
        made = self.stream.selects is not None and self.config.review_every is None
        if not self.config.write_report or made or step == self._reported:
            return
        self._reported = step
        try:
            self.write_report()
        except Exception as error:
            logger.warning(f"The report of the schedule could not be written ({error!r}). Training goes on.")

    def write_report(self) -> Path | None:
        """Write the report. Return its file, on the main process, where there is something to report."""
        return self.describes.report(self.host, self.directory) if self._begun else None

    def summary(self) -> list[str]:
        """Return sentences about the run, for a model card."""
        return list(self.describes.summary()) if self._begun else []

    def end(self) -> None:
        """Print the summary of the run, and the path of its report."""
        if self.host.accelerator.is_main_process:
            lines, page = self.summary(), self.directory / "report.html"
            if lines and page.is_file():
                lines.append(f"What was chosen and why: {page}")
            for line in lines:
                print(f"LearnAlign: {line}", flush=True)
