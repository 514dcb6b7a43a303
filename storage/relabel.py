"""New labels for a job that is done: from its stored embeddings, without a picture being decoded
or sent. What comes of it is a job of its own beside the old one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, Row, delete, select
from sqlalchemy import insert as plain_insert

from storage import ledger, vectors
from storage.bulk import insert_columns
from storage.columns import Ints, SampleColumns
from storage.database import reading, writing
from storage.dialect import Now, upsert
from storage.flags import flag_rows
from storage.labels import label_set, label_vectors
from storage.ledger import Job, JobState
from storage.ledger.closing import scene_row, standing
from storage.records import (
    FrameRange,
    Gap,
    GapKind,
    JobSpec,
    Label,
    LabelSet,
    TaskState,
    VideoState,
)
from storage.scenes import labelled_scenes, picture_changes
from storage.schema import flags, gaps, job_videos, jobs, predictions, samples, scenes, tasks
from storage.scoring import Single, best_labels, similarities
from storage.vectors import VideoVectors

_SAMPLES_AT_ONCE = 20_000
"""Samples that one transaction writes, of a video without any one; other writers wait no longer
than for these, and so many numbers of videos go into one statement."""

NOT_EMBEDDED = "no stored embedding: its API gave similarities only"


class CannotRelabel(Exception):
    """The job cannot be given other labels without its pictures being sent again."""


def check(engine: Engine, job: Job) -> None:
    """Return where the job can be given other labels.

    Raises CannotRelabel where it is not done, or nothing of it is embedded.
    """
    if job.state is not JobState.CLOSED:
        raise CannotRelabel(
            f"job {job.id} is not done: finish it first with the `nightreel run` that began it"
        )
    with reading(engine) as connection:
        if not any(_stored(connection, job)):
            raise CannotRelabel(
                f"job {job.id} has no stored embeddings: an API that only compares gives none, so "
                "other labels need `nightreel run` with the pictures sent again"
            )


def new_job(engine: Engine, job: Job, labels: LabelSet) -> Job:
    """The job that holds this job's samples under other labels, made if there is none.

    The same job and labels are always the same new job. Raises CannotRelabel as `check` does.
    """
    check(engine, job)
    asked = ["relabel", job.key, labels.digest]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    spec = JobSpec(
        key, labels.name, job.sampling, job.fit, job.top_n, labels, job.model, job.notice
    )
    return ledger.open_job(engine, spec)


def relabel(
    engine: Engine,
    source: Job,
    target: Job,
    *,
    progress: Callable[[int], None] = lambda samples: None,
) -> None:
    """Fill the job made by `new_job` from the stored vectors, and close it.

    The label set's vectors must be stored (`labels.store_label_vectors`). Videos that stand in
    `target` already and have not changed in `source` are left as they are, so an interrupted call
    may be repeated. `progress` is told the number of samples after each transaction. Time without
    a stored vector becomes a gap that says so.
    """
    named = label_set(engine, target.label_set_id).labels
    matrix = label_vectors(engine, target.label_set_id, target.model)
    if matrix is None:
        raise ValueError(f"the vectors of label set {target.label_set_id} are not stored")
    with reading(engine) as connection:
        waiting = _waiting(connection, source.id, target.id)
        old_gaps = _gaps_of(connection, source.id)
        with vectors.ahead(_stored(connection, source) if waiting else ()) as stored:
            answered = (
                _answered(row, found, old_gaps.get(row.video_id, []), named, matrix, target)
                for row, found in _paired(waiting, stored)
            )
            for size in _written(engine, target.id, _batches(answered)):
                progress(size)
    ledger.finish_planning(engine, target.id)
    ledger.close_finished(engine, target.id)


def _stored(connection: Connection, job: Job) -> Iterator[VideoVectors]:
    return vectors.of_job(connection, job.id, job.sampling, job.fit, job.model)


def _waiting(connection: Connection, source: int, target: int) -> Sequence[Row[*tuple[Any, ...]]]:
    """The rows of the source's closed videos that the target lacks or holds as they were, by
    number of video."""
    there = job_videos.alias()
    return connection.execute(
        select(job_videos)
        .outerjoin(there, (there.c.job_id == target) & (there.c.video_id == job_videos.c.video_id))
        .where(
            job_videos.c.job_id == source,
            job_videos.c.state != VideoState.RUNNING,
            (there.c.closed_ms.is_(None)) | (there.c.closed_ms < job_videos.c.closed_ms),
        )
        .order_by(job_videos.c.video_id)
    ).all()


def _gaps_of(connection: Connection, job_id: int) -> dict[int, list[Gap]]:
    rows = connection.execute(
        select(gaps.c.video_id, gaps.c.start_us, gaps.c.end_us, gaps.c.kind, gaps.c.detail)
        .where(gaps.c.job_id == job_id)
        .order_by(gaps.c.video_id, gaps.c.start_us)
    )
    return {
        video_id: [Gap(start, end, GapKind(kind), detail) for _, start, end, kind, detail in of]
        for video_id, of in groupby(rows, key=lambda row: row.video_id)
    }


def _paired(
    rows: Sequence[Row[*tuple[Any, ...]]], stored: Iterator[VideoVectors]
) -> Iterator[tuple[Row[*tuple[Any, ...]], VideoVectors | None]]:
    """Each video with its vectors, if there are any; both come by number of video."""
    ahead = next(stored, None)
    for row in rows:
        while ahead is not None and ahead.video_id < row.video_id:
            ahead = next(stored, None)
        yield row, ahead if ahead is not None and ahead.video_id == row.video_id else None


@dataclass(frozen=True, slots=True, eq=False)
class _Video:
    """A video as it will stand in the new job."""

    row: dict[str, Any]
    task: dict[str, Any] | None
    samples: SampleColumns
    gaps: list[Gap]
    scenes: list[dict[str, Any]]
    flags: list[dict[str, Any]]


def _answered(  # noqa: PLR0917
    old: Row[*tuple[Any, ...]],
    stored: VideoVectors | None,
    old_gaps: Sequence[Gap],
    named: Sequence[Label],
    matrix: Single,
    target: Job,
) -> _Video:
    row = {
        "video_id": old.video_id,
        "state": old.state,
        "duration_us": old.duration_us,
        "analysed_us": 0,
        "reason_kind": old.reason_kind,
        "reason": old.reason,
        "opening": 1,
    }
    if old.state == VideoState.REJECTED:
        return _Video(
            row, None, _columns(np.empty((0, 4), np.int64), None, target.top_n), [], [], []
        )
    times = stored.times if stored is not None else np.empty((0, 4), np.int64)
    scores = similarities(stored.vectors, matrix) if stored is not None else None
    found = _columns(times, scores, target.top_n)
    missing = _uncovered(found, old.duration_us, old_gaps)
    gap_us = sum(gap.end_us - gap.start_us for gap in missing)
    row["analysed_us"] = old.duration_us - gap_us
    row["state"], (row["reason_kind"], row["reason"]) = standing(row["analysed_us"], missing)
    return _Video(
        row,
        _task(found, old.duration_us, gap_us),
        found,
        missing,
        [
            scene_row(label, scene)
            for label, scene in labelled_scenes(
                found,
                missing,
                [label.name for label in named],
                changes=picture_changes(stored.vectors) if stored is not None else None,
            )
        ],
        flag_rows(found, named),
    )


def _columns(times: Ints, scores: Single | None, top_n: int) -> SampleColumns:
    bucket, t_us, start_us, end_us = times.T
    if scores is None:
        none = np.empty((0, 1))
        return SampleColumns(bucket, t_us, start_us, end_us, none.astype(np.int64), none, none)
    label, similarity, confidence = best_labels(scores, top_n)
    return SampleColumns(
        bucket,
        t_us,
        start_us,
        end_us,
        label.astype(np.int64),
        similarity.astype(np.float64),
        confidence.astype(np.float64),
    )


def _uncovered(found: SampleColumns, duration_us: int, old_gaps: Sequence[Gap]) -> list[Gap]:
    """Gaps over all of [0, duration_us) for which no sample answers: the old ones as far as they
    still are gaps, and what was analysed without being embedded."""
    missing: list[Gap] = []
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


def _task(found: SampleColumns, duration_us: int, gap_us: int) -> dict[str, Any]:
    """One finished task that answers for the whole video."""
    last = int(found.bucket[-1]) + 1 if len(found) else 0
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
        "samples": len(found),
        "gap_us": gap_us,
    }


def _batches(videos: Iterable[_Video]) -> Iterator[list[_Video]]:
    """The videos, as many together as one transaction writes."""
    batch, size = [], 0
    for video in videos:
        batch.append(video)
        size += max(len(video.samples), 1)
        if size >= _SAMPLES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _written(engine: Engine, job_id: int, batches: Iterable[Sequence[_Video]]) -> Iterator[int]:
    """Write each batch in a thread of its own while the next is worked out; the number of its
    samples as soon as they stand."""
    with ThreadPoolExecutor(1, "relabel") as thread:
        before: Future[int] | None = None
        for batch in batches:
            if before is not None:
                yield before.result()
            before = thread.submit(_write, engine, job_id, batch)
        if before is not None:
            yield before.result()


def _write(engine: Engine, job_id: int, batch: Sequence[_Video]) -> int:
    """Write videos in one transaction; the number of their samples."""
    with writing(engine) as connection:
        # Who relabels the same job in the same way at once waits, and writes the same over it.
        connection.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())
        ids = [video.row["video_id"] for video in batch]
        of_these = (job_videos.c.job_id == job_id) & job_videos.c.video_id.in_(ids)
        there = connection.scalars(select(job_videos.c.video_id).where(of_these)).all()
        # Not without need: PostgreSQL may read a table of millions of rows to find none.
        for table in (samples, predictions, gaps, scenes, flags, tasks) if there else ():
            connection.execute(
                delete(table).where(table.c.job_id == job_id, table.c.video_id.in_(there))
            )
        now_ms = connection.execute(select(Now())).scalar_one()
        rows = [{"job_id": job_id, "closed_ms": now_ms, **video.row} for video in batch]
        upsert(connection, job_videos, rows)
        readable = [video for video in batch if video.task is not None]
        if readable:
            _write_found(connection, job_id, now_ms, readable)
    return sum(len(video.samples) for video in batch)


def _write_found(
    connection: Connection, job_id: int, now_ms: int, videos: Sequence[_Video]
) -> None:
    """What was found in videos that can be read: a statement or two for each table, so that many
    small videos are no slower than a few large ones."""
    keyed = [({"job_id": job_id, "video_id": one.row["video_id"]}, one) for one in videos]
    made = connection.execute(
        plain_insert(tasks).returning(tasks.c.video_id, tasks.c.id),
        [key | {"done_ms": now_ms} | one.task for key, one in keyed if one.task is not None],
    )
    task_of = {row.video_id: row.id for row in made}
    _write_samples(connection, job_id, [one for one in videos if len(one.samples)])
    gap_rows = [
        {
            **key,
            "start_us": gap.start_us,
            "end_us": gap.end_us,
            "kind": gap.kind,
            "detail": gap.detail,
            "task_id": task_of[key["video_id"]],
        }
        for key, one in keyed
        for gap in one.gaps
    ]
    for table, rows in (
        (gaps, gap_rows),
        (scenes, [key | row for key, one in keyed for row in one.scenes]),
        (flags, [key | row for key, one in keyed for row in one.flags]),
    ):
        if rows:
            connection.execute(plain_insert(table), rows)


def _write_samples(connection: Connection, job_id: int, videos: Sequence[_Video]) -> None:
    """Samples and predictions of videos, each of which has some: as many predictions a sample."""
    if not videos:
        return

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(one.samples, name) for one in videos])

    video_id = np.repeat(
        [one.row["video_id"] for one in videos], [len(one.samples) for one in videos]
    )
    bucket = column("bucket")
    times = {name: column(name) for name in ("t_us", "start_us", "end_us")}
    insert_columns(
        connection, samples, {"job_id": job_id, "video_id": video_id, "bucket": bucket, **times}
    )
    best = {name: column(name) for name in ("label", "similarity", "confidence")}
    count, ranks = best["label"].shape
    insert_columns(
        connection,
        predictions,
        {
            "job_id": job_id,
            "video_id": np.repeat(video_id, ranks),
            "bucket": np.repeat(bucket, ranks),
            "rank": np.tile(np.arange(ranks), count),
            **{name: values.ravel() for name, values in best.items()},
        },
    )
