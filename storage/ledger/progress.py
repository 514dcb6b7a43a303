"""How far a job is, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, Table, case, func, select

from storage.database import reading
from storage.dialect import Now
from storage.ledger.job import Job, JobState, NoSuchJob, job_of
from storage.records import TaskState, Usage, VideoState
from storage.schema import OPEN, budgets, in_flight, job_videos, jobs, leaders, probes, tasks, usage

_OPEN = (TaskState.PENDING, TaskState.QUEUED, TaskState.LEASED)
_GIVEN_UP = (TaskState.FAILED, TaskState.CANCELLED)

BY_HAND = "by-hand"
"""Kind of pause of a job that a person has paused, and will resume."""

RECENT_S = 300
"""Speeds are those of the last five minutes: long enough for some tasks of a slow machine."""


@dataclass(frozen=True, slots=True)
class Recent:
    """What was done in the last `seconds` seconds of the database's clock."""

    seconds: float
    tasks: int
    samples: int
    covered_us: int

    @property
    def tasks_per_s(self) -> float:
        """Tasks done a second."""
        return self.tasks / self.seconds

    @property
    def samples_per_s(self) -> float:
        """Frames a second."""
        return self.samples / self.seconds

    @property
    def times_real(self) -> float:
        """Seconds of video a second."""
        return self.covered_us / 1e6 / self.seconds


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job at one moment."""

    job: Job
    videos_by_state: Mapping[str, int]
    """Every VideoState is a key, and any other state that a later release has written."""
    tasks_by_state: Mapping[str, int]
    """Every TaskState is a key, and any other, too."""
    probes_by_state: Mapping[str, int]
    """The files of a submitted job; every TaskState is a key, and any other, too."""
    samples: int
    duration_us: int
    """Of all videos that were planned."""
    analysed_us: int
    gap_us: int
    """Time that was given up: duration = analysed + gaps + what is still open."""
    usage: Usage
    """What tasks spent at the API."""
    max_calls: int | None
    """The budget of API calls; None without one."""
    calls_left: int | None
    recent: Recent
    waiting: Mapping[str, int]
    """What put pending tasks and probes back, and how many: the most frequent kind first."""
    workers: tuple[str, ...]
    """Names of those that hold a lease on a task or a probe."""
    led: bool
    """Whether a scheduler service runs, which feeds submitted jobs."""

    @property
    def videos(self) -> int:
        """Videos of the job, the rejected ones included."""
        return sum(self.videos_by_state.values())

    @property
    def closed_videos(self) -> int:
        """Videos on which nothing more will be done."""
        return self.videos - self.videos_by_state[VideoState.RUNNING]

    @property
    def tasks(self) -> int:
        """Tasks of the job."""
        return sum(self.tasks_by_state.values())

    @property
    def open_tasks(self) -> int:
        """Tasks that are still to be done."""
        return sum(self.tasks_by_state[state] for state in _OPEN)

    @property
    def closed_tasks(self) -> int:
        """Tasks that are done, failed or cancelled."""
        return self.tasks - self.open_tasks

    @property
    def open_probes(self) -> int:
        """Files that are still to be probed."""
        return sum(self.probes_by_state[state] for state in _OPEN)

    @property
    def covered_us(self) -> int:
        """Microseconds of video that are analysed or given up."""
        return self.analysed_us + self.gap_us

    @property
    def held(self) -> str | None:
        """Why the job is paused; None where it is not."""
        if self.job.state is not JobState.PAUSED:
            return None
        return self.job.pause_reason or self.job.pause_kind or "paused"

    @property
    def finished(self) -> bool:
        """Whether the job is closed."""
        return self.job.state is JobState.CLOSED

    @property
    def complete(self) -> bool:
        """Whether the job is closed and each of its files is all analysed."""
        lost = self.probes_by_state[TaskState.FAILED] + self.probes_by_state[TaskState.CANCELLED]
        return (
            self.finished and not lost and self.videos_by_state[VideoState.COMPLETE] == self.videos
        )

    @property
    def eta_s(self) -> float | None:
        """Seconds that are left at the recent speed; None where nothing moves, or more may come."""
        moving = self.job.state is JobState.RUNNING and self.job.planning_finished
        if not moving or self.recent.times_real <= 0:
            return None
        return (self.duration_us - self.covered_us) / 1e6 / self.recent.times_real


def status(engine: Engine, job_id: int) -> JobStatus:
    """The job's numbers, all of the same moment. Raises NoSuchJob."""
    with reading(engine) as connection:
        row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
        if row is None:
            raise NoSuchJob(f"there is no job {job_id}: `nightreel jobs` lists those there are")
        job = job_of(row)
        now_ms = connection.scalars(select(Now())).one()
        since_ms = max(now_ms - 1000 * RECENT_S, job.opened_ms)
        of_videos = connection.execute(
            select(job_videos.c.state, func.count(), func.sum(job_videos.c.duration_us))
            .where(job_videos.c.job_id == job_id)
            .group_by(job_videos.c.state)
        ).all()
        of_tasks = _tasks(connection, job_id, since_ms)
        of_probes = connection.execute(
            select(probes.c.state, probes.c.error_kind, func.count())
            .where(probes.c.job_id == job_id)
            .group_by(probes.c.state, probes.c.error_kind)
        ).all()
        workers = {
            name for table in (tasks, probes) for name in _holders(connection, table, job_id)
        }
        led = connection.scalar(select(leaders.c.name).where(leaders.c.until_ms > Now()).limit(1))
        budget = connection.execute(
            select(budgets.c.max_calls, budgets.c.calls_left).where(budgets.c.job_id == job_id)
        ).first()
        spent = connection.execute(
            select(
                func.coalesce(func.sum(usage.c.image_calls), 0),
                func.coalesce(func.sum(usage.c.text_calls), 0),
                func.coalesce(func.sum(usage.c.bytes_sent), 0),
                func.coalesce(func.sum(usage.c.api_seconds), 0.0),
                func.coalesce(func.sum(usage.c.decode_seconds), 0.0),
            ).where(usage.c.job_id == job_id)
        ).one()
    videos_by_state: Counter[str] = Counter(dict.fromkeys(VideoState, 0))
    tasks_by_state: Counter[str] = Counter(dict.fromkeys(TaskState, 0))
    probes_by_state: Counter[str] = Counter(dict.fromkeys(TaskState, 0))
    waiting: Counter[str] = Counter()
    analysed_us = gap_us = samples = 0
    recent = [0, 0, 0]
    for state, count, _ in of_videos:
        videos_by_state[state] = count
    for state, kind, count, *sums in of_tasks:
        # PostgreSQL sums bigint as numeric.
        span_us, found, given_up_us, *lately = map(int, sums)
        tasks_by_state[state] += count
        if state == TaskState.DONE:
            analysed_us += span_us - given_up_us
            gap_us += given_up_us
            samples += found
            recent = [a + b for a, b in zip(recent, lately, strict=True)]
        elif state in _GIVEN_UP:
            gap_us += span_us
        elif state == TaskState.PENDING and kind is not None:
            waiting[kind] += count
    for state, kind, count in of_probes:
        probes_by_state[state] += count
        if state == TaskState.PENDING and kind is not None:
            waiting[kind] += count
    calls, texts, sent, api_s, decode_s = spent
    return JobStatus(
        job=job,
        videos_by_state=videos_by_state,
        tasks_by_state=tasks_by_state,
        probes_by_state=probes_by_state,
        samples=samples,
        duration_us=sum(int(duration_us) for _, _, duration_us in of_videos),
        analysed_us=analysed_us,
        gap_us=gap_us,
        usage=Usage(int(calls), int(texts), int(sent), float(api_s), float(decode_s)),
        max_calls=None if budget is None else budget.max_calls,
        calls_left=None if budget is None else budget.calls_left,
        recent=Recent(max(now_ms - since_ms, 1) / 1000, *recent),
        waiting=dict(waiting.most_common()),
        workers=tuple(sorted(workers)),
        led=led is not None,
    )


def why_waiting(engine: Engine, job_id: int, kind: str) -> str | None:
    """What was said of a task that waits because of this kind of error, and was put back since a
    command asked for the job last; None where there is none."""
    with reading(engine) as connection:
        said: str | None = connection.scalar(
            select(tasks.c.error)
            .join(jobs, jobs.c.id == tasks.c.job_id)
            .where(
                tasks.c.job_id == job_id,
                tasks.c.state == TaskState.PENDING,
                tasks.c.error_kind == kind,
                # Put back for some time, so until later than that.
                tasks.c.not_before_ms > jobs.c.opened_ms,
            )
            .limit(1)
        )
    return said


def _tasks(connection: Connection, job_id: int, since_ms: int) -> Sequence[Row[*tuple[Any, ...]]]:
    """By state and kind of error: tasks, their time, samples and gaps, and of those that ended
    since then number, samples and time."""
    span_us = tasks.c.end_us - tasks.c.start_us
    lately = tasks.c.done_ms > since_ms
    return connection.execute(
        select(
            tasks.c.state,
            tasks.c.error_kind,
            func.count(),
            func.sum(span_us),
            func.sum(tasks.c.samples),
            func.sum(tasks.c.gap_us),
            func.sum(case((lately, 1), else_=0)),
            func.sum(case((lately, tasks.c.samples), else_=0)),
            func.sum(case((lately, span_us), else_=0)),
        )
        .where(tasks.c.job_id == job_id)
        .group_by(tasks.c.state, tasks.c.error_kind)
    ).all()


def _holders(connection: Connection, table: Table, job_id: int) -> Sequence[str]:
    """Workers whose lease on one of the job's tasks or probes has not run out."""
    return connection.scalars(
        select(table.c.worker)
        .distinct()
        .where(
            in_flight(table),
            table.c.job_id == job_id,
            table.c.state == TaskState.LEASED,
            table.c.lease_until_ms > Now(),
        )
    ).all()


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as a list of many shows it."""

    job: Job
    videos: int
    duration_us: int
    open_us: int
    """Time of tasks that are still to be done."""

    @property
    def done(self) -> float | None:
        """Share of the planned time that is done or given up; None where none is planned."""
        return 1 - self.open_us / self.duration_us if self.duration_us else None


def list_jobs(
    engine: Engine, *, tag: str | None = None, state: JobState | None = None, limit: int
) -> tuple[list[JobRow], int]:
    """The newest `limit` jobs of this tag and state, newest first, and how many there are."""
    wanted = select(jobs)
    if tag is not None:
        wanted = wanted.where(jobs.c.tag == tag)
    if state is not None:
        wanted = wanted.where(jobs.c.state == state)
    with reading(engine) as connection:
        every = connection.scalars(select(func.count()).select_from(wanted.subquery())).one()
        rows = connection.execute(wanted.order_by(jobs.c.id.desc()).limit(limit)).mappings().all()
        shown = [row["id"] for row in rows]
        videos = connection.execute(
            select(job_videos.c.job_id, func.count(), func.sum(job_videos.c.duration_us))
            .where(job_videos.c.job_id.in_(shown))
            .group_by(job_videos.c.job_id)
        ).all()
        # Only what is open is looked at: of a thousand jobs all but a few are closed.
        still = connection.execute(
            select(tasks.c.job_id, func.sum(tasks.c.end_us - tasks.c.start_us))
            .where(OPEN, tasks.c.job_id.in_(shown))
            .group_by(tasks.c.job_id)
        ).all()
    of_videos = {job_id: (count, int(duration_us)) for job_id, count, duration_us in videos}
    open_us = {job_id: int(total_us) for job_id, total_us in still}
    found = [
        JobRow(job_of(row), *of_videos.get(row["id"], (0, 0)), open_us.get(row["id"], 0))
        for row in rows
    ]
    return found, every
