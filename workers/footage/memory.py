"""How much memory one file may take: a few kilobytes of a hostile one ask for gigabytes."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIMITS = resource.getrlimit(resource.RLIMIT_DATA)
_lock = threading.Lock()
_bounds: list[int] = []


@contextmanager
def bounded_memory(most: int) -> Iterator[None]:
    """Lets this process take `most` bytes more and then fail to allocate.

    Linux alone counts what libraries map; elsewhere nothing is limited. The limit is of all threads
    of the process: where several bounds overlap, in whatever order they end, the highest holds.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    bound = int(fields["VmData"].split()[0]) * 1024 + most
    with _lock:
        _bounds.append(bound)
        _limit()
    try:
        yield
    finally:
        with _lock:
            _bounds.remove(bound)
            _limit()


def _limit() -> None:
    soft, hard = _LIMITS
    if _bounds and (soft == resource.RLIM_INFINITY or max(_bounds) < soft):
        soft = max(_bounds)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
