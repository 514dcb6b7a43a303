"""What people, and workers that are refused, do to a whole job: pause, resume, cancel, retry."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Engine, case, delete, or_, select, update

from storage.database import reading, writing
from storage.dialect import Now, lock_ledger, one_line
from storage.ledger.job import JobState, lock_job, reopen
from storage.ledger.listing import AT_ONCE, again, given_up
from storage.records import TaskState, VideoState
from storage.schema import (
    IN_FLIGHT,
    OPEN,
    gaps,
    in_flight,
    job_videos,
    jobs,
    probes,
    still_open,
    tasks,
)


@dataclass(frozen=True, slots=True)
class Units:
    """How many units of work something was done to."""

    tasks: int
    files: int
    """To be probed."""


def pause_job(engine: Engine, job_id: int, kind: str, reason: str) -> None:
    """Stop feeding and claiming the job's tasks until it is resumed; work under lease may end.

    `kind` and `reason` are kept for whoever asks why. A closed job stays closed, and one that is
    paused keeps its reason.
    """
    with writing(engine) as connection:
        lock_ledger(connection)
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state == JobState.RUNNING)
            .values(state=JobState.PAUSED, pause_kind=kind, pause_reason=one_line(reason))
        )
        # Messages on their way are turned down by `claim`; the work is fed anew on resuming.
        for table in (tasks, probes):
            connection.execute(
                update(table)
                .where(
                    in_flight(table),
                    table.c.job_id == job_id,
                    table.c.state == TaskState.QUEUED,
                )
                .values(state=TaskState.PENDING, queued_ms=None)
            )


def resume_job(engine: Engine, job_id: int) -> None:
    """Go on with a paused job; any other stays as it is."""
    with writing(engine) as connection:
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state == JobState.PAUSED)
            .values(state=JobState.RUNNING, pause_kind=None, pause_reason=None)
        )


def lease_holders(engine: Engine, job_id: int) -> set[str]:
    """Names of the workers that hold a lease on tasks of the job, run out or not."""
    with reading(engine) as connection:
        return set(
            connection.scalars(
                select(tasks.c.worker).where(
                    IN_FLIGHT, tasks.c.job_id == job_id, tasks.c.state == TaskState.LEASED
                )
            )
        )


def recover(engine: Engine, job_id: int, stopped: Collection[str] = ()) -> int:
    """Take back the job's tasks that are queued, and those leased to workers that were `stopped`,
    without waiting for timeouts; return their number.

    Spends no attempt: an interruption is no fault of the task. A worker that lives all the same
    can no longer commit; a message on its way is turned down or claims the task as any other.
    """
    leased = tasks.c.state == TaskState.LEASED
    with writing(engine) as connection:
        lock_ledger(connection)
        return connection.execute(
            update(tasks)
            .where(IN_FLIGHT, tasks.c.job_id == job_id)
            .where(or_(~leased, tasks.c.worker.in_(stopped)))
            .values(
                state=TaskState.PENDING,
                attempts=case((leased, tasks.c.attempts - 1), else_=tasks.c.attempts),
                queued_ms=None,
                lease_until_ms=None,
            )
        ).rowcount


def expire_leases(engine: Engine, job_id: int, dead: Collection[str]) -> int:
    """Let the job's leases of workers that died run out now, and return their number; the next
    sweep finds them. The attempt stays spent: the task may be what killed them."""
    with writing(engine) as connection:
        lock_ledger(connection)
        return connection.execute(
            update(tasks)
            .where(
                IN_FLIGHT,
                tasks.c.job_id == job_id,
                tasks.c.state == TaskState.LEASED,
                tasks.c.worker.in_(dead),
            )
            .values(lease_until_ms=0)
        ).rowcount


def cancel_job(engine: Engine, job_id: int) -> Units:
    """Give up all of the job's tasks that are not finished, and return how many; files that are
    not probed yet are not planned any more.

    The tasks' time becomes gaps when the videos close; work under lease can no longer commit.
    """
    ended = {
        "state": TaskState.CANCELLED,
        "queued_ms": None,
        "lease_until_ms": None,
        "done_ms": Now(),
    }
    with writing(engine) as connection:
        lock_ledger(connection)
        lock_job(connection, job_id)
        unread = connection.execute(
            update(probes).where(still_open(probes), probes.c.job_id == job_id).values(ended)
        ).rowcount
        cancelled = connection.execute(
            update(tasks).where(OPEN, tasks.c.job_id == job_id).values(ended)
        ).rowcount
        # A paused job would not be closed otherwise.
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state != JobState.CLOSED)
            .values(state=JobState.RUNNING, pause_kind=None, pause_reason=None)
        )
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(planning_finished=True))
    return Units(cancelled, unread)


def retry_job(
    engine: Engine, job_id: int, *, kind: str | None = None, video_id: int | None = None
) -> Units:
    """Give the job's failed and cancelled tasks all their attempts again, have its files probed
    again that could not be, and return how many; their videos and the job are open again. `kind`
    and `video_id` choose among them: the kind of error or of gap, one video.
    """
    lost = given_up(tasks, kind)
    if video_id is not None:
        lost &= tasks.c.video_id == video_id
    with writing(engine) as connection:
        lock_ledger(connection)
        lock_job(connection, job_id)
        probed_again = again(connection, job_id, kind=kind, video_id=video_id)
        found = connection.execute(
            select(tasks.c.id, tasks.c.video_id)
            .where(tasks.c.job_id == job_id, lost)
            .with_for_update()
        ).all()
        if probed_again:
            reopen(connection, job_id, planning_finished=False)
        if not found:
            return Units(0, probed_again)
        for at in range(0, len(found), AT_ONCE):
            ids = [row.id for row in found[at : at + AT_ONCE]]
            # The gaps of a lost task were written when its video was closed.
            connection.execute(delete(gaps).where(gaps.c.task_id.in_(ids)))
            connection.execute(
                update(tasks)
                .where(tasks.c.id.in_(ids))
                .values(state=TaskState.PENDING, attempts=0, not_before_ms=0, done_ms=None)
            )
            # Also of a video that runs: a close that was computed just now must not be written.
            connection.execute(
                update(job_videos)
                .where(
                    job_videos.c.job_id == job_id,
                    job_videos.c.video_id.in_({row.video_id for row in found[at : at + AT_ONCE]}),
                )
                .values(
                    state=VideoState.RUNNING,
                    reason_kind=None,
                    reason=None,
                    opening=job_videos.c.opening + 1,
                    closed_ms=None,
                )
            )
        reopen(connection, job_id)
    return Units(len(found), probed_again)
