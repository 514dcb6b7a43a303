"""From a video's index to its tasks. Pure: nothing is opened, and the same index and sampling give
the same plan everywhere."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right

import numpy as np

from storage.records import FrameRange, Sampling, SamplingMode, VideoInfo
from workers.footage.index import Index
from workers.footage.sample import DUPLICATE_WINDOW, Grid, Ints

MOST_SAMPLES = 20_000
"""Samples of a range at most. A worker holds a range's results until it commits them, some
kilobytes each, so a long video that cannot be split is read in several goes, each from its start:
ten hours at a frame a second in two."""


def plan(
    info: VideoInfo, index: Index, sampling: Sampling, task_us: int = 60_000_000
) -> list[FrameRange]:
    """The frame ranges of a video: they tile [0, info.duration_us) in time and the buckets from 0.

    A range begins at the first sample that can be decoded from a keyframe at least `task_us` after
    the range before began; a video that cannot be split is one range, or several that are read from
    the start where it has more than MOST_SAMPLES. What a truncated file lacks belongs to the last
    range. For a video whose frames are counted the range has no timestamps, and its buckets are
    what the count of packets lets expect.
    """
    if task_us < 1:
        raise ValueError(f"a task cannot last {task_us} microseconds")
    grid = Grid.of(info, sampling)
    keyframe = index.keyframe
    if index.counted and sampling.mode is SamplingMode.PREFER_KEYFRAME:
        # The order of presentation is known after decoding only, so no keyframe has a number.
        keyframe = np.zeros_like(keyframe)
    buckets, pts = grid.choose(index.pts, keyframe, index.lost)
    starts = grid.slot_starts(buckets, pts)
    # Of more frames than microseconds the last ones cannot be told apart.
    apart = max(1, np.searchsorted(starts, info.indexed_us))
    buckets, pts, starts = buckets[:apart], pts[:apart], starts[:apart]
    if index.sequential_reason is None:
        keys = index.cut_points()
        cuts = _cuts_at_keyframes(
            pts,
            starts,
            _openings(buckets, sampling),
            keys,
            grid.micros(keys),
            task_us=task_us,
            end_us=info.duration_us,
        )
    elif index.counted and sampling.mode is SamplingMode.KEYFRAMES:
        cuts = []  # When a keyframe is shown is known after decoding only.
    else:
        cuts = _cuts_by_number(buckets, pts, sampling)
    edges = [(0, None), *cuts, (len(pts), None)]
    ranges: list[FrameRange] = []
    for (first, seek_pts), (last, _) in itertools.pairwise(edges):
        done = last == len(pts)
        ranges.append(
            FrameRange(
                bucket_start=int(buckets[first]) if ranges else 0,
                bucket_end=_bucket_end(buckets) if done else int(buckets[last]),
                start_us=int(starts[first]) if ranges else 0,
                end_us=info.duration_us if done else int(starts[last]),
                seek_pts=seek_pts,
                buckets=tuple(buckets[first:last].tolist()),
                pts=() if index.counted else tuple(pts[first:last].tolist()),
            )
        )
    return ranges


def _cuts_at_keyframes(
    pts: Ints, starts: Ints, openings: Ints, keys: Ints, key_us: Ints, *, task_us: int, end_us: int
) -> list[tuple[int, int | None]]:
    """Positions of the samples that begin a range, each with the keyframe to seek to."""
    cuts: list[tuple[int, int | None]] = []
    first = start_us = 0
    while first < len(pts):
        # The next keyframe that is late enough and has a sample to serve.
        late, after = start_us + task_us, pts[first]
        at = max(bisect_left(key_us, late), bisect_right(keys, after))
        if at == len(keys):
            break
        opening = bisect_left(openings, bisect_left(pts, keys[at]))
        if opening == len(openings):
            break
        first = int(openings[opening])
        start_us = int(starts[first])
        if end_us - start_us < task_us // 2:
            break
        cuts.append((first, int(keys[bisect_right(keys, pts[first]) - 1])))
    return cuts


def _cuts_by_number(buckets: Ints, pts: Ints, sampling: Sampling) -> list[tuple[int, int | None]]:
    """Positions that divide the samples into as few even parts as MOST_SAMPLES allows, each to be
    read from the video's start."""
    parts = -(-len(buckets) // MOST_SAMPLES)
    if parts < 2:
        return []
    openings = _openings(buckets, sampling)
    # Frames of one timestamp are told apart by their order.
    openings = openings[pts[openings] > pts[openings - 1]]
    even = [len(buckets) * part // parts for part in range(1, parts)]
    chosen = np.searchsorted(openings, even)
    return [(int(at), None) for at in np.unique(openings[chosen[chosen < len(openings)]])]


def _openings(buckets: Ints, sampling: Sampling) -> Ints:
    """Positions of the samples at which a range may begin, ascending."""
    window = DUPLICATE_WINDOW if sampling.skip_duplicates else 1
    return np.flatnonzero(np.diff(buckets // window)) + 1


def _bucket_end(buckets: Ints) -> int:
    return int(buckets[-1]) + 1 if len(buckets) else 0
