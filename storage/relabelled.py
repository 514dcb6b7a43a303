"""Videos under other labels: what their stored vectors say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, select

from storage import vectors
from storage.columns import Curves, Ints, SampleColumns
from storage.dialect import among
from storage.flags import flag_rows
from storage.ledger.closing import standing
from storage.records import FrameRange, Gap, GapKind, Label, TaskState, VideoState
from storage.scenes import SceneColumns, Shares, scenes_of_videos
from storage.schema import job_videos
from storage.scoring import Single, kept_confidences, similarities_and_changes
from storage.vectors import BUCKET, VideoVectors

NOT_EMBEDDED = "no stored embedding: its API gave similarities only"

OldRow = Row[*tuple[Any, ...]]
"""A closed video as it stands in the job that it was embedded for: its row of `job_videos`."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A video with what its answers are made of."""

    old: OldRow
    times: Ints
    """Samples x (bucket, t_us, start_us, end_us)."""
    curves: Curves
    changes: Shares
    """How much each sample's picture differs from the one before."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """A video with the samples whose rows are written."""

    old: OldRow
    samples: SampleColumns

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """A video as it will stand in the new job: rows, but for those of its samples."""

    row: dict[str, Any]
    task: dict[str, Any] | None
    gaps: list[Gap]
    scenes: SceneColumns
    flags: list[dict[str, Any]]

    @property
    def samples(self) -> int:
        """How many samples it has."""
        return 0 if self.task is None else int(self.task["samples"])


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What is asked of a job's stored vectors."""

    job: tuple[int, str, str, str]
    """Number, sampling, fit and model."""
    labels: Sequence[Label]
    matrix: Single
    """The labels' vectors, labels x dimension."""
    top_n: int


Part = tuple[Sequence[OldRow], dict[int, list[Gap]]]
"""Videos by number, and their gaps by number of video."""


def answers_of(connection: Connection, part: Part, question: Question) -> list[Answered] | None:
    """The answers for some videos; None where they are no longer what they were in the job, as a
    process may find that reads it later."""
    rows, old_gaps = part
    ids = [row.video_id for row in rows]
    job_id = question.job[0]
    now = select(job_videos.c.video_id, job_videos.c.closed_ms).where(
        job_videos.c.job_id == job_id, among(connection, job_videos.c.video_id, ids)
    )
    if {tuple(row) for row in connection.execute(now)} != {
        (row.video_id, row.closed_ms) for row in rows
    }:
        return None
    stored = vectors.of_job(connection, *question.job, ids)
    of_videos = [
        judged(row, found, question.matrix, question.top_n) for row, found in paired(rows, stored)
    ]
    return answered(of_videos, old_gaps, question.labels)


def paired(
    rows: Sequence[OldRow], stored: Iterator[VideoVectors]
) -> Iterator[tuple[OldRow, VideoVectors | None]]:
    """Each video with its vectors, if there are any; both come by number of video."""
    ahead = next(stored, None)
    for row in rows:
        while ahead is not None and ahead.video_id < row.video_id:
            ahead = next(stored, None)
        yield row, ahead if ahead is not None and ahead.video_id == row.video_id else None


def judged(old: OldRow, stored: VideoVectors | None, matrix: Single, top_n: int) -> Judged:
    """The confidences of the best `top_n` labels of each sample; `matrix` holds the vectors of all
    labels."""
    times = np.empty((0, 4), np.int64) if stored is None else stored.times
    cosines, changes = similarities_and_changes([] if stored is None else stored.parts, matrix)
    best, kept = kept_confidences(cosines, top_n)
    _, t_us, start_us, end_us = times.T
    return Judged(old, times, Curves(t_us, start_us, end_us, best, kept), changes)


def answered(
    videos: Sequence[Judged], old_gaps: dict[int, list[Gap]], named: Sequence[Label]
) -> list[Answered]:
    """What the videos show under the labels `named`, by their samples; `old_gaps` by number of
    video."""
    missing = [_missing(one, old_gaps.get(one.old.video_id, ())) for one in videos]
    found = scenes_of_videos(
        [(one.curves, gaps, one.changes) for one, gaps in zip(videos, missing, strict=True)]
    )
    return [
        Answered(*_standing(one, gaps), gaps, scenes, flag_rows(one.curves, named))
        for one, gaps, scenes in zip(videos, missing, found, strict=True)
    ]


def _standing(
    video: Judged, missing: Sequence[Gap]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rows of the video and of its task."""
    old = video.old
    row = {
        "video_id": old.video_id,
        "state": old.state,
        "duration_us": old.duration_us,
        "analysed_us": 0,
        "reason_kind": old.reason_kind,
        "reason": old.reason,
        "opening": 1,
        # Not now: by it is told whether the old job knows better meanwhile.
        "closed_ms": old.closed_ms,
    }
    if old.state == VideoState.REJECTED:
        return row, None
    gap_us = sum(gap.end_us - gap.start_us for gap in missing)
    row["analysed_us"] = old.duration_us - gap_us
    row["state"], (row["reason_kind"], row["reason"]) = standing(row["analysed_us"], missing)
    return row, _task(video.times, old.duration_us, gap_us)


def _missing(video: Judged, old_gaps: Sequence[Gap]) -> list[Gap]:
    """Gaps over all of the video for which no sample answers: the old ones as far as they still are
    gaps, and what was analysed without being embedded."""
    missing: list[Gap] = []
    if video.old.state == VideoState.REJECTED:
        return missing
    found, duration_us = video.curves, video.old.duration_us
    ends = np.concatenate([[0], found.end_us])
    starts = np.concatenate([found.start_us, [duration_us]])
    open_us = ends < starts
    for start, end in zip(ends[open_us].tolist(), starts[open_us].tolist(), strict=True):
        at = start
        for gap in old_gaps:
            if gap.end_us <= at or gap.start_us >= end:
                continue
            if gap.start_us > at:
                missing.append(Gap(at, gap.start_us, GapKind.NOT_EMBEDDED, NOT_EMBEDDED))
                at = gap.start_us
            missing.append(Gap(at, min(gap.end_us, end), gap.kind, gap.detail))
            at = min(gap.end_us, end)
        if at < end:
            missing.append(Gap(at, end, GapKind.NOT_EMBEDDED, NOT_EMBEDDED))
    return missing


def _task(times: Ints, duration_us: int, gap_us: int) -> dict[str, Any]:
    """One finished task that answers for the whole video."""
    last = int(times[-1, BUCKET]) + 1 if len(times) else 0
    return {
        "ordinal": 0,
        "bucket_start": 0,
        "bucket_end": last,
        "start_us": 0,
        "end_us": duration_us,
        "plan": FrameRange(0, last, 0, duration_us, None, (), ()).to_json(),
        "state": TaskState.DONE,
        "attempts": 0,
        "fence": 0,
        "not_before_ms": 0,
        "samples": len(times),
        "gap_us": gap_us,
    }
