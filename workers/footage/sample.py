"""The sampling grid in exact arithmetic: which frames of a video are its samples, and which
interval of it each sample answers for.

Everything is integers: ticks of the stream's time base in, buckets and microseconds out. No float
takes part, so scheduler and worker agree on every boundary on every machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from storage.records import FrameRange, Sampling, SamplingMode, VideoInfo

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

DUPLICATE_WINDOW = 30
"""Buckets after which the search for duplicates begins anew. Ranges of a sampling that skips them
begin at multiples of it, so that what is skipped does not depend on how a video was cut."""

_INT64_MAX = 2**63 - 1


def scaled(values: Ints, factor: Fraction) -> Ints:
    """floor(value x factor) for every value, exact for any factor; values are not negative.

    OverflowError where a result does not fit 64 bits.
    """
    numerator, denominator = factor.numerator, factor.denominator
    if values.size == 0 or int(values.max()) <= _INT64_MAX // max(numerator, 1):
        return np.asarray(values * numerator // denominator, dtype=np.int64)
    return np.array([int(v) * numerator // denominator for v in values], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Grid:
    """The buckets of one sampling laid over one video's clock."""

    sampling: Sampling
    time_base: Fraction
    """Seconds a tick."""
    first_pts: int

    @classmethod
    def of(cls, info: VideoInfo, sampling: Sampling) -> Grid:
        """The grid of a probed video."""
        return cls(sampling, info.time_base, info.first_pts)

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

    def choose(self, pts: Ints, keyframe: Flags) -> tuple[Ints, Ints]:
        """The buckets and timestamps of the samples, both ascending and each at most once.

        `pts` and `keyframe` describe the presented frames in any order. Frames of one timestamp
        count once: no reader could tell them apart.
        """
        order = np.lexsort((~keyframe, pts))
        pts, keyframe = pts[order], keyframe[order]
        unique = np.ones(len(pts), dtype=bool)
        unique[1:] = pts[1:] != pts[:-1]
        pts, keyframe = pts[unique], keyframe[unique]
        if self.sampling.mode is SamplingMode.EVERY_FRAME:
            return np.arange(len(pts), dtype=np.int64), pts
        if self.sampling.mode is SamplingMode.KEYFRAMES:
            chosen = pts[keyframe]
            return np.arange(len(chosen), dtype=np.int64), chosen
        buckets = self.buckets(pts)
        if self.sampling.mode is SamplingMode.PREFER_KEYFRAME:
            # Stable: within a bucket keyframes come first, and then the order of time.
            order = np.lexsort((pts, ~keyframe, buckets))
            buckets, pts = buckets[order], pts[order]
        first = np.ones(len(pts), dtype=bool)
        first[1:] = buckets[1:] != buckets[:-1]
        return buckets[first], pts[first]

    def slot_starts(self, buckets: Ints, pts: Ints) -> Ints:
        """Where the interval of each sample begins, in microseconds: its bucket's start on a time
        grid, else the frame's own time. It ends where the next sample's begins."""
        if self.rate is None:
            return self.micros(pts)
        return scaled(buckets, 1_000_000 / self.rate)

    def slots(self, frame_range: FrameRange, end_us: int) -> list[tuple[int, int]]:
        """The intervals of a range's samples: they tile [start_us of the range, end_us)."""
        if not frame_range.buckets:
            return []
        pts = frame_range.pts or (self.first_pts,) * len(frame_range.buckets)
        starts = self.slot_starts(np.array(frame_range.buckets, np.int64), np.array(pts, np.int64))
        edges = [frame_range.start_us, *starts[1:].tolist(), end_us]
        return list(itertools.pairwise(edges))


def scaled_one(value: int, factor: Fraction) -> int:
    """floor(value x factor) of a single value."""
    return value * factor.numerator // factor.denominator
