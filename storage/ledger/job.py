"""Jobs: opened, found, and open or closed to planning."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    delete,
    exists,
    select,
    update,
)

from storage.database import reading, writing
from storage.dialect import Now, insert, lock_ledger, upsert
from storage.exits import ExitCode
from storage.ledger.budget import BUDGET_SPENT, set_budget_anew
from storage.ledger.listing import add_probes
from storage.records import ArchiveFile, Fit, JobSpec, LabelSet, Sampling, VideoState
from storage.schema import (
    files,
    job_videos,
    jobs,
    label_examples,
    label_sets,
    labels,
)

T = TypeVar("T")


class JobState(StrEnum):
    """How a job stands."""

    RUNNING = "running"
    PAUSED = "paused"
    """Nothing of it is fed or claimed until it is resumed."""
    CLOSED = "closed"
    """Its planning is finished and every video of it is closed."""


class NoSuchJob(Exception):
    """The database holds no such job."""


class KeyTaken(Exception):
    """The key that a person chose is that of another job, which asks for something else."""


class UnreadableJob(Exception):
    """Another release made the job, and this one cannot read what it asks for."""

    code = ExitCode.DATABASE


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the database holds it, whichever release made it."""

    id: int
    key: str
    name: str
    state: JobState | str
    """A plain word where another release has a state that this one does not know."""
    planning_finished: bool
    priority: int
    sampling_text: str
    fit_text: str
    top_n: int
    label_set_id: int
    model: str
    notice: str | None
    version: str
    """Release of nightreel that made the job."""
    request: str
    tag: str | None
    submitted: bool
    """Whether the scheduler service feeds it; the run that opened it does otherwise."""
    task_us: int
    served: float
    served_probes: float
    notify_url: str | None
    pause_kind: str | None
    pause_reason: str | None
    created_ms: int
    opened_ms: int
    """When a command asked for it last."""
    closed_ms: int | None
    created: bool = False
    """Whether the call that returned this made the job."""

    @property
    def sampling(self) -> Sampling:
        """How its frames are chosen. Raises UnreadableJob."""
        return self._read(Sampling.parse, self.sampling_text)

    @property
    def fit(self) -> Fit:
        """How its frames become squares. Raises UnreadableJob."""
        return self._read(Fit, self.fit_text)

    @property
    def unreadable(self) -> str | None:
        """Why this release cannot read the job; None where it can."""
        try:
            self._read(JobState, self.state)
            _ = self.sampling, self.fit
        except UnreadableJob as error:
            return str(error)
        return None

    def _read(self, read: Callable[[str], T], text: str) -> T:
        try:
            return read(text)
        except (ValueError, ArithmeticError) as error:
            raise UnreadableJob(
                f"job {self.id} was made by nightreel {self.version}, and this one, "
                f"{version('nightreel')}, cannot read it: {error}"
            ) from error


def job_of(row: RowMapping, *, created: bool = False) -> Job:
    """The value of a row of `jobs`."""
    fields: dict[str, Any] = dict(row)
    if fields["state"] in set(JobState):
        fields["state"] = JobState(fields["state"])
    for name in ("sampling", "fit"):
        fields[f"{name}_text"] = fields.pop(name)
    return Job(**fields, created=created)


def open_job(
    engine: Engine,
    spec: JobSpec,
    *,
    priority: int | None = None,
    tag: str | None = None,
    notify_url: str | None = None,
    task_us: int = 60_000_000,
    max_calls: int | None = None,
    files: Sequence[ArchiveFile] | None = None,
    unreadable: Mapping[bytes, str] = MappingProxyType({}),
) -> Job:
    """The job of the spec's key, made if there is none; planning of it is open again.

    `files`, if given, are recorded with it in one transaction: the job is submitted, and workers
    probe and plan them; `unreadable` names what cannot even be looked at, with reasons, and
    `max_calls` is its budget from now on, where it is another one than before: a submission that
    is repeated gives no new one. What the database holds of an older job stays as it is, but for
    priority, tag and address where they are given anew. Raises KeyTaken.
    """
    submitted = files is not None
    given = {"priority": priority, "tag": tag, "notify_url": notify_url}
    anew = {name: value for name, value in given.items() if value is not None}
    with writing(engine) as connection:
        if submitted:
            lock_ledger(connection)
        found = select(jobs.c.id, jobs.c.request, jobs.c.submitted).where(jobs.c.key == spec.key)
        made: int | None = None
        if connection.execute(found).first() is None:
            # Not tried in vain: that uses up a number.
            made = connection.execute(
                insert(connection, jobs)
                .values(
                    key=spec.key,
                    name=spec.name,
                    state=JobState.RUNNING,
                    planning_finished=False,
                    priority=priority or 0,
                    sampling=str(spec.sampling),
                    fit=spec.fit,
                    top_n=spec.top_n,
                    label_set_id=_store_label_set(connection, spec.labels),
                    model=spec.model,
                    notice=spec.notice,
                    version=version("nightreel"),
                    request=spec.request,
                    tag=tag,
                    submitted=submitted,
                    task_us=task_us,
                    served=0.0,
                    served_probes=0.0,
                    notify_url=notify_url,
                    created_ms=Now(),
                    opened_ms=Now(),
                )
                .on_conflict_do_nothing(index_elements=["key"])
                .returning(jobs.c.id)
            ).scalar()
        job_id, request, of_farm = connection.execute(found).one()
        if request != spec.request:
            raise KeyTaken(
                f"this key is that of job {job_id}, which asks for other files, labels or "
                "sampling: choose another key"
            )
        if of_farm and not submitted:
            raise KeyTaken(
                f"this is job {job_id} of the farm, which works on it: "
                f"`nightreel status {job_id} --wait`"
            )
        values = {**anew, "submitted": True} if submitted and made is None else {}
        reopen(connection, job_id, planning_finished=False, opened_ms=Now(), **values)
        if files is not None:
            add_probes(connection, job_id, files, unreadable)
            if max_calls is not None and set_budget_anew(connection, job_id, max_calls):
                connection.execute(
                    update(jobs)
                    .where(jobs.c.id == job_id, jobs.c.pause_kind == BUDGET_SPENT)
                    .values(state=JobState.RUNNING, pause_kind=None, pause_reason=None)
                )
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
        raise NoSuchJob(f"there is no job {job_id}: `nightreel jobs` lists those there are")
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
    with writing(engine) as connection:
        finish_planning_in(connection, job_id)


def finish_planning_in(connection: Connection, job_id: int) -> None:
    """`finish_planning` within a transaction."""
    somewhere = exists().where(files.c.video_id == job_videos.c.video_id)
    connection.execute(
        delete(job_videos).where(
            job_videos.c.job_id == job_id,
            job_videos.c.state == VideoState.REJECTED,
            ~somewhere,
        )
    )
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(planning_finished=True))


def lock_job(connection: Connection, job_id: int) -> None:
    """Within a transaction, first of all: nobody else opens, closes or extends the job until it
    ends. What is asked afterwards is what others have committed; PostgreSQL asks a condition on
    another table as of the statement's begin, so it must not stand in a statement that waits."""
    mine = select(jobs.c.id).where(jobs.c.id == job_id)
    connection.execute(mine.with_for_update(key_share=True))  # as an UPDATE locks it


def reopen_planning(engine: Engine, job_id: int) -> None:
    """Say that the job may get more videos: it does not close until planning is finished again."""
    with writing(engine) as connection:
        reopen(connection, job_id, planning_finished=False)


def reopen(connection: Connection, job_id: int, **values: Any) -> None:
    """Within a transaction: a closed job runs again; `values` are set on any job."""
    if values:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
    # One that runs is not touched: workers that plan its videos would wait for each other.
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state == JobState.CLOSED)
        .values(state=JobState.RUNNING, closed_ms=None)
    )
