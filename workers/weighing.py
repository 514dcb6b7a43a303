"""What the frames of a range weigh once they are pictures to send.

Loads no decoder by itself, so that whoever plans need not have one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from storage.records import Fit, FrameRange, Gap, Sampling, VideoInfo
from workers.contract import base64_length

RANGE_S = 5.0
"""Seconds after which what is left of a range is not waited for: a video that can only be read from
its first frame on may be hours long."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """Some frames of a range to decode as a worker would."""

    path: str
    info: VideoInfo
    frame_range: FrameRange
    at: Sequence[int]
    """Positions of the frames among those of the range, ascending."""


def weigh(asked: Weighed, sampling: Sampling, size: int, fit: Fit) -> list[int]:
    """Return the characters that each frame is sent as, all its squares together, 0 for one that
    does not decode; fewer than were asked for where they took too long, or the file is gone."""
    # What follows loads FFmpeg.
    from workers.classify import squares_of  # noqa: PLC0415
    from workers.footage.decode import FootageError, read_range  # noqa: PLC0415
    from workers.footage.picture import encode_jpeg  # noqa: PLC0415

    wanted = [asked.frame_range.buckets[at] for at in asked.at]
    chosen = frozenset(wanted)
    weights: dict[int, int] = {}
    until = time.monotonic() + RANGE_S
    frames = read_range(
        asked.path,
        asked.info,
        _shortened(asked),
        sampling,
        size=size,
        fit=fit,
        stall_s=RANGE_S,
    )
    try:
        with closing(frames):
            for frame in frames:
                if not isinstance(frame, Gap) and frame.bucket in chosen:
                    squares = squares_of(frame.picture, fit)
                    weights[frame.bucket] = sum(base64_length(len(encode_jpeg(s))) for s in squares)
                    if frame.bucket == wanted[-1] or time.monotonic() > until:
                        wanted = wanted[: wanted.index(frame.bucket) + 1]
                        break
    except FootageError:
        return []
    return [weights.get(bucket, 0) for bucket in wanted]


def _shortened(asked: Weighed) -> FrameRange:
    """The range with the wanted frames alone; as it is where frames are counted, for there each
    frame must come."""
    whole = asked.frame_range
    if not whole.pts or len(asked.at) == len(whole.buckets):
        return whole
    pts = tuple(whole.pts[at] for at in asked.at)
    return FrameRange(
        whole.bucket_start,
        whole.bucket_end,
        whole.start_us,
        whole.end_us,
        # Seeking lands at the keyframe before.
        whole.seek_pts if asked.info.sequential_reason is not None or not asked.at[0] else pts[0],
        tuple(whole.buckets[at] for at in asked.at),
        pts,
    )
