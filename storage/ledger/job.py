"""Jobs: opened, planned, paused, cancelled, tried again."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, case, delete, exists, or_, select, update

from storage.database import reading, writing
from storage.dialect import Now, insert, one_line, upsert
from storage.records import Fit, JobSpec, LabelSet, Sampling, TaskState, VideoState
from storage.schema import (
    IN_FLIGHT,
    OPEN,
    files,
    gaps,
    job_videos,
    jobs,
    label_examples,
    label_sets,
    labels,
    tasks,
)


class JobState(StrEnum):
    """How a job stands."""

    RUNNING = "running"
    PAUSED = "paused"
    """Nothing of it is fed or claimed until it is resumed."""
    CLOSED = "closed"
    """Its planning is finished and every video of it is closed."""


class NoSuchJob(Exception):
    """The database holds no such job."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the database holds it."""

    id: int
    key: str
    name: str
    state: JobState
    planning_finished: bool
    priority: int
    sampling: Sampling
    fit: Fit
    top_n: int
    label_set_id: int
    model: str
    notice: str | None
    pause_kind: str | None
    pause_reason: str | None
    created_ms: int
    opened_ms: int
    """When a command asked for it last."""
    closed_ms: int | None
    created: bool = False
    """Whether the call that returned this made the job."""


def job_of(row: RowMapping, *, created: bool = False) -> Job:
    """The value of a row of `jobs`."""
    fields: dict[str, Any] = dict(row)
    fields["state"] = JobState(fields["state"])
    fields["sampling"] = Sampling.parse(fields["sampling"])
    fields["fit"] = Fit(fields["fit"])
    return Job(**fields, created=created)


def open_job(engine: Engine, spec: JobSpec, *, priority: int = 0) -> Job:
    """The job of the spec's key, made if there is none; planning of it is open again.

    Jobs of higher priority are fed first. What the database holds of an older job stays as it is.
    """
    with writing(engine) as connection:
        label_set_id = _store_label_set(connection, spec.labels)
        made = connection.execute(
            insert(connection, jobs)
            .values(
                key=spec.key,
                name=spec.name,
                state=JobState.RUNNING,
                planning_finished=False,
                priority=priority,
                sampling=str(spec.sampling),
                fit=spec.fit,
                top_n=spec.top_n,
                label_set_id=label_set_id,
                model=spec.model,
                notice=spec.notice,
                created_ms=Now(),
                opened_ms=Now(),
            )
            .on_conflict_do_nothing(index_elements=["key"])
            .returning(jobs.c.id)
        ).scalar()
        job_id = connection.scalars(select(jobs.c.id).where(jobs.c.key == spec.key)).one()
        reopen(connection, job_id, planning_finished=False, opened_ms=Now())
        row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
    return job_of(row, created=made is not None)


def _store_label_set(connection: Connection, label_set: LabelSet) -> int:
    made = connection.execute(
        insert(connection, label_sets)
        .values(digest=label_set.digest, name=label_set.name)
        .on_conflict_do_nothing(index_elements=["digest"])
        .returning(label_sets.c.id)
    ).scalar()
    if made is None:
        known = select(label_sets.c.id).where(label_sets.c.digest == label_set.digest)
        return int(connection.scalars(known).one())
    upsert(
        connection,
        labels,
        [
            {
                "label_set_id": made,
                "position": position,
                "name": label.name,
                "prompts": json.dumps(label.prompts),
                "samples": json.dumps(label.samples),
                "threshold": label.threshold,
                "flag": label.flag,
            }
            for position, label in enumerate(label_set.labels)
        ],
    )
    upsert(
        connection,
        label_examples,
        [
            {"label_set_id": made, "label": at, "position": position, "picture": picture}
            for at, label in enumerate(label_set.labels)
            for position, picture in enumerate(label.examples)
        ],
    )
    return int(made)


def get_job(engine: Engine, job_id: int) -> Job:
    """The job of this number. Raises NoSuchJob."""
    with reading(engine) as connection:
        row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
    if row is None:
        raise NoSuchJob(f"there is no job {job_id}: `nightreel status` lists those there are")
    return job_of(row)


def all_jobs(engine: Engine) -> list[Job]:
    """Every job, newest first."""
    with reading(engine) as connection:
        rows = connection.execute(select(jobs).order_by(jobs.c.id.desc())).mappings().all()
    return [job_of(row) for row in rows]


def latest_job(engine: Engine) -> Job:
    """The job that was asked for last. Raises NoSuchJob where there is none."""
    with reading(engine) as connection:
        newest = select(jobs).order_by(jobs.c.opened_ms.desc(), jobs.c.id.desc()).limit(1)
        row = connection.execute(newest).mappings().first()
    if row is None:
        raise NoSuchJob("the database holds no job yet: start one with `nightreel run PATH`")
    return job_of(row)


def finish_planning(engine: Engine, job_id: int) -> None:
    """Say that the job gets no more videos: it closes once all that it has are closed.

    A rejected video that lies at no path any more is forgotten: its file was replaced, repaired or
    made readable, and stands in the job as what it is now.
    """
    somewhere = exists().where(files.c.video_id == job_videos.c.video_id)
    with writing(engine) as connection:
        connection.execute(
            delete(job_videos).where(
                job_videos.c.job_id == job_id,
                job_videos.c.state == VideoState.REJECTED,
                ~somewhere,
            )
        )
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(planning_finished=True))


def reopen_planning(engine: Engine, job_id: int) -> None:
    """Say that the job may get more videos: it does not close until planning is finished again."""
    with writing(engine) as connection:
        reopen(connection, job_id, planning_finished=False)


def reopen(connection: Connection, job_id: int, **values: bool | Now) -> None:
    """Within a transaction: a closed job runs again; `values` are set on any job."""
    running = case((jobs.c.state == JobState.CLOSED, JobState.RUNNING), else_=jobs.c.state)
    connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(state=running, closed_ms=None, **values)
    )


def pause_job(engine: Engine, job_id: int, kind: str, reason: str) -> None:
    """Stop feeding and claiming the job's tasks until it is resumed; work under lease may end.

    `kind` and `reason` are kept for whoever asks why. A closed job stays closed.
    """
    with writing(engine) as connection:
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state != JobState.CLOSED)
            .values(state=JobState.PAUSED, pause_kind=kind, pause_reason=one_line(reason))
        )
        # Messages on their way are turned down by `claim`; the tasks are fed anew on resuming.
        connection.execute(
            update(tasks)
            .where(IN_FLIGHT, tasks.c.job_id == job_id, tasks.c.state == TaskState.QUEUED)
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


def cancel_job(engine: Engine, job_id: int) -> int:
    """Give up all of the job's tasks that are not finished, and return their number.

    Their time becomes gaps when the videos close; work under lease can no longer commit.
    """
    with writing(engine) as connection:
        return connection.execute(
            update(tasks)
            .where(OPEN, tasks.c.job_id == job_id)
            .values(state=TaskState.CANCELLED, queued_ms=None, lease_until_ms=None)
        ).rowcount


def retry_job(engine: Engine, job_id: int) -> int:
    """Give the failed and cancelled tasks of the job's closed videos all their attempts again, and
    return their number; the videos and the job are open again."""
    lost = tasks.c.state.in_([TaskState.FAILED, TaskState.CANCELLED])
    closed = exists().where(
        job_videos.c.job_id == tasks.c.job_id,
        job_videos.c.video_id == tasks.c.video_id,
        job_videos.c.state != VideoState.RUNNING,
    )
    with writing(engine) as connection:
        again = (
            select(tasks.c.id, tasks.c.video_id)
            .where(tasks.c.job_id == job_id, lost, closed)
            .with_for_update()
        )
        found = connection.execute(again).all()
        if not found:
            return 0
        # The gaps of a lost task were written when its video was closed.
        ids = select(tasks.c.id).where(tasks.c.job_id == job_id, lost, closed)
        connection.execute(delete(gaps).where(gaps.c.task_id.in_(ids)))
        connection.execute(
            update(tasks)
            .where(tasks.c.id.in_(ids))
            .values(state=TaskState.PENDING, attempts=0, not_before_ms=0)
        )
        waiting = exists().where(
            OPEN, tasks.c.job_id == job_videos.c.job_id, tasks.c.video_id == job_videos.c.video_id
        )
        connection.execute(
            update(job_videos)
            .where(job_videos.c.job_id == job_id, job_videos.c.state != VideoState.RUNNING, waiting)
            .values(
                state=VideoState.RUNNING,
                reason_kind=None,
                reason=None,
                opening=job_videos.c.opening + 1,
                closed_ms=None,
            )
        )
        reopen(connection, job_id)
    return len(found)
