"""What of a job was given up, one row each: files, videos and ranges, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from sqlalchemy import Connection, Engine, exists, select

from storage.database import reading
from storage.records import TaskState, VideoState, shown_path
from storage.schema import files, job_videos, probes, tasks
from storage.summaries import known_places, nowhere


class Lost(StrEnum):
    """How much was given up."""

    FILE = "file"
    """Never probed to the end, so that it is no video of the job yet."""
    VIDEO = "video"
    """Rejected, or nothing of it could be analysed."""
    RANGE = "range"
    """One task."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that was given up."""

    lost: Lost
    video_id: int | None
    path: str
    start_us: int | None
    """Of a range."""
    end_us: int | None
    kind: str | None
    error: str | None
    attempts: int | None
    worker: str | None
    """Whose attempt was the last."""
    ended_ms: int | None


def failures(
    engine: Engine, job_id: int, *, kind: str | None = None, limit: int
) -> tuple[list[Failure], bool]:
    """The first `limit` things of the job that were given up, for this kind of reason or any, and
    whether there are more: files first, then by number of video and by time."""
    with reading(engine) as connection:
        unread = list(_files(connection, job_id, kind, limit + 1))
        rest = [
            *_videos(connection, job_id, kind, limit + 1),
            *_ranges(connection, job_id, kind, limit + 1),
        ]
    # A video stands before its ranges.
    rest.sort(key=lambda one: (one.video_id or 0, -1 if one.start_us is None else one.start_us))
    found = [*unread, *rest]
    return _named(engine, found[:limit]), len(found) > limit


def _named(engine: Engine, found: list[Failure]) -> list[Failure]:
    numbers = sorted({one.video_id for one in found if one.video_id is not None})
    path_of = known_places(engine, numbers)
    return [
        one
        if one.video_id is None
        else replace(one, path=path_of.get(one.video_id) or nowhere(one.video_id))
        for one in found
    ]


def _files(connection: Connection, job_id: int, kind: str | None, limit: int) -> Iterator[Failure]:
    # At the end of planning they become rejected videos.
    rejected = exists().where(
        files.c.path_sha256 == probes.c.path_sha256,
        job_videos.c.video_id == files.c.video_id,
        job_videos.c.job_id == job_id,
    )
    query = select(probes).where(
        probes.c.job_id == job_id, probes.c.state == TaskState.FAILED, ~rejected
    )
    if kind is not None:
        query = query.where(probes.c.error_kind == kind)
    for row in connection.execute(query.order_by(probes.c.id).limit(limit)):
        yield Failure(
            lost=Lost.FILE,
            video_id=None,
            path=shown_path(row.path_raw),
            start_us=None,
            end_us=None,
            kind=row.error_kind,
            error=row.error,
            attempts=row.attempts,
            worker=row.worker,
            ended_ms=row.done_ms,
        )


def _videos(connection: Connection, job_id: int, kind: str | None, limit: int) -> Iterator[Failure]:
    query = select(job_videos).where(
        job_videos.c.job_id == job_id,
        job_videos.c.state.in_([VideoState.REJECTED, VideoState.FAILED]),
    )
    if kind is not None:
        query = query.where(job_videos.c.reason_kind == kind)
    for row in connection.execute(query.order_by(job_videos.c.video_id).limit(limit)):
        yield Failure(
            lost=Lost.VIDEO,
            video_id=row.video_id,
            path="",
            start_us=None,
            end_us=None,
            kind=row.reason_kind,
            error=row.reason,
            attempts=None,
            worker=None,
            ended_ms=row.closed_ms,
        )


def _ranges(connection: Connection, job_id: int, kind: str | None, limit: int) -> Iterator[Failure]:
    query = select(tasks).where(tasks.c.job_id == job_id, tasks.c.state == TaskState.FAILED)
    if kind is not None:
        query = query.where(tasks.c.error_kind == kind)
    for row in connection.execute(query.order_by(tasks.c.video_id, tasks.c.ordinal).limit(limit)):
        yield Failure(
            lost=Lost.RANGE,
            video_id=row.video_id,
            path="",
            start_us=row.start_us,
            end_us=row.end_us,
            kind=row.error_kind,
            error=row.error,
            attempts=row.attempts,
            worker=row.worker,
            ended_ms=row.done_ms,
        )
