"""Loaded by every Python whose clock libfaketime fakes: it lets none sleep until a moment of the
monotonic clock, which is how `time.sleep` does it, and answers EINVAL."""

import select
import time


def sleep(seconds: float) -> None:
    """As `time.sleep`, for a span that no clock is needed to end."""
    select.select([], [], [], seconds)


time.sleep = sleep
