"""Videos: recognised by content, planned into tasks, or rejected."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from fractions import Fraction
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, delete, exists, select, update
from sqlalchemy import insert as plain_insert

from storage.database import reading, writing
from storage.dialect import Now, insert, one_line
from storage.ledger.job import JobState, reopen
from storage.ledger.listing import path_key
from storage.recorded import recorded
from storage.records import (
    ArchiveFile,
    FrameRange,
    Sampling,
    TaskState,
    VideoInfo,
    VideoState,
)
from storage.schema import files, job_videos, jobs, tasks, videos


def register_file(engine: Engine, file: ArchiveFile, content_id: str) -> int:
    """The number of the video that the file holds.

    The same content elsewhere is the same video; other content at the same path is another one.
    """
    with writing(engine) as connection:
        return register_in(connection, file, content_id)


def register_in(connection: Connection, file: ArchiveFile, content_id: str) -> int:
    """`register_file` within a transaction."""
    connection.execute(
        insert(connection, videos)
        .values(content_id=content_id)
        .on_conflict_do_nothing(index_elements=["content_id"])
    )
    known = select(videos.c.id).where(videos.c.content_id == content_id)
    video_id = connection.scalars(known).one()
    found = {
        "size_bytes": file.size_bytes,
        "mtime_ns": file.mtime_ns,
        "video_id": video_id,
        "seen_ms": Now(),
    }
    connection.execute(
        insert(connection, files)
        .values(
            path_sha256=path_key(file.path_raw), path_raw=file.path_raw, path=file.shown, **found
        )
        .on_conflict_do_update(index_elements=["path_sha256"], set_=found)
    )
    return int(video_id)


def known_video(engine: Engine, file: ArchiveFile) -> int | None:
    """The video that stood at this path with this size and modification time, so that the file
    need not be read again; None where it must be."""
    with reading(engine) as connection:
        return connection.scalar(
            select(files.c.video_id).where(
                files.c.path_sha256 == path_key(file.path_raw),
                files.c.size_bytes == file.size_bytes,
                files.c.mtime_ns == file.mtime_ns,
            )
        )


def video_in_job(engine: Engine, job_id: int, video_id: int) -> VideoState | None:
    """How the video stands in the job; None where the job does not know it."""
    with reading(engine) as connection:
        state = connection.scalar(
            select(job_videos.c.state).where(
                job_videos.c.job_id == job_id, job_videos.c.video_id == video_id
            )
        )
    return None if state is None else VideoState(state)


def plan_video(
    engine: Engine, job_id: int, video_id: int, info: VideoInfo, ranges: Sequence[FrameRange]
) -> None:
    """Write a video's facts and its tasks into the job, all at once.

    Planning again changes nothing, save for a video that had been rejected. ValueError where the
    ranges do not tile [0, `info.duration_us`): what no task answers for would be lost in silence.
    """
    with writing(engine) as connection:
        plan_in(connection, job_id, video_id, info, ranges)


def plan_in(
    connection: Connection,
    job_id: int,
    video_id: int,
    info: VideoInfo,
    ranges: Sequence[FrameRange],
) -> None:
    """`plan_video` within a transaction."""
    _check_tiling(ranges, info.duration_us)
    planned = {"state": VideoState.RUNNING, "duration_us": info.duration_us, "analysed_us": 0}
    statement = insert(connection, job_videos).values(
        job_id=job_id, video_id=video_id, opening=1, **planned
    )
    new = connection.execute(
        statement.on_conflict_do_update(
            index_elements=["job_id", "video_id"],
            set_={
                **planned,
                "opening": job_videos.c.opening + 1,
                "reason_kind": None,
                "reason": None,
                "closed_ms": None,
            },
            where=job_videos.c.state == VideoState.REJECTED,
        ).returning(job_videos.c.video_id)
    ).first()
    if new is None:
        return
    facts = columns_of(info) | _recorded(connection, video_id, info)
    connection.execute(update(videos).where(videos.c.id == video_id).values(facts))
    if ranges:
        connection.execute(
            plain_insert(tasks),
            [
                {
                    "job_id": job_id,
                    "video_id": video_id,
                    "ordinal": ordinal,
                    "bucket_start": one.bucket_start,
                    "bucket_end": one.bucket_end,
                    "start_us": one.start_us,
                    "end_us": one.end_us,
                    "plan": one.to_json(),
                    "state": TaskState.PENDING,
                    "attempts": 0,
                    "fence": 0,
                    "not_before_ms": 0,
                    "samples": 0,
                    "gap_us": 0,
                }
                for ordinal, one in enumerate(ranges)
            ],
        )
    reopen(connection, job_id)


def _recorded(connection: Connection, video_id: int, info: VideoInfo) -> dict[str, str]:
    """The columns that tell the day of recording; none where it is unknown."""
    file = connection.execute(
        select(files.c.path, files.c.mtime_ns)
        .where(files.c.video_id == video_id)
        .order_by(files.c.seen_ms.desc(), files.c.id.desc())
        .limit(1)
    ).first()
    path, mtime_ns = ("", 0) if file is None else file
    found = recorded(info.created, path, mtime_ns)
    if found is None:
        return {}
    day, source = found
    return {"recorded_on": day.isoformat(), "recorded_from": source}


def places(engine: Engine, video_id: int) -> list[bytes]:
    """The names under which files hold the video, as bytes."""
    with reading(engine) as connection:
        found = select(files.c.path_raw).where(files.c.video_id == video_id)
        return [bytes(name) for name in connection.scalars(found)]


def planning_goes_on(engine: Engine) -> bool:
    """Whether files of any job that runs are still to be listed or probed, so that a video that
    lies nowhere may yet be found."""
    going_on = exists().where(jobs.c.state == JobState.RUNNING, ~jobs.c.planning_finished)
    with reading(engine) as connection:
        return bool(connection.scalar(select(going_on)))


def forget_places(engine: Engine, video_id: int, gone: Sequence[bytes]) -> None:
    """Forget names at which the video lies no more, since it was moved."""
    with writing(engine) as connection:
        connection.execute(
            delete(files).where(files.c.video_id == video_id, files.c.path_raw.in_(gone))
        )


def content_id(engine: Engine, video_id: int) -> str:
    """The identity of the video's content."""
    with reading(engine) as connection:
        found = select(videos.c.content_id).where(videos.c.id == video_id)
        return str(connection.scalars(found).one())


def known_plan(
    engine: Engine, video_id: int, sampling: Sampling
) -> tuple[VideoInfo, list[FrameRange]] | None:
    """The video's facts and ranges as the latest job of this sampling planned them; None where no
    job did, or a release that planned otherwise."""
    planned = (
        select(job_videos.c.job_id)
        .join(jobs, jobs.c.id == job_videos.c.job_id)
        .where(
            job_videos.c.video_id == video_id,
            job_videos.c.state != VideoState.REJECTED,
            jobs.c.sampling == str(sampling),
        )
        .order_by(job_videos.c.job_id.desc())
        .limit(1)
    )
    with reading(engine) as connection:
        job_id = connection.scalar(planned)
        if job_id is None:
            return None
        plans = connection.scalars(
            select(tasks.c.plan)
            .where(tasks.c.job_id == job_id, tasks.c.video_id == video_id)
            .order_by(tasks.c.ordinal)
        ).all()
        facts = select(videos).where(videos.c.id == video_id)
        info = info_of(connection.execute(facts).mappings().one())
    try:
        return info, [FrameRange.from_json(plan) for plan in plans]
    except ValueError:
        return None


def _check_tiling(ranges: Sequence[FrameRange], duration_us: int) -> None:
    edges = [0, *(edge for one in ranges for edge in (one.start_us, one.end_us)), duration_us]
    met = all(edges[i] == edges[i + 1] for i in range(0, len(edges), 2))
    forward = all(one.start_us < one.end_us for one in ranges)
    apart = all(a.bucket_end <= b.bucket_start for a, b in pairwise(ranges))
    if not (met and forward and apart):
        raise ValueError(f"the ranges do not tile the video's [0, {duration_us}) microseconds")


def reject_video(engine: Engine, job_id: int, video_id: int, kind: str, reason: str) -> None:
    """Record that the job cannot read this video, and why; a planned one stays planned."""
    with writing(engine) as connection:
        reject_in(connection, job_id, video_id, kind, reason)


def reject_in(connection: Connection, job_id: int, video_id: int, kind: str, reason: str) -> None:
    """`reject_video` within a transaction."""
    why = {"reason_kind": kind, "reason": one_line(reason), "closed_ms": Now()}
    connection.execute(
        insert(connection, job_videos)
        .values(
            job_id=job_id,
            video_id=video_id,
            state=VideoState.REJECTED,
            duration_us=0,
            analysed_us=0,
            opening=0,
            **why,
        )
        .on_conflict_do_update(
            index_elements=["job_id", "video_id"],
            set_=why,
            where=job_videos.c.state == VideoState.REJECTED,
        )
    )


def reject_unread(engine: Engine, job_id: int, path_raw: bytes, kind: str, reason: str) -> int:
    """Reject a file whose content, and so its identity, is unknown, and return its number. It
    stands under its name, with a size no file has, so that every run looks at it anew.

    Where a video was seen at that name before it is rejected as that one, which keeps its place:
    other jobs may read it there when it is back.
    """
    with writing(engine) as connection:
        return reject_unread_in(connection, job_id, path_raw, kind, reason)


def reject_unread_in(
    connection: Connection, job_id: int, path_raw: bytes, kind: str, reason: str
) -> int:
    """`reject_unread` within a transaction."""
    key = path_key(path_raw)
    known: int | None = connection.scalar(
        update(files)
        .where(files.c.path_sha256 == key)
        .values(size_bytes=-1, mtime_ns=-1)
        .returning(files.c.video_id)
    )
    if known is None:
        file = ArchiveFile(os.fsdecode(path_raw), -1, -1)
        known = register_in(connection, file, f"unread:{key.hex()}")
    reject_in(connection, job_id, known, kind, reason)
    return known


def columns_of(info: VideoInfo) -> dict[str, Any]:
    """The facts of probing as columns of `videos`."""
    columns = asdict(info)
    columns["time_base"] = str(info.time_base)
    columns["frame_rate"] = None if info.frame_rate is None else str(info.frame_rate)
    columns["warnings"] = json.dumps(info.warnings)
    return columns


def info_of(row: RowMapping) -> VideoInfo:
    """The facts of probing from the columns of a planned video."""
    columns = {field.name: row[field.name] for field in fields(VideoInfo)}
    columns["time_base"] = Fraction(columns["time_base"])
    if columns["frame_rate"] is not None:
        columns["frame_rate"] = Fraction(columns["frame_rate"])
    columns["warnings"] = tuple(json.loads(columns["warnings"]))
    return VideoInfo(**columns)
