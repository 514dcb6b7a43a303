"""Reading that is worked on by several processes at once: Python keeps one core busy and no more.

Each process has a database connection of its own. They end with the one that began them, however
that ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import TypeVar

from sqlalchemy import Connection, Engine

from storage.database import absolute_url, connect, reading

log = logging.getLogger(__name__)

MOST = 8
"""Processes at most: more wait for the database."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_engines: list[Engine] = []
"""The one database, in a process of a crew."""


@contextmanager
def crew(engine: Engine, *, alone: bool = False) -> Iterator[Crew]:
    """A process for each core that this one may use; none but this one where it is to be `alone`,
    or none can be begun. Begin it while no connection is open and no other thread runs."""
    processes = 1 if alone else min(MOST, _cores())
    members = Crew(None)
    if processes > 1:
        engine.dispose()
        members = _begun(processes, absolute_url(engine))
    try:
        yield members
    finally:
        members.end()


def _begun(processes: int, url: str) -> Crew:
    before = set(multiprocessing.active_children())
    pool = None
    try:
        pool = ProcessPoolExecutor(processes, initializer=_begin, initargs=(url,))
        pool.submit(os.getpid).result()  # they begin now
    except (OSError, RuntimeError) as error:
        log.warning("one process alone works on the answers: %s", error or type(error).__name__)
        # The pool knows nothing of those that began before it failed.
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()
        pool = None
    return Crew(pool)


class Crew:
    """Processes that read the same database."""

    def __init__(self, pool: ProcessPoolExecutor | None) -> None:
        self._pool = pool

    def end(self) -> None:
        """End the processes, once they are done with what they do."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(
        self,
        work: Callable[[Connection, Item], Result],
        connection: Connection,
        items: Sequence[Item],
    ) -> Iterator[Result]:
        """What `work` gives of each item, in their order. It is called with the `connection`, or
        in another process with one of its own, so all of it must pickle; where a process is killed
        (for want of memory, say), this one does the rest. Raises what it raises."""
        done = 0
        if self._pool is not None:
            try:
                for result in self._pool.map(partial(_apart, work), items):
                    yield result
                    done += 1
            except BrokenProcessPool as error:
                log.warning("one process alone works on the rest of the answers: %s", error)
        for item in items[done:]:
            yield work(connection, item)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin(url: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who began it is interrupted as well, and tells
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _engines.append(connect(url))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _apart(work: Callable[[Connection, Item], Result], item: Item) -> Result:
    with reading(_engines[0]) as connection:
        return work(connection, item)
