"""What is embedded and need not be paid for again, read without the vectors themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, select

from storage.coverage import coverage
from storage.database import reading
from storage.ledger import Job, JobState
from storage.ranges import LASTING_GAPS
from storage.records import Fit, FrameRange, Sampling
from storage.schema import embeddings, label_sets, label_vectors, videos

_BUCKET, _START_US, _END_US = 0, 2, 3


def embedded_ranges(  # noqa: PLR0917
    engine: Engine,
    content_id: str,
    sampling: Sampling,
    fit: Fit,
    model: str,
    ranges: Sequence[FrameRange],
) -> list[bool]:
    """Say of each range of the video with this content whether a worker would find it embedded:
    whether `ranges.stored_range` has it."""
    with reading(engine) as connection:
        rows = connection.execute(
            select(
                embeddings.c.bucket_start,
                embeddings.c.bucket_end,
                embeddings.c.times,
                embeddings.c.gaps,
            )
            .join(videos, videos.c.id == embeddings.c.video_id)
            .where(
                videos.c.content_id == content_id,
                embeddings.c.sampling == str(sampling),
                embeddings.c.fit == fit,
                embeddings.c.model == model,
            )
            .order_by(embeddings.c.bucket_start, embeddings.c.bucket_end)
        ).all()
    stored = [
        _Stored(
            row.bucket_start,
            row.bucket_end,
            np.frombuffer(row.times, dtype="<i8").reshape(-1, 4),
            [(start, end) for start, end, kind, _ in json.loads(row.gaps) if kind in LASTING_GAPS],
        )
        for row in rows
    ]
    starts = np.array([one.bucket_start for one in stored], dtype=np.int64)
    ends = np.array([one.bucket_end for one in stored], dtype=np.int64)
    found = []
    for one in ranges:
        overlapping = np.flatnonzero((starts < one.bucket_end) & (ends > one.bucket_start))
        found.append(_is_covered(one, [stored[at] for at in overlapping]))
    return found


@dataclass(frozen=True, slots=True)
class _Stored:
    bucket_start: int
    bucket_end: int
    times: npt.NDArray[np.int64]
    lasting: list[tuple[int, int]]
    """Intervals of the gaps that lie in the content."""


def _is_covered(one: FrameRange, stored: Sequence[_Stored]) -> bool:
    """Whether samples of the range's buckets, and gaps cut to its time, tile its interval."""
    samples: list[list[int]] = []
    gaps: set[tuple[int, int]] = set()
    after = one.bucket_start
    for row in stored:
        buckets = row.times[:, _BUCKET]
        fresh = row.times[(buckets >= after) & (buckets < one.bucket_end)]
        if len(fresh):
            after = int(fresh[-1, _BUCKET]) + 1
            samples += fresh[:, [_START_US, _END_US]].tolist()
        for start_us, end_us in row.lasting:
            start, end = max(start_us, one.start_us), min(end_us, one.end_us)
            if start < end:
                gaps.add((start, end))
    at_us = one.start_us
    for start_us, end_us in sorted([*samples, *map(list, gaps)]):
        if start_us != at_us:
            return False
        at_us = end_us
    return bool(samples) and at_us == one.end_us


def why_not_embedded(engine: Engine, job: Job) -> str:
    """Why there are no embeddings of a job that has none, as the end of a sentence."""
    if any(one.analysed_us for one in coverage(engine, job.id)):
        return (
            "an API that only compares keeps no embeddings: its jobs cannot be searched, and other "
            "labels need `nightreel run` with the pictures sent again"
        )
    if job.state is JobState.CLOSED:
        return (
            f"no frame of job {job.id} could be analysed; see `nightreel coverage --job {job.id}`"
        )
    return f"no frame of job {job.id} is analysed yet; see `nightreel status {job.id}`"


def has_label_vectors(engine: Engine, digest: str, model: str) -> bool:
    """Whether the label set of this digest was asked about before, of this model."""
    with reading(engine) as connection:
        found = connection.scalar(
            select(label_vectors.c.label_set_id)
            .join(label_sets, label_sets.c.id == label_vectors.c.label_set_id)
            .where(label_sets.c.digest == digest, label_vectors.c.model == model)
        )
    return found is not None
