"""Reading that is worked on by several processes at once: Python keeps one core busy and no more.

Each process has a database connection of its own. They end with the one that began them, however
that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import TypeVar

from sqlalchemy import Connection, Engine

from storage.database import absolute_url, connect, reading

MOST = 8
"""Processes at most: more wait for the database."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_engines: list[Engine] = []
"""The one database, in a process of a crew."""


@contextmanager
def crew(engine: Engine, *, alone: bool = False) -> Iterator[Crew]:
    """A process for each core that this one may use, or none but this one. Begin it while no
    connection is open and no other thread runs."""
    processes = 1 if alone else min(MOST, _cores())
    if processes == 1:
        yield Crew(None)
        return
    engine.dispose()
    pool = ProcessPoolExecutor(processes, initializer=_begin, initargs=(absolute_url(engine),))
    try:
        pool.submit(os.getpid)  # they begin now
        yield Crew(pool)
    finally:
        pool.shutdown(cancel_futures=True)


class Crew:
    """Processes that read the same database."""

    def __init__(self, pool: ProcessPoolExecutor | None) -> None:
        self._pool = pool

    def map(
        self,
        work: Callable[[Connection, Item], Result],
        connection: Connection,
        items: Iterable[Item],
    ) -> Iterator[Result]:
        """What `work` gives of each item, in their order; it is called with the `connection`, or
        in another process with one of its own, so all of it must pickle. Raises what it raises."""
        if self._pool is None:
            return map(partial(work, connection), items)
        return self._pool.map(partial(_apart, work), items)


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
