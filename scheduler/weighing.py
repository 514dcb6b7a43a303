"""What the frames of an archive weigh on the wire, by decoding some of them.

What a picture weighs differs fourfold from clip to clip and hangs on nothing that an index tells,
so it is measured: over an even sample of all frames that would be sent.
"""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import sqrt

from scheduler.children import in_children
from scheduler.estimate import Planned
from storage.records import Fit, FrameRange, Sampling
from workers.weighing import Weighed, weigh

MOST_FRAMES = 2000
"""Of a larger archive between half as many and as many are decoded: of real clips, whose pictures
deviate by a third from their mean, a thousand give it within 2 % nineteen times in twenty."""
LONGEST_S = 30.0
"""Seconds after which the frames that are decoded by then must do."""


@dataclass(frozen=True, slots=True)
class Weight:
    """What a frame is sent as, on the average."""

    of: int
    """Frames that would be sent."""
    frames: int
    """Of these, those that were decoded."""
    mean: float
    """Bytes of one."""
    error: float
    """Two standard errors as a share of the mean; 0 where all frames were decoded."""


class Weighing:
    """Every n-th of the frames that are added, over all videos in order."""

    def __init__(self) -> None:
        self._added = 0
        self._every = 1
        self._chosen: list[tuple[Planned, FrameRange, int]] = []

    def watch(self, plans: Iterable[Planned]) -> Iterator[Planned]:
        """Yield the plans as they come, and add the frames of them that are not embedded yet."""
        for plan in plans:
            for frame_range, stored in zip(plan.ranges, plan.embedded, strict=True):
                if not stored:
                    self._add(plan, frame_range)
            yield plan

    def _add(self, plan: Planned, frame_range: FrameRange) -> None:
        frames = range(-self._added % self._every, len(frame_range.buckets), self._every)
        self._chosen += [(plan, frame_range, at) for at in frames]
        self._added += len(frame_range.buckets)
        while len(self._chosen) > MOST_FRAMES:
            self._every *= 2
            del self._chosen[1::2]

    def weigh(self, sampling: Sampling, size: int, fit: Fit, *, processes: int) -> Weight | None:
        """Decode what was chosen and return what it weighs; None where nothing of it decodes in
        time. The frames of one range are decoded in one go, and the ranges in no order, so that
        those that time suffices for are of everywhere."""
        ranges = []
        for _, frames in groupby(self._chosen, key=lambda one: id(one[1])):
            (plan, frame_range, first), *others = frames
            at = [first, *(at for _, _, at in others)]
            ranges.append(Weighed(plan.path, plan.info, frame_range, at))
        random.Random(0).shuffle(ranges)
        late = threading.Event()
        timer = threading.Timer(LONGEST_S, late.set)
        timer.start()
        found: list[int] = []
        try:
            work = partial(weigh, sampling=sampling, size=size, fit=fit)
            for _, weights in in_children(work, ranges, processes=processes, stop=late):
                found += weights or ()
        finally:
            timer.cancel()
        if not any(found):
            return None
        mean, n = statistics.fmean(found), len(found)
        deviation = statistics.stdev(found, mean) if n > 1 else mean
        error = 2 * deviation / mean * sqrt((1 - n / self._added) / n)
        return Weight(self._added, n, mean, error)
