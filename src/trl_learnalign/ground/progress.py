"""Progress of a phase and the time left, in a few lines, for logs that cannot show a bar."""

import time
from collections.abc import Callable

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


_LEAST_SHARE = 0.05  # of the whole between two lines, so there are 20 at most
_LEAST_SECONDS = 30.0


class ProgressLines:
    """
    Stand-in for a tqdm bar: a line after 30 seconds, then one every 5 percent, at least 30 seconds apart. A phase of
    less than 30 seconds prints none.

    Args:
        title (`str`): begins every line.
        total (`int`): number of things to be done.
        unit (`str`): the things counted, in the plural.
        clock (`Callable[[], float]`): seconds from some moment on.
    """

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float] = time.monotonic):
        self.title, self.total, self.unit, self.clock = title, total, unit, clock
        self.done = self._said = 0
        self._then = clock()

    def update(self, number: int = 1) -> None:
        """Count `number` more as done, and print a line if one is due."""
        self.done += number
        now = self.clock()
        new, passed = self.done - self._said, now - self._then
        if (
            passed < _LEAST_SECONDS
            or new < (_LEAST_SHARE * self.total if self._said else 1)
            or self.done >= self.total
        ):
            return
        # By the pace since the last line: parts that an earlier run had finished took no time
        left = duration((self.total - self.done) / new * passed)
        print(
            f"{self.title}: {self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%}), {left} left",
            flush=True,
        )
        self._said, self._then = self.done, now

    def close(self) -> None:
        """Do nothing. The line about the selection says how long its phases took."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def progress_bar(host, phase: str, total: int, unit: str) -> tqdm | ProgressLines:
    """
    Make a progress bar for the main process. If the trainer shows none (`disable_tqdm`), or the output is neither a
    terminal nor a notebook, a few lines are printed instead.
    """
    hidden = host.args.disable_tqdm or not host.accelerator.is_main_process
    if not hidden and not issubclass(tqdm, tqdm_notebook):
        hidden = None  # for tqdm: where its output is no terminal
    title = f"LearnAlign {phase}"
    bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=hidden, leave=False)
    return ProgressLines(title, total, unit) if bar.disable and host.accelerator.is_main_process else bar


def duration(seconds: float) -> str:
    """Format a rough time: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
