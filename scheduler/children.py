"""Work on hostile files in processes of its own.

A media library that crashes on a file takes down a child here, not the caller; and files on a slow
disk are worked on several at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, resource_tracker
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

STOP_POLL_S = 0.2


def in_children(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    processes: int,
    stop: threading.Event,
) -> Iterator[tuple[Item, Result | None]]:
    """Yield each item with what `work`, which must be picklable, returns of it, in order, a few
    items ahead of the consumer.

    An item that kills its process is worked on once more alone, and comes with None when it does so
    again. Once `stop` is set nothing more is yielded; then, and where the consumer leaves early or
    is interrupted, the processes end, in whatever item.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool: ProcessPoolExecutor | None = None
    source = iter(items)
    finished = False
    try:
        while True:
            for item in source:
                pool = pool or _pool(processes)
                waiting.append((item, _submit(pool, work, item)))
                if len(waiting) >= 2 * processes:
                    break
            if not waiting:
                finished = True
                return
            item, future = waiting.popleft()
            if not _done(future, stop):
                return
            try:
                yield item, future.result()
            except BrokenProcessPool:
                ended, found = _alone(work, item, stop)
                if not ended:
                    return
                yield item, found
                pool = _pool(processes)
                waiting = deque((other, _submit(pool, work, other)) for other, _ in waiting)
    finally:
        if pool is not None:
            _close(pool, finished)


def _submit(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], item: Item
) -> Future[Result]:
    """Submit, which may start a process, with SIGINT blocked: Ctrl-C reaches every process of a
    terminal and is the parent's to handle, also while a child is still starting. Where an item
    before has killed its process, the future tells, as it would a moment earlier."""
    resource_tracker.ensure_running()  # first, because starting it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        future = Future[Result]()
        future.set_exception(error)
        return future
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(future: Future[Result], stop: threading.Event) -> bool:
    """Wait for it; False as soon as `stop` is set."""
    while not future.done():
        if stop.is_set():
            return False
        wait([future], timeout=STOP_POLL_S)
    return True


def _alone(
    work: Callable[[Item], Result], item: Item, stop: threading.Event
) -> tuple[bool, Result | None]:
    """Whether a process of its own came to an end before `stop` was set, and what it found."""
    pool = _pool(1)
    finished = False
    try:
        future = _submit(pool, work, item)
        finished = _done(future, stop)
        return finished, future.result() if finished else None
    except BrokenProcessPool:
        return True, None
    finally:
        _close(pool, finished)


def _close(pool: ProcessPoolExecutor, finished: bool) -> None:
    if not finished:
        for child in multiprocessing.active_children():
            child.terminate()
    # Its threads are waited for, or the interpreter's end would race with theirs: with the
    # processes gone, or without work, they end at once.
    pool.shutdown(wait=True, cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the caller has threads and database connections.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_the_parent)


def _end_with_the_parent() -> None:
    """A pool's processes wait for work for ever, and would outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
