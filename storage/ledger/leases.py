"""The way of a unit of work through the ledger: pending, queued, leased, done or failed.

A unit is a task (a range to classify) or a probe (a file to plan). Every step is one short
transaction, and the last word is always the row's: `state`, and the `fence` that each claim counts
up, so that whoever held an older claim can write nothing any more. Leases and delays are held to
the database's clock.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Table,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from storage.database import writing
from storage.dialect import Now, lock_ledger, one_line
from storage.ledger.job import JobState
from storage.ledger.planning import info_of
from storage.records import ArchiveFile, Fit, FrameRange, Sampling, TaskState, VideoInfo
from storage.schema import files, held, in_flight, jobs, probes, tasks, videos

MAX_ATTEMPTS = 5
"""Attempts at work whose workers vanish, after which it has failed."""

WORKER_LOST = "worker-lost"
"""Error kind of work whose lease ran out."""

INCOMPATIBLE = "incompatible-plan"
"""Error kind of a task that waits for a worker of the release that planned it."""

INCOMPATIBLE_REST_S = 600.0


class IncompatiblePlan(Exception):
    """The task's plan is of another release than this worker."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A task under lease: all that a worker needs to run it."""

    task_id: int
    fence: int
    attempts: int
    """Attempts spent, this one included."""
    job_id: int
    video_id: int
    content_id: str
    files: tuple[ArchiveFile, ...]
    """Every place that the video was seen at, as it was seen there, the latest first."""
    info: VideoInfo
    frame_range: FrameRange
    sampling: Sampling
    fit: Fit
    top_n: int
    label_set_id: int
    model: str


@dataclass(frozen=True, slots=True)
class SweepCount:
    """What a sweep found."""

    expired: int
    """Leases that ran out: pending again."""
    unqueued: int
    """Messages that nobody answered: pending again."""
    failed: int
    """Leases that ran out on the last attempt."""


def unqueue(engine: Engine, ids: Sequence[int], table: Table = tasks) -> None:
    """Take back work whose publishing failed; what a worker has claimed is left alone."""
    if not ids:
        return
    with writing(engine) as connection:
        connection.execute(
            update(table)
            .where(table.c.id.in_(ids), table.c.state == TaskState.QUEUED)
            .values(state=TaskState.PENDING, queued_ms=None)
        )


def take(
    connection: Connection, table: Table, row_id: int, worker: str, lease_s: float
) -> int | None:
    """Within a transaction: lease the row to this worker and return the fence of the claim, or
    None where it is done, at work elsewhere, not due, its job is paused, or it does not exist."""
    fence: int | None = connection.scalar(
        _taking(table),
        {"wanted": row_id, "taken_by": worker, "lease_ms": round(lease_s * 1000)},
    )
    return fence


@functools.cache  # to build it takes a third of a claim
def _taking(table: Table) -> ReturningUpdate[int]:
    job_state = select(jobs.c.state).where(jobs.c.id == table.c.job_id).scalar_subquery()
    return (
        update(table)
        .where(
            table.c.id == bindparam("wanted"),
            # A lease that has run out is for the sweep to take: after an outage it gives the owner
            # time to say that it lives.
            table.c.state.in_([TaskState.PENDING, TaskState.QUEUED]),
            table.c.not_before_ms <= Now(),
            job_state == JobState.RUNNING,
        )
        .values(
            state=TaskState.LEASED,
            attempts=table.c.attempts + 1,
            fence=table.c.fence + 1,
            queued_ms=None,
            lease_until_ms=Now() + bindparam("lease_ms", type_=BigInteger),
            worker=bindparam("taken_by"),
        )
        .returning(table.c.fence)
    )


def claim(engine: Engine, task_id: int, worker: str, lease_s: float) -> Claim | None:
    """Lease the task to this worker, or None where the ledger has no use for that: it is done, at
    work elsewhere, not due, its job is paused, or it does not exist. Then drop the message.

    Raises IncompatiblePlan, and leaves the task, with that as its error, for a worker that can.
    """
    with writing(engine) as connection:
        fence = take(connection, tasks, task_id, worker, lease_s)
        if fence is None:
            return None
        row = (
            connection.execute(
                select(
                    tasks.c.attempts,
                    tasks.c.plan,
                    tasks.c.job_id,
                    tasks.c.video_id,
                    *(column for column in videos.c if column.name != "id"),
                    jobs.c.sampling,
                    jobs.c.fit,
                    jobs.c.top_n,
                    jobs.c.label_set_id,
                    jobs.c.model,
                    jobs.c.version,
                )
                .join(videos, videos.c.id == tasks.c.video_id)
                .join(jobs, jobs.c.id == tasks.c.job_id)
                .where(tasks.c.id == task_id)
            )
            .mappings()
            .one()
        )
        places = connection.execute(
            select(files.c.path_raw, files.c.size_bytes, files.c.mtime_ns)
            .where(files.c.video_id == row["video_id"])
            .order_by(files.c.seen_ms.desc(), files.c.id.desc())
        ).all()
    with readable(engine, task_id, fence, row["version"]):
        return Claim(
            task_id=task_id,
            fence=fence,
            attempts=row["attempts"],
            job_id=row["job_id"],
            video_id=row["video_id"],
            content_id=row["content_id"],
            files=tuple(
                ArchiveFile(os.fsdecode(path_raw), size_bytes, mtime_ns)
                for path_raw, size_bytes, mtime_ns in places
            ),
            info=info_of(row),
            frame_range=FrameRange.from_json(row["plan"]),
            sampling=Sampling.parse(row["sampling"]),
            fit=Fit(row["fit"]),
            top_n=row["top_n"],
            label_set_id=row["label_set_id"],
            model=row["model"],
        )


@contextmanager
def readable(
    engine: Engine, row_id: int, fence: int, planned_by: str, table: Table = tasks
) -> Iterator[None]:
    """Within, a claim is read from its rows; what another release wrote and this one cannot read
    is put back without an attempt, for a worker that can. Raises IncompatiblePlan."""
    try:
        yield
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
        said = (
            f"this worker, of nightreel {version('nightreel')}, cannot read what nightreel "
            f"{planned_by} planned: {error}"
        )
        release(engine, row_id, fence, INCOMPATIBLE_REST_S, INCOMPATIBLE, said, table)
        raise IncompatiblePlan(said) from error


def heartbeat(
    engine: Engine, row_id: int, fence: int, lease_s: float, table: Table = tasks
) -> bool:
    """Extend the lease from now on; False where the claim no longer holds."""
    with writing(engine) as connection:
        extended = connection.execute(
            update(table).where(held(row_id, fence, table)).values(lease_until_ms=after(lease_s))
        )
    return extended.rowcount == 1


def release(  # noqa: PLR0917
    engine: Engine,
    row_id: int,
    fence: int,
    delay_s: float,
    kind: str,
    message: str,
    table: Table = tasks,
) -> bool:
    """Put the work back for at least `delay_s` seconds and give it the attempt back: what stopped
    it was no fault of its own. False where the claim no longer holds."""
    with writing(engine) as connection:
        released = connection.execute(
            update(table)
            .where(held(row_id, fence, table))
            .values(
                state=TaskState.PENDING,
                attempts=table.c.attempts - 1,
                not_before_ms=after(delay_s),
                lease_until_ms=None,
                error_kind=kind,
                error=one_line(message),
            )
        )
    return released.rowcount == 1


def give_back(  # noqa: PLR0917
    engine: Engine,
    row_id: int,
    fence: int,
    kind: str,
    message: str,
    max_attempts: int,
    backoff_s: float,
    table: Table = tasks,
) -> TaskState:
    """Put the work back for at least `backoff_s` seconds, the attempt spent; failed where it was
    the last one. Returns the row's state, which is another's doing where the claim no longer
    holds; a purged row counts as cancelled."""
    spent = table.c.attempts >= max_attempts
    with writing(engine) as connection:
        connection.execute(
            update(table)
            .where(held(row_id, fence, table))
            .values(
                state=case((spent, TaskState.FAILED), else_=TaskState.PENDING),
                done_ms=case((spent, Now()), else_=None),
                not_before_ms=after(backoff_s),
                lease_until_ms=None,
                error_kind=kind,
                error=one_line(message),
            )
        )
        state = connection.scalar(select(table.c.state).where(table.c.id == row_id))
    return TaskState.CANCELLED if state is None else TaskState(state)


def sweep(
    engine: Engine,
    queued_timeout_s: float,
    max_attempts: int = MAX_ATTEMPTS,
    *,
    waiting: int | None = 0,
) -> SweepCount:
    """Find what was lost: leases of vanished workers, and messages that no worker answered.

    Work whose workers vanish `max_attempts` times has failed: it may be what kills them. `waiting`
    is how many messages the queue holds, None where it cannot be asked: as long as those account
    for all that is queued nothing is lost, however long it waits, and to send it again would only
    pile it up.
    """
    expired = unqueued = failed = 0
    with writing(engine) as connection:
        lock_ledger(connection)
        queued = sum(_queued(connection, table) for table in (tasks, probes))
        lost = waiting is not None and waiting < queued
        for table in (tasks, probes):
            spent = table.c.attempts >= max_attempts
            states = connection.scalars(
                update(table)
                .where(_unlocked(table, _expired(table)))
                .values(
                    state=case((spent, TaskState.FAILED), else_=TaskState.PENDING),
                    done_ms=case((spent, Now()), else_=None),
                    lease_until_ms=None,
                    error_kind=WORKER_LOST,
                    error="the worker that ran it vanished or hung: its lease ran out",
                )
                .returning(table.c.state)
            ).all()
            unanswered = and_(
                table.c.state == TaskState.QUEUED,
                table.c.queued_ms <= after(-queued_timeout_s),
            )
            if lost:
                unqueued += connection.execute(
                    update(table)
                    .where(_unlocked(table, unanswered))
                    .values(state=TaskState.PENDING, queued_ms=None)
                ).rowcount
            failed += states.count(TaskState.FAILED)
            expired += states.count(TaskState.PENDING)
    return SweepCount(expired=expired, unqueued=unqueued, failed=failed)


def _queued(connection: Connection, table: Table) -> int:
    rows = select(func.count()).where(in_flight(table), table.c.state == TaskState.QUEUED)
    return int(connection.scalars(rows).one())


def _unlocked(table: Table, condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """That the row is in flight and as `condition` says. One that somebody holds is passed over:
    a worker that is stopped within a transaction must not hold up all others."""
    rows = select(table.c.id).where(in_flight(table), condition).with_for_update(skip_locked=True)
    return table.c.id.in_(rows)


def _expired(table: Table) -> ColumnElement[bool]:
    return and_(table.c.state == TaskState.LEASED, table.c.lease_until_ms <= Now())


def after(seconds: float) -> ColumnElement[int]:
    """The moment `seconds` from now, by the database's clock."""
    return Now() + cast(literal(round(seconds * 1000)), BigInteger)
