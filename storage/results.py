"""What workers find: committed once for each range, and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, Row, Table, delete, select, update
from sqlalchemy import insert as plain_insert

from storage.bulk import insert_columns
from storage.database import reading, writing
from storage.dialect import Now, one_line, upsert
from storage.ranges import store_range, tiles
from storage.records import Gap, GapKind, Prediction, RangeResult, SampleResult, TaskState, Usage
from storage.schema import gaps, held, predictions, tasks, usage
from storage.schema import samples as sample_rows

_Row = Row[*tuple[Any, ...]]


def commit(engine: Engine, task_id: int, fence: int, result: RangeResult) -> bool:
    """Write what a task found and mark it done, in one transaction; True once that stands.

    False, with nothing written, where the claim of this fence no longer holds. Committing what
    this fence has committed already is True again. ValueError where samples and gaps do not tile
    the task's interval, or the vectors do not fit the samples.
    """
    gap_us = sum(gap.end_us - gap.start_us for gap in result.gaps)
    with writing(engine) as connection:
        # First, since it takes the row's lock: a zombie is turned away before it writes anything.
        task = connection.execute(
            update(tasks)
            .where(held(task_id, fence))
            .values(
                state=TaskState.DONE,
                done_ms=Now(),
                lease_until_ms=None,
                error_kind=None,
                error=None,
                samples=len(result.samples),
                gap_us=gap_us,
            )
            .returning(
                tasks.c.id,
                tasks.c.job_id,
                tasks.c.video_id,
                tasks.c.fence,
                tasks.c.bucket_start,
                tasks.c.bucket_end,
                tasks.c.start_us,
                tasks.c.end_us,
            )
        ).first()
        if task is None:
            done = select(tasks.c.id).where(
                tasks.c.id == task_id, tasks.c.fence == fence, tasks.c.state == TaskState.DONE
            )
            return connection.scalar(done) is not None
        _check(task, result)
        _write_rows(connection, task, result)
        if result.vectors is not None and result.samples:
            store_range(connection, task, result)
    return True


def _check(task: _Row, result: RangeResult) -> None:
    if not tiles([*result.samples, *result.gaps], task.start_us, task.end_us):
        raise ValueError(
            f"samples and gaps of task {task.id} do not tile "
            f"[{task.start_us}, {task.end_us}) microseconds"
        )
    buckets = [sample.bucket for sample in result.samples]
    ascending = all(a < b for a, b in pairwise(buckets))
    inside = all(task.bucket_start <= bucket < task.bucket_end for bucket in buckets)
    if not (ascending and inside):
        raise ValueError(
            f"samples of task {task.id} are not in ascending buckets of "
            f"[{task.bucket_start}, {task.bucket_end})"
        )
    if result.vectors is not None and len(result.vectors) != 2 * len(buckets) * result.dimension:
        raise ValueError(
            f"task {task.id} has {len(result.vectors)} bytes of vectors for {len(buckets)} samples "
            f"of dimension {result.dimension}"
        )


def _write_rows(connection: Connection, task: _Row, result: RangeResult) -> None:
    of_video = {"job_id": task.job_id, "video_id": task.video_id}
    # Not upserts: the many rows of a range take a quarter of their time like this.
    for table in (sample_rows, predictions):
        connection.execute(
            delete(table).where(
                table.c.job_id == task.job_id,
                table.c.video_id == task.video_id,
                table.c.bucket >= task.bucket_start,
                table.c.bucket < task.bucket_end,
            )
        )
    times = ("bucket", "t_us", "start_us", "end_us")
    if any(one.reused_from is not None or one.audit_of is not None for one in result.samples):
        names = (*times, "reused_from", "audit_of")
        connection.execute(
            plain_insert(sample_rows),
            [of_video | {name: getattr(one, name) for name in names} for one in result.samples],
        )
    else:
        rows = [tuple(getattr(one, name) for name in times) for one in result.samples]
        _insert(connection, sample_rows, of_video, times, rows)
    ranks = ("bucket", "rank", "label", "similarity", "confidence")
    best = [
        (sample.bucket, rank, one.label, one.similarity, one.confidence)
        for sample in result.samples
        for rank, one in enumerate(sample.predictions)
    ]
    _insert(connection, predictions, of_video, ranks, best)
    upsert(
        connection,
        gaps,
        [
            {
                **of_video,
                "start_us": gap.start_us,
                "end_us": gap.end_us,
                "kind": gap.kind,
                "detail": one_line(gap.detail),
                "task_id": task.id,
            }
            for gap in result.gaps
        ],
    )
    _write_usage(connection, task.job_id, task.id, task.fence, result.usage)


def _insert(
    connection: Connection,
    table: Table,
    of_video: Mapping[str, int],
    names: Sequence[str],
    rows: Sequence[tuple[float, ...]],
) -> None:
    if rows:
        columns = map(np.array, zip(*rows, strict=True))
        insert_columns(connection, table, {**of_video, **dict(zip(names, columns, strict=True))})


def record_usage(engine: Engine, job_id: int, task_id: int, fence: int, spent: Usage) -> None:
    """Keep what an attempt at a task has cost that ended without a commit; a job that was purged
    meanwhile keeps nothing."""
    with writing(engine) as connection:
        if connection.scalar(select(tasks.c.id).where(tasks.c.id == task_id)) is not None:
            _write_usage(connection, job_id, task_id, fence, spent)


def _write_usage(
    connection: Connection, job_id: int, task_id: int, fence: int, spent: Usage
) -> None:
    key = {"job_id": job_id, "task_id": task_id, "fence": fence}
    upsert(connection, usage, [key | dataclasses.asdict(spent)])


def samples(engine: Engine, job_id: int, video_id: int) -> list[SampleResult]:
    """The job's samples of one video with their best labels, in order of time."""
    with reading(engine) as connection:
        return samples_in(connection, job_id, video_id)


def samples_in(connection: Connection, job_id: int, video_id: int) -> list[SampleResult]:
    """The same within a transaction."""
    best: dict[int, list[Prediction]] = {}
    for bucket, label, similarity, confidence in connection.execute(
        select(
            predictions.c.bucket,
            predictions.c.label,
            predictions.c.similarity,
            predictions.c.confidence,
        )
        .where(predictions.c.job_id == job_id, predictions.c.video_id == video_id)
        .order_by(predictions.c.bucket, predictions.c.rank)
    ):
        best.setdefault(bucket, []).append(Prediction(label, similarity, confidence))
    rows = connection.execute(
        select(
            sample_rows.c.bucket,
            sample_rows.c.t_us,
            sample_rows.c.start_us,
            sample_rows.c.end_us,
            sample_rows.c.reused_from,
            sample_rows.c.audit_of,
        )
        .where(sample_rows.c.job_id == job_id, sample_rows.c.video_id == video_id)
        .order_by(sample_rows.c.bucket)
    )
    return [
        SampleResult(
            bucket, t_us, start_us, end_us, tuple(best.get(bucket, ())), reused_from, audit_of
        )
        for bucket, t_us, start_us, end_us, reused_from, audit_of in rows
    ]


def gaps_in(connection: Connection, job_id: int, video_id: int) -> list[Gap]:
    """The job's gaps of one video so far, in order of time."""
    rows = connection.execute(
        select(gaps.c.start_us, gaps.c.end_us, gaps.c.kind, gaps.c.detail)
        .where(gaps.c.job_id == job_id, gaps.c.video_id == video_id)
        .order_by(gaps.c.start_us)
    )
    return [Gap(start, end, GapKind(kind), detail) for start, end, kind, detail in rows]
