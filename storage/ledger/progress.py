"""How far a job is, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine, func, select

from storage.database import reading
from storage.ledger.job import Job, JobState, NoSuchJob, job_of
from storage.records import TaskState, Usage, VideoState
from storage.schema import job_videos, jobs, tasks, usage

_OPEN = (TaskState.PENDING, TaskState.QUEUED, TaskState.LEASED)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job at one moment."""

    job: Job
    videos_by_state: Mapping[VideoState, int]
    """Every state is a key."""
    tasks_by_state: Mapping[TaskState, int]
    """Every state is a key."""
    samples: int
    duration_us: int
    """Of all videos that were planned."""
    analysed_us: int
    gap_us: int
    """Time that was given up: duration = analysed + gaps + what is still open."""
    usage: Usage
    """What committed tasks spent at the API."""

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


def status(engine: Engine, job_id: int) -> JobStatus:
    """The job's numbers, all of the same moment. Raises NoSuchJob."""
    with reading(engine) as connection:
        row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
        if row is None:
            raise NoSuchJob(f"there is no job {job_id}: `nightreel status` lists those there are")
        of_videos = connection.execute(
            select(job_videos.c.state, func.count(), func.sum(job_videos.c.duration_us))
            .where(job_videos.c.job_id == job_id)
            .group_by(job_videos.c.state)
        ).all()
        of_tasks = connection.execute(
            select(
                tasks.c.state,
                func.count(),
                func.sum(tasks.c.end_us - tasks.c.start_us),
                func.sum(tasks.c.samples),
                func.sum(tasks.c.gap_us),
            )
            .where(tasks.c.job_id == job_id)
            .group_by(tasks.c.state)
        ).all()
        spent = connection.execute(
            select(
                func.coalesce(func.sum(usage.c.image_calls), 0),
                func.coalesce(func.sum(usage.c.text_calls), 0),
                func.coalesce(func.sum(usage.c.bytes_sent), 0),
                func.coalesce(func.sum(usage.c.api_seconds), 0.0),
                func.coalesce(func.sum(usage.c.decode_seconds), 0.0),
            ).where(usage.c.job_id == job_id)
        ).one()
    videos_by_state = dict.fromkeys(VideoState, 0)
    tasks_by_state = dict.fromkeys(TaskState, 0)
    analysed_us = gap_us = samples = 0
    for state, count, _ in of_videos:
        videos_by_state[VideoState(state)] = count
    for state, count, span_us, found, given_up_us in of_tasks:
        tasks_by_state[TaskState(state)] = count
        if state == TaskState.DONE:
            # PostgreSQL sums bigint as numeric.
            analysed_us += int(span_us) - int(given_up_us)
            gap_us += int(given_up_us)
            samples += int(found)
        elif state not in _OPEN:
            gap_us += int(span_us)
    calls, texts, sent, api_s, decode_s = spent
    return JobStatus(
        job=job_of(row),
        videos_by_state=videos_by_state,
        tasks_by_state=tasks_by_state,
        samples=samples,
        duration_us=sum(int(duration_us) for _, _, duration_us in of_videos),
        analysed_us=analysed_us,
        gap_us=gap_us,
        usage=Usage(int(calls), int(texts), int(sent), float(api_s), float(decode_s)),
    )
