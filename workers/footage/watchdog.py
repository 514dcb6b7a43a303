"""Ends work on hostile or stuck files: a range that makes no progress becomes a gap, and the
process that read it goes on with the next one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeVar

from storage.records import Gap, GapKind

_AHEAD = 2
"""Results made before they are asked for."""
_CLOSE_S = 5.0
"""Seconds that closing waits for the reading thread to give the file back."""


class _Interval(Protocol):
    @property
    def end_us(self) -> int: ...


_Result = TypeVar("_Result", bound=_Interval)


class _Stopped(BaseException):
    """Leaves the work of a reader that nobody listens to any more."""


def watched(
    read: Callable[[Callable[[], None]], Iterator[_Result]],
    start_us: int,
    end_us: int,
    stall_s: float,
) -> Generator[_Result | Gap]:
    """The results of `read(beat)`, made in a thread of their own, and a `stalled` gap up to
    `end_us` where `beat` was not called for `stall_s` seconds.

    `read` calls `beat` at every step; what it raises is raised here. A decoder that hangs inside a
    library cannot be interrupted: its thread is left behind, and this one goes on. Closing the
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

    thread = threading.Thread(target=work, name="footage", daemon=True)
    thread.start()
    reached_us, hung = start_us, False
    try:
        while True:
            seen = beats
            try:
                result = results.get(timeout=stall_s)
            except queue.Empty:
                if beats != seen:
                    continue
                hung = True
                detail = f"decoding made no progress for {stall_s:g} s"
                yield Gap(reached_us, end_us, GapKind.STALLED, detail)
                return
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            reached_us = result.end_us
            yield result
    finally:
        stopped.set()
        if not hung:
            thread.join(_CLOSE_S)
