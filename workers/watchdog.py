"""Ends a worker that has stopped consuming, so that its supervisor starts it anew.

A Celery worker may come out of a broken connection to Redis alive and deaf: connected, idle, while
messages wait. No exception tells of that, so it is found from outside: by what waits in the queue.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from celery.worker import state

from storage.exits import ExitCode
from workers.limits import is_resting
from workers.shared import Shared

log = logging.getLogger(__name__)

LAST_RESORT_S = 30.0
"""How long the worker may take to end by itself."""
LOOKS = 8
"""Looks within the time that makes a stall."""


class Stall:
    """Whether messages have waited for `stall_s` seconds while this worker had nothing to do."""

    def __init__(
        self, shared: Shared, stall_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shared = shared
        self._stall_s = stall_s
        self._clock = clock
        self._since: float | None = None
        self._accepted = 0

    def look(self) -> bool:
        """Look once; True where the stall is complete. A look that finds work under way, work done
        since the last one, no messages, no Redis or a resting API begins it anew."""
        accepted, self._accepted = self._accepted, state.all_total_count[0]
        idle = accepted == self._accepted and not len(state.reserved_requests)
        if not idle or not self._shared.waiting() or is_resting(self._shared):
            self._since = None
            return False
        if self._since is None:
            self._since = self._clock()
        return self._clock() - self._since >= self._stall_s


def start(shared: Shared, stall_s: float) -> None:
    """Watch this worker from a thread of its first process; 0 does nothing. `shared` names the
    queue that it should consume."""
    if stall_s > 0:
        threading.Thread(
            target=_watch, args=(Stall(shared, stall_s), stall_s), name="watchdog", daemon=True
        ).start()


def _watch(stall: Stall, stall_s: float) -> None:
    while not _ending():
        if stall.look() and not _ending():
            log.error(
                "messages wait and this worker took none for %g s: it ends, to be started anew",
                stall_s,
            )
            # What a SIGTERM sets, save that the exit code says that something was wrong.
            state.should_stop = ExitCode.UNEXPECTED
            time.sleep(LAST_RESORT_S)
            os._exit(ExitCode.UNEXPECTED)
        time.sleep(stall_s / LOOKS)


def _ending() -> bool:
    return state.should_stop is not None or state.should_terminate is not None
