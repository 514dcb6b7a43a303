"""From a video's index to its tasks. Pure: nothing is opened, and the same index and sampling give
the same plan everywhere."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np

from storage.records import FrameRange, Sampling, SamplingMode, VideoInfo
from workers.footage.index import Index
from workers.footage.sample import Grid


def plan(
    info: VideoInfo, index: Index, sampling: Sampling, task_us: int = 60_000_000
) -> list[FrameRange]:
    """The frame ranges of a video: they tile [0, info.duration_us) in time and the buckets from 0.

    A range begins at the first sample that can be decoded from a keyframe at least `task_us` after
    the range before began; a video that cannot be split is one range. What a truncated file lacks
    belongs to the last range. For a video whose frames are counted the range has no timestamps, and
    its buckets are what the count of packets lets expect.
    """
    if task_us < 1:
        raise ValueError(f"a task cannot last {task_us} microseconds")
    grid = Grid.of(info, sampling)
    keyframe = index.keyframe
    if index.counted and sampling.mode is SamplingMode.PREFER_KEYFRAME:
        # The order of presentation is known after decoding only, so no keyframe has a number.
        keyframe = np.zeros_like(keyframe)
    buckets, pts = grid.choose(index.pts, keyframe)
    starts = grid.slot_starts(buckets, pts)
    keys = index.cut_points()
    key_us = grid.micros(keys)

    ranges: list[FrameRange] = []
    first, seek_pts, start_us = 0, None, 0
    while True:
        last, next_seek = len(pts), None
        # The next keyframe that is late enough and has a sample to serve.
        at = bisect_left(key_us, start_us + task_us)
        if first < len(pts):
            at = max(at, bisect_right(keys, pts[first]))
        if at < len(keys):
            cut = bisect_left(pts, keys[at])
            if cut < len(pts) and info.duration_us - int(starts[cut]) >= task_us // 2:
                last = cut
                next_seek = int(keys[bisect_right(keys, pts[cut]) - 1])
        done = last == len(pts)
        end_us = info.duration_us if done else int(starts[last])
        ranges.append(
            FrameRange(
                bucket_start=int(buckets[first]) if ranges else 0,
                bucket_end=_bucket_end(buckets) if done else int(buckets[last]),
                start_us=start_us,
                end_us=end_us,
                seek_pts=seek_pts,
                buckets=tuple(buckets[first:last].tolist()),
                pts=() if index.counted else tuple(pts[first:last].tolist()),
            )
        )
        if done:
            return ranges
        first, seek_pts, start_us = last, next_seek, end_us


def _bucket_end(buckets: np.typing.NDArray[np.int64]) -> int:
    return int(buckets[-1]) + 1 if len(buckets) else 0
