"""How far a run or another long command is: a live line on a terminal; elsewhere, of a run, a plain
one now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from nightreel.cli.output import say

PLAIN_EVERY_S = 10.0
WINDOW_S = 30.0
"""Rates are those of the last half minute: a pause must show, a start must not linger."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    videos_done: int
    videos: int
    tasks_done: int
    tasks: int
    samples: int
    covered_us: int
    """Microseconds of video analysed or given up as gaps."""
    planned_us: int
    """Microseconds of video in the job."""
    planning: bool
    """More videos may come."""


class Rates:
    """Speeds over a sliding window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, Snapshot]] = deque()

    def add(self, now: Snapshot) -> None:
        """Take note of a snapshot."""
        at = self._clock()
        self._seen.append((at, now))
        while len(self._seen) > 2 and at - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    def per_second(self) -> tuple[float, float]:
        """Return frames a second, and seconds of video a second (times real time)."""
        if len(self._seen) < 2:
            return 0.0, 0.0
        (t0, first), (t1, last) = self._seen[0], self._seen[-1]
        elapsed = max(t1 - t0, 1e-6)
        frames = (last.samples - first.samples) / elapsed
        return frames, (last.covered_us - first.covered_us) / 1e6 / elapsed

    def eta_s(self) -> float | None:
        """Seconds that are left at the present speed; None while nothing moves."""
        _, speed = self.per_second()
        if not self._seen or speed <= 0:
            return None
        last = self._seen[-1][1]
        return (last.planned_us - last.covered_us) / 1e6 / speed


class ProgressDisplay:
    """Shows snapshots on standard error. A context manager."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates = Rates(clock)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._next_plain = clock() + 2.0

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            self._live = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._live.add_task("starting", total=None)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, message: str) -> None:
        """Write a line that stays, above the live one."""
        if self._live is not None:
            self._live.console.print(message, highlight=False, markup=False)
        else:
            say(message)

    def show(self, now: Snapshot) -> None:
        """Show a snapshot; elsewhere than on a terminal, only from time to time."""
        self._rates.add(now)
        if self._live is not None and self._task is not None:
            total = now.planned_us or None
            self._live.update(
                self._task, completed=now.covered_us, total=total, description=self.line(now)
            )
        elif self._clock() >= self._next_plain:
            self._next_plain = self._clock() + PLAIN_EVERY_S
            say(self.line(now))

    def line(self, now: Snapshot) -> str:
        """Return the state in words: videos, tasks, frames a second, times real time, ETA."""
        frames, speed = self._rates.per_second()
        more = "+" if now.planning else ""
        eta = self._rates.eta_s()
        left = "" if eta is None or now.planning else f", {_rough(eta)} left"
        return (
            f"{now.videos_done}/{now.videos}{more} videos, {now.tasks_done}/{now.tasks}{more} "
            f"tasks, {frames:.0f} frames/s, {speed:.0f}x real time{left}"
        )


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere. What it gives is told how much is done, of
    how much; the bar is there from the first time on."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    progress = Progress(console=Console(stderr=True), transient=True, disable=not shown)
    task = progress.add_task(description)

    def show(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=max(1, total))

    try:
        yield show
    finally:
        progress.stop()


def _rough(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
