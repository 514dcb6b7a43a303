"""Ends work on hostile or stuck files: who waits for a reader that makes no progress is told so,
and goes on with the next file."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextvars import copy_context
from typing import TypeVar

_AHEAD = 2
"""Results made before they are asked for."""
_CLOSE_S = 5.0
"""Seconds that closing waits for the reading thread to give the file back."""


_Result = TypeVar("_Result")


class Stalled(Exception):
    """The reader made no progress; its thread may be left behind."""


class _Stopped(BaseException):
    """Leaves the work of a reader that nobody listens to any more."""


def watched(
    read: Callable[[Callable[[], None]], Iterator[_Result]], stall_s: float
) -> Generator[_Result]:
    """The results of `read(beat)`, made in a thread of their own. Raises Stalled where `beat` was
    not called for `stall_s` seconds.

    `read` calls `beat` at every step; what it raises is raised here. Storage or a decoder that
    hangs cannot be interrupted: its thread is left behind, and this one goes on. Closing the
    iterator stops the reader at its next beat.
    """
    results: queue.Queue[_Result | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if stopped.is_set():
            raise _Stopped

    def put(result: _Result | BaseException | None) -> None:
        while True:
            beat()
            try:
                return results.put(result, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            try:
                for result in read(beat):
                    put(result)
            except Exception as error:  # noqa: BLE001 -- raised again where the results are read
                put(error)
            else:
                put(None)
        except _Stopped:
            return

    context = copy_context()  # What log lines are about.
    thread = threading.Thread(target=context.run, args=(work,), name="footage", daemon=True)
    thread.start()
    hung = False
    try:
        while True:
            seen = beats
            try:
                result = results.get(timeout=stall_s)
            except queue.Empty:
                if beats != seen:
                    continue
                hung = True
                raise Stalled from None
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
        if not hung:
            thread.join(_CLOSE_S)
