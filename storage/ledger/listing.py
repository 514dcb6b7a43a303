"""The files of a submitted job: listed at once, then probed by workers, one probe a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, exists, literal_column, or_, update

from storage.dialect import insert
from storage.records import ArchiveFile, GapKind, TaskState, VideoState
from storage.schema import files, job_videos, probes, tasks

SEEN_ANEW = (
    *("size_bytes", "mtime_ns"),
    *("state", "attempts", "not_before_ms", "done_ms", "error_kind", "error"),
)
"""Columns of a probe that a later listing of its file begins anew."""
ENDED = (TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED)
AT_ONCE = 1000
"""Rows a statement, since a statement's parameters are bounded."""


def path_key(path_raw: bytes) -> bytes:
    """What a path is found by: a path may be longer than an index row, its digest never is."""
    return hashlib.sha256(path_raw).digest()


def add_probes(
    connection: Connection,
    job_id: int,
    listed: Sequence[ArchiveFile],
    unreadable: Mapping[bytes, str],
) -> None:
    """Within a transaction: have each file probed; one that was probed before is looked at again.
    `unreadable` are names, as bytes, of what cannot even be looked at, each with its reason.

    A probe that is still open stays what it is.
    """
    blank: dict[str, Any] = {"attempts": 0, "not_before_ms": 0, "done_ms": None}
    waits = {**blank, "state": TaskState.PENDING, "error_kind": None, "error": None}
    rows: list[dict[str, Any]] = [
        {"path_raw": file.path_raw, "size_bytes": file.size_bytes, "mtime_ns": file.mtime_ns}
        | waits
        for file in listed
    ]
    failed = {**blank, "state": TaskState.FAILED, "error_kind": "unreadable"}
    rows += [
        {"path_raw": path_raw, "size_bytes": -1, "mtime_ns": -1, "error": reason} | failed
        for path_raw, reason in unreadable.items()
    ]
    for row in rows:
        row |= {"job_id": job_id, "path_sha256": path_key(row["path_raw"]), "fence": 0}
    statement = insert(connection, probes)
    statement = statement.on_conflict_do_update(
        index_elements=["job_id", "path_sha256"],
        set_={name: statement.excluded[name] for name in SEEN_ANEW},
        where=probes.c.state.in_([literal_column(f"'{state}'") for state in ENDED]),
    )
    for at in range(0, len(rows), AT_ONCE):
        connection.execute(statement, rows[at : at + AT_ONCE])


def given_up(table: Table, kind: str | None) -> ColumnElement[bool]:
    """Condition on `tasks` or `probes` that the work has failed or was cancelled, for this kind of
    reason or any: that of its error, or that of the gap which it has left."""
    if kind == GapKind.CANCELLED:
        return table.c.state == TaskState.CANCELLED
    if kind == GapKind.TASK_FAILED and table is tasks:
        return table.c.state == TaskState.FAILED
    lost = table.c.state.in_([TaskState.FAILED, TaskState.CANCELLED])
    return lost if kind is None else lost & (table.c.error_kind == kind)


def again(connection: Connection, job_id: int, *, kind: str | None, video_id: int | None) -> int:
    """Within a transaction: have the job's files probed again that could not be, or whose video was
    rejected; return their number."""
    of_path = files.c.path_sha256 == probes.c.path_sha256
    rejected = (
        exists()
        .where(of_path, files.c.video_id == job_videos.c.video_id)
        .where(job_videos.c.job_id == job_id, job_videos.c.state == VideoState.REJECTED)
    )
    if kind is not None:
        rejected = rejected.where(job_videos.c.reason_kind == kind)
    chosen = or_(given_up(probes, kind), (probes.c.state == TaskState.DONE) & rejected)
    if video_id is not None:
        chosen &= exists().where(of_path, files.c.video_id == video_id)
    return connection.execute(
        update(probes)
        .where(probes.c.job_id == job_id, chosen)
        .values(
            state=TaskState.PENDING,
            attempts=0,
            not_before_ms=0,
            done_ms=None,
            error_kind=None,
            error=None,
            worker=None,
        )
    ).rowcount
