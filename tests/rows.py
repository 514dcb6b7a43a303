"""Small made-up archives in a real ledger: 1-second samples, ranges of `RANGE` samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from sqlalchemy import Engine, update

from storage import ledger, results
from storage.database import writing
from storage.dialect import Now
from storage.ledger import Claim
from storage.records import (
    ArchiveFile,
    Fit,
    FrameRange,
    Gap,
    JobSpec,
    Label,
    LabelSet,
    Prediction,
    RangeResult,
    SampleResult,
    Sampling,
    Usage,
    VideoInfo,
)
from storage.schema import tasks

SECOND = 1_000_000
RANGE = 4
DIMENSION = 8

SEASONS = LabelSet(
    "seasons",
    (
        Label("summer", ("a photo of summer", "sunny")),
        Label("winter", ("a photo of winter",), (b"jpeg 1", b"jpeg 2")),
        Label("fire", ("a fire",), (), 0.5, "burning"),
    ),
)


def info(seconds: int) -> VideoInfo:
    """Facts of a video of so many seconds."""
    return VideoInfo(
        container="mp4",
        codec="h264",
        pixel_format="yuv420p",
        stream_index=0,
        stream_reason="only",
        width=1920,
        height=1080,
        rotation=0,
        time_base=Fraction(1, 90_000),
        frame_rate=Fraction(30_000, 1001),
        frame_count=30 * seconds,
        first_pts=0,
        duration_us=seconds * SECOND,
        indexed_us=seconds * SECOND,
        header_us=None,
        sequential_reason=None,
        interlaced=False,
        bit_depth=8,
        transfer="bt709",
        warnings=("the header promises more",),
    )


def frame_range(start: int, end: int) -> FrameRange:
    """The range of the buckets [start, end), one a second."""
    buckets = tuple(range(start, end))
    pts = tuple(bucket * 90_000 for bucket in buckets)
    return FrameRange(start, end, start * SECOND, end * SECOND, start * 90_000, buckets, pts)


def ranges(seconds: int, each: int = RANGE) -> list[FrameRange]:
    """Ranges that tile a video of so many seconds."""
    return [frame_range(start, min(start + each, seconds)) for start in range(0, seconds, each)]


def spec(key: str = "key", **changes: object) -> JobSpec:
    """A job; equal keys are one job."""
    made = JobSpec(key, "seasons", Sampling(), Fit.CROP, 2, SEASONS, "clip/1", None)
    return replace(made, **changes)  # type: ignore[arg-type]


def file(name: str) -> ArchiveFile:
    """A file of the archive."""
    return ArchiveFile(f"/archive/{name}.mp4", 1000, 1_700_000_000_000_000_000)


def add_video(engine: Engine, job_id: int, name: str, seconds: int, each: int = RANGE) -> int:
    """Register and plan a video of that content."""
    video_id = ledger.register_file(engine, file(name), f"content-{name}")
    ledger.plan_video(engine, job_id, video_id, info(seconds), ranges(seconds, each))
    return video_id


@dataclass(frozen=True)
class Planned:
    """A job with videos, all planned."""

    job_id: int
    video_ids: list[int]


def planned(engine: Engine, *seconds: int, **changes: object) -> Planned:
    """A job whose planning is finished, with a video of each length."""
    job = ledger.open_job(engine, spec(**changes), files=())  # type: ignore[arg-type]
    videos = [add_video(engine, job.id, f"v{at}", each) for at, each in enumerate(seconds)]
    ledger.finish_planning(engine, job.id)
    return Planned(job.id, videos)


def claimed(engine: Engine, task_id: int, lease_s: float = 60) -> Claim:
    """The task, surely claimed."""
    claim = ledger.claim(engine, task_id, "worker", lease_s)
    assert claim is not None
    return claim


def sample(bucket: int, label: int, confidence: float = 0.9) -> SampleResult:
    """A sample of one second with two labels: this one, and the next."""
    best = (
        Prediction(label, 0.3, confidence),
        Prediction((label + 1) % 3, 0.2, round(1 - confidence, 6)),
    )
    start = bucket * SECOND
    return SampleResult(bucket, start, start, start + SECOND, best)


def vectors_of(buckets: Sequence[int]) -> bytes:
    """A vector for each bucket that tells which it is of."""
    return np.repeat(np.array(buckets, "<f2")[:, None], DIMENSION, axis=1).tobytes()


def found(claim: Claim, label: int = 0, gaps: Sequence[Gap] = ()) -> RangeResult:
    """What a worker finds in the claimed range, save where there are gaps."""
    missing = {second for gap in gaps for second in range(gap.start_us, gap.end_us, SECOND)}
    buckets = [b for b in claim.frame_range.buckets if b * SECOND not in missing]
    samples = tuple(sample(bucket, label) for bucket in buckets)
    usage = Usage(len(samples), 0, 100 * len(samples), 0.5, 0.25)
    return RangeResult(samples, tuple(gaps), vectors_of(buckets), DIMENSION, usage)


def work(engine: Engine, job_id: int | None = None) -> int:
    """Do all that can be fed, calmly, and return the number of tasks."""
    done = 0
    while fed := ledger.feed(engine, 8, job_id):
        for task_id in fed:
            claim = claimed(engine, task_id)
            assert results.commit(engine, task_id, claim.fence, found(claim))
            done += 1
    return done


def let_leases_expire(engine: Engine) -> None:
    """As if every lease had been taken long ago."""
    _set(engine, lease_until_ms=Now() - 1)


def let_delays_pass(engine: Engine) -> None:
    """As if every delay were over."""
    _set(engine, not_before_ms=0)


def _set(engine: Engine, **values: object) -> None:
    with writing(engine) as connection:
        connection.execute(update(tasks).values(**values))
