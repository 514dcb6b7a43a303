"""Probing and planning videos in processes of their own.

A media library that crashes on a hostile file takes down a child here, not the caller; and an
archive on a slow disk is probed several files at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, resource_tracker

from storage.records import Sampling
from workers.probing import Asked, Probed, probe_and_plan

STOP_POLL_S = 0.2


def probe_all(
    files: Iterable[Asked],
    sampling: Sampling,
    task_us: int,
    *,
    processes: int,
    stop: threading.Event,
) -> Iterator[Probed]:
    """Yield what probing found for each file, in order, a few files ahead of the consumer.

    A file that kills its process is asked once more alone, and rejected when it does so again.
    Once `stop` is set, nothing more is yielded and the processes end, in whatever file they are.
    """
    waiting: deque[tuple[Asked, Future[Probed]]] = deque()
    pool: ProcessPoolExecutor | None = None
    source = iter(files)
    try:
        while True:
            while len(waiting) < 2 * processes and (file := next(source, None)) is not None:
                pool = pool or _pool(processes)
                waiting.append((file, _submit(pool, file, sampling, task_us)))
            if not waiting:
                return
            file, future = waiting.popleft()
            if not _done(future, stop):
                return
            try:
                yield future.result()
            except BrokenProcessPool:
                alone = _alone(file, sampling, task_us, stop)
                if alone is None:
                    return
                yield alone
                pool = _pool(processes)
                waiting = deque(
                    (other, _submit(pool, other, sampling, task_us)) for other, _ in waiting
                )
    finally:
        if pool is not None:
            _close(pool, stop)


def _submit(
    pool: ProcessPoolExecutor, file: Asked, sampling: Sampling, task_us: int
) -> Future[Probed]:
    """Submit, which may start a process, with SIGINT blocked: Ctrl-C reaches every process of a
    terminal and is the parent's to handle, also while a child is still starting."""
    resource_tracker.ensure_running()  # first, because starting it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(probe_and_plan, file, sampling, task_us)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(future: Future[Probed], stop: threading.Event) -> bool:
    """Wait for it; False as soon as `stop` is set."""
    while not future.done():
        if stop.is_set():
            return False
        wait([future], timeout=STOP_POLL_S)
    return True


def _alone(file: Asked, sampling: Sampling, task_us: int, stop: threading.Event) -> Probed | None:
    """What a process of its own finds; None once `stop` is set."""
    pool = _pool(1)
    try:
        future = _submit(pool, file, sampling, task_us)
        return future.result() if _done(future, stop) else None
    except BrokenProcessPool:
        reason = "reading it crashes the media library: convert it, or leave it out"
        return Probed(file.file, file.content_id, None, (), "crashes", reason)
    finally:
        _close(pool, stop)


def _close(pool: ProcessPoolExecutor, stop: threading.Event) -> None:
    if stop.is_set():
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
