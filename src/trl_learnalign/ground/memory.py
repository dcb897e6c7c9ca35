"""Work that is done in halves where the memory of a device is full."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


T = TypeVar("T")


def attempt(run: Callable[[], T], refuse: Callable[[Exception], Exception] | None = None) -> T | None:
    """
    Return what `run()` returns; `None` where memory is full, with the caches of the device cleared.

    Args:
        run (`Callable[[], T]`): the work.
        refuse (`Callable[[Exception], Exception]`, *optional*): makes the error to raise instead of `None`, for work
            that cannot be done in smaller parts.
    """
    try:
        return run()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if refuse is not None:
            raise refuse(error) from error
    # Outside of the handler, whose traceback keeps the tensors of the failed attempt
    clear_device_cache(garbage_collection=True)
    return None


def in_halves(
    rows: Sequence,
    run: Callable[[Sequence], T],
    join: Callable[[T, T], T],
    too_large: Callable[[Sequence, Exception], Exception],
    *,
    fits: Callable[[Sequence], bool] = lambda rows: True,
    whole: bool = False,
    failed: Callable[[Sequence], None] = lambda rows: None,
) -> T:
    """
    Run over rows at once; where memory is full over both halves, one after the other, and so on.

    Args:
        rows (`Sequence`): at least one.
        run (`Callable`): the work on some of the rows. Does not return `None`.
        join (`Callable`): makes one result of those of two halves.
        too_large (`Callable`): makes the error for rows that cannot be halved.
        fits (`Callable`, *optional*): tells which rows are worth an attempt.
        whole (`bool`, *optional*): whether rows must not be halved, as other processes take part in the work.
        failed (`Callable`, *optional*): is told of rows that did not fit, before they are halved.
    """
    alone = whole or len(rows) == 1
    if alone or fits(rows):
        found = attempt(lambda: run(rows), (lambda error: too_large(rows, error)) if alone else None)
        if found is not None:
            return found
        failed(rows)
    half = len(rows) // 2
    first, second = (
        in_halves(part, run, join, too_large, fits=fits, failed=failed) for part in (rows[:half], rows[half:])
    )
    return join(first, second)
