"""A task's way through the ledger: pending, queued, leased, done or failed.

Every step is one short transaction, and the last word is always the row's: `state`, and the
`fence` that each claim counts up, so that whoever held an older claim can write nothing any more.
Leases and delays are held to the database's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Engine,
    Integer,
    and_,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    update,
)

from storage.database import writing
from storage.dialect import Now, lock_ledger, one_line
from storage.ledger.job import JobState
from storage.ledger.planning import info_of
from storage.records import Fit, FrameRange, Sampling, TaskState, VideoInfo
from storage.schema import IN_FLIGHT, PENDING, files, held, jobs, tasks, videos

MAX_ATTEMPTS = 5
"""Attempts of a task whose workers vanish, after which it has failed."""

LARGEST_FEED = 10_000
"""Tasks that one call marks at most: a statement's parameters are bounded."""

WORKER_LOST = "worker-lost"
"""Error kind of a task whose lease ran out."""


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
    path_raws: tuple[bytes, ...]
    """Every place that the video was seen at, the latest first."""
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


def feed(engine: Engine, window: int, job_id: int | None = None) -> list[int]:
    """Mark due tasks as queued, as many as fit into the window, and return their ids in the order
    to publish them; publish, or `unqueue` them.

    At most `window` tasks are queued or leased at a time, of all jobs or of `job_id` alone. Jobs
    go by priority, then by age; within a job every video's first range goes before any second.
    """
    of_job = literal(True) if job_id is None else tasks.c.job_id == job_id
    wanted = select(jobs.c.id).where(jobs.c.state == JobState.RUNNING)
    if job_id is not None:
        wanted = wanted.where(jobs.c.id == job_id)
    with writing(engine) as connection:
        lock_ledger(connection)
        in_flight = connection.scalars(
            select(func.count()).select_from(tasks).where(IN_FLIGHT, of_job)
        ).one()
        room = min(window - in_flight, LARGEST_FEED)
        fed: list[int] = []
        for one in connection.scalars(wanted.order_by(jobs.c.priority.desc(), jobs.c.id)).all():
            if len(fed) >= room:
                break
            fed += connection.scalars(
                select(tasks.c.id)
                .where(PENDING, tasks.c.job_id == one, tasks.c.not_before_ms <= Now())
                .order_by(tasks.c.ordinal, tasks.c.video_id)
                .limit(room - len(fed))
                .with_for_update(skip_locked=True)
            ).all()
        if fed:
            connection.execute(
                update(tasks)
                .where(tasks.c.id.in_(fed))
                .values(state=TaskState.QUEUED, queued_ms=Now())
            )
    return fed


def unqueue(engine: Engine, task_ids: Sequence[int]) -> None:
    """Take back tasks whose publishing failed; those that a worker has claimed are left alone."""
    if not task_ids:
        return
    with writing(engine) as connection:
        connection.execute(
            update(tasks)
            .where(tasks.c.id.in_(task_ids), tasks.c.state == TaskState.QUEUED)
            .values(state=TaskState.PENDING, queued_ms=None)
        )


def claim(engine: Engine, task_id: int, worker: str, lease_s: float) -> Claim | None:
    """Lease the task to this worker, or None where the ledger has no use for that: it is done, at
    work elsewhere, not due, its job is paused, or it does not exist. Then drop the message.

    Raises IncompatiblePlan, and leaves the task for a worker that can.
    """
    waiting = tasks.c.state.in_([TaskState.PENDING, TaskState.QUEUED])
    orphaned = and_(_expired(), tasks.c.attempts < MAX_ATTEMPTS)
    job_state = select(jobs.c.state).where(jobs.c.id == tasks.c.job_id).scalar_subquery()
    with writing(engine) as connection:
        fence = connection.scalar(
            update(tasks)
            .where(
                tasks.c.id == task_id,
                or_(waiting, orphaned),
                tasks.c.not_before_ms <= Now(),
                job_state == JobState.RUNNING,
            )
            .values(
                state=TaskState.LEASED,
                attempts=tasks.c.attempts + 1,
                fence=tasks.c.fence + 1,
                queued_ms=None,
                lease_until_ms=_after(lease_s),
                worker=worker,
            )
            .returning(tasks.c.fence)
        )
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
                )
                .join(videos, videos.c.id == tasks.c.video_id)
                .join(jobs, jobs.c.id == tasks.c.job_id)
                .where(tasks.c.id == task_id)
            )
            .mappings()
            .one()
        )
        places = connection.scalars(
            select(files.c.path_raw)
            .where(files.c.video_id == row["video_id"])
            .order_by(files.c.seen_ms.desc(), files.c.id.desc())
        ).all()
        try:
            frame_range = FrameRange.from_json(row["plan"])
        except ValueError as error:
            raise IncompatiblePlan(str(error)) from error
    return Claim(
        task_id=task_id,
        fence=fence,
        attempts=row["attempts"],
        job_id=row["job_id"],
        video_id=row["video_id"],
        content_id=row["content_id"],
        path_raws=tuple(places),
        info=info_of(row),
        frame_range=frame_range,
        sampling=Sampling.parse(row["sampling"]),
        fit=Fit(row["fit"]),
        top_n=row["top_n"],
        label_set_id=row["label_set_id"],
        model=row["model"],
    )


def heartbeat(engine: Engine, task_id: int, fence: int, lease_s: float) -> bool:
    """Extend the lease from now on; False where the claim no longer holds."""
    with writing(engine) as connection:
        extended = connection.execute(
            update(tasks).where(held(task_id, fence)).values(lease_until_ms=_after(lease_s))
        )
    return extended.rowcount == 1


def release(  # noqa: PLR0917
    engine: Engine, task_id: int, fence: int, delay_s: float, kind: str, message: str
) -> bool:
    """Put the task back for at least `delay_s` seconds and give it the attempt back: what stopped
    it was no fault of its own. False where the claim no longer holds."""
    with writing(engine) as connection:
        released = connection.execute(
            update(tasks)
            .where(held(task_id, fence))
            .values(
                state=TaskState.PENDING,
                attempts=tasks.c.attempts - 1,
                not_before_ms=_after(delay_s),
                lease_until_ms=None,
                error_kind=kind,
                error=one_line(message),
            )
        )
    return released.rowcount == 1


def give_back(  # noqa: PLR0917
    engine: Engine,
    task_id: int,
    fence: int,
    kind: str,
    message: str,
    max_attempts: int,
    backoff_s: float,
) -> TaskState:
    """Put the task back for at least `backoff_s` seconds, the attempt spent; failed where it was
    the last one. Returns the task's state, which is another's doing where the claim no longer
    holds."""
    spent = tasks.c.attempts >= max_attempts
    with writing(engine) as connection:
        connection.execute(
            update(tasks)
            .where(held(task_id, fence))
            .values(
                state=case((spent, TaskState.FAILED), else_=TaskState.PENDING),
                not_before_ms=_after(backoff_s),
                lease_until_ms=None,
                error_kind=kind,
                error=one_line(message),
            )
        )
        return TaskState(
            connection.scalars(select(tasks.c.state).where(tasks.c.id == task_id)).one()
        )


def sweep(engine: Engine, queued_timeout_s: float, max_attempts: int = MAX_ATTEMPTS) -> SweepCount:
    """Find what was lost: leases of vanished workers, and messages that no worker answered.

    A task whose workers vanish `max_attempts` times has failed: it may be what kills them.
    """
    spent = tasks.c.attempts >= max_attempts
    with writing(engine) as connection:
        lock_ledger(connection)
        states = connection.scalars(
            update(tasks)
            .where(IN_FLIGHT, _expired())
            .values(
                state=case((spent, TaskState.FAILED), else_=TaskState.PENDING),
                lease_until_ms=None,
                error_kind=WORKER_LOST,
                error="the worker that ran it vanished or hung: its lease ran out",
            )
            .returning(tasks.c.state)
        ).all()
        unqueued = connection.execute(
            update(tasks)
            .where(
                IN_FLIGHT,
                tasks.c.state == TaskState.QUEUED,
                tasks.c.queued_ms <= _after(-queued_timeout_s),
            )
            .values(state=TaskState.PENDING, queued_ms=None)
        ).rowcount
    failed = states.count(TaskState.FAILED)
    return SweepCount(expired=len(states) - failed, unqueued=unqueued, failed=failed)


def _expired() -> ColumnElement[bool]:
    return and_(tasks.c.state == TaskState.LEASED, tasks.c.lease_until_ms <= Now())


def _after(seconds: float) -> ColumnElement[int]:
    return Now() + cast(literal(round(seconds * 1000)), Integer)
