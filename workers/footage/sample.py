"""The sampling grid in exact arithmetic: which frames of a video are its samples, and which
interval of it each sample answers for.

Everything is integers: ticks of the stream's time base in, buckets and microseconds out. No float
takes part, so scheduler and worker agree on every boundary on every machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.records import FrameRange, Sampling, SamplingMode, VideoInfo

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

DUPLICATE_WINDOW = 30
"""Buckets after which the search for duplicates begins anew. Ranges of a sampling that skips them
begin at multiples of it, so that what is skipped does not depend on how a video was cut."""

_STEADY = frozenset(("mpegts", "mpeg"))
"""Containers of broadcasts and recorders, whose pictures come one after the other. Where they stop
for a while something was lost; in other containers a picture stands until the next."""
_PAUSE_US, _PAUSE_FRAMES = 2_000_000, 16
"""Time without any picture from which on a steady stream has lost some, in microseconds or in
frames of its mean rate, whichever is more."""

_INT64_MAX = 2**63 - 1


def scaled(values: Ints, factor: Fraction) -> Ints:
    """floor(value x factor) for every value, exact for any factor; values are not negative.

    OverflowError where a result does not fit 64 bits.
    """
    numerator, denominator = factor.numerator, factor.denominator
    largest = max(int(values.max(initial=0)), 1)
    if max(numerator * largest, denominator) <= _INT64_MAX:
        return np.asarray(values * numerator // denominator, dtype=np.int64)
    return np.array([int(v) * numerator // denominator for v in values], dtype=np.int64)


class Slot(NamedTuple):
    """The interval from a sample to the next one, in microseconds."""

    start_us: int
    shown_us: int
    """Up to here the sample answers: as a rule `end_us`, unless the pictures paused."""
    end_us: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The buckets of one sampling laid over one video's clock."""

    sampling: Sampling
    time_base: Fraction
    """Seconds a tick."""
    first_pts: int
    frame_us: int = 0
    """Mean time between two frames."""
    steady: bool = False
    """Whether a while without any picture is one that was lost."""

    @classmethod
    def of(cls, info: VideoInfo, sampling: Sampling) -> Grid:
        """The grid of a probed video."""
        frame_us = int(1_000_000 / info.frame_rate) if info.frame_rate else 0
        steady = frame_us > 0 and info.container in _STEADY
        return cls(sampling, info.time_base, info.first_pts, frame_us, steady)

    @property
    def rate(self) -> Fraction | None:
        """Samples a second; None where the mode has no time grid and buckets are ordinals."""
        return self.sampling.rate

    def micros(self, pts: Ints) -> Ints:
        """Microseconds from the first frame, rounded down."""
        return scaled(pts - self.first_pts, self.time_base * 1_000_000)

    def buckets(self, pts: Ints) -> Ints:
        """floor((pts - first pts) x time base x rate). Only for modes with a rate."""
        if self.rate is None:
            raise ValueError(f"sampling {self.sampling} has no time grid")
        return scaled(pts - self.first_pts, self.time_base * self.rate)

    def bucket(self, pts: int) -> int:
        """The bucket of one frame, as `buckets` has it."""
        if self.rate is None:
            raise ValueError(f"sampling {self.sampling} has no time grid")
        return scaled_one(pts - self.first_pts, self.time_base * self.rate)

    def choose(self, pts: Ints, keyframe: Flags, lost: Flags) -> tuple[Ints, Ints]:
        """The buckets and timestamps of the samples, both ascending; without a time grid frames of
        one timestamp have a bucket each.

        `pts` and `keyframe` describe the presented frames in any order; those that are `lost` are
        samples of buckets that have no others.
        """
        if self.rate is None:
            every = self.sampling.mode is SamplingMode.EVERY_FRAME
            chosen = np.sort(pts if every else pts[keyframe])
            return np.arange(len(chosen), dtype=np.int64), chosen
        buckets = self.buckets(pts)
        prefers = self.sampling.mode is SamplingMode.PREFER_KEYFRAME
        # Within a bucket keyframes come first, and then the order of time.
        order = np.lexsort((pts, ~keyframe & prefers, lost, buckets))
        buckets, pts = buckets[order], pts[order]
        first = np.ones(len(pts), dtype=bool)
        first[1:] = buckets[1:] != buckets[:-1]
        return buckets[first], pts[first]

    def slot_starts(self, buckets: Ints, pts: Ints) -> Ints:
        """Where the interval of each sample begins, in microseconds: its bucket's start on a time
        grid, else the frame's own time, or one later than of the frame before. It ends where the
        next sample's begins."""
        if self.rate is None:
            return _ascending(self.micros(pts))
        return scaled(buckets, 1_000_000 / self.rate)

    def slots(self, frame_range: FrameRange, end_us: int) -> list[Slot]:
        """The intervals of a range's samples: they tile [start_us of the range, end_us)."""
        if not frame_range.buckets:
            return []
        buckets = np.array(frame_range.buckets, np.int64)
        pts = np.array(frame_range.pts or (self.first_pts,) * len(buckets), np.int64)
        starts = self.slot_starts(buckets, pts)
        starts[0] = frame_range.start_us
        edges = [*np.minimum(_ascending(starts), end_us).tolist(), end_us]
        reach = self._reach(buckets, pts).tolist() if self.steady else edges[1:]
        pause_us = max(_PAUSE_US, _PAUSE_FRAMES * self.frame_us)
        return [
            Slot(start, own if end - own >= pause_us else end, end)
            for (start, end), own in zip(itertools.pairwise(edges), reach, strict=True)
        ]

    def _reach(self, buckets: Ints, pts: Ints) -> Ints:
        """Until when each sample is sure to answer, whatever comes next: to the end of its bucket
        or frame. Nothing is known of what lies between two keyframes."""
        if self.rate is not None:
            return scaled(buckets + 1, 1_000_000 / self.rate)
        if self.sampling.mode is SamplingMode.EVERY_FRAME:
            return np.asarray(self.micros(pts) + self.frame_us, dtype=np.int64)
        return np.full(len(pts), _INT64_MAX, np.int64)


def _ascending(times: Ints) -> Ints:
    """The same, later where that is needed to be greater than the one before."""
    number = np.arange(len(times), dtype=np.int64)
    return np.asarray(np.maximum.accumulate(times - number) + number, dtype=np.int64)


def scaled_one(value: int, factor: Fraction) -> int:
    """floor(value x factor) of a single value."""
    return value * factor.numerator // factor.denominator
