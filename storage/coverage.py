"""What of each video was analysed, and what was not, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Engine, exists, func, or_, select

from storage.database import reading
from storage.dialect import among
from storage.records import Gap, GapKind, TaskState, VideoState
from storage.schema import files, gaps, job_videos, jobs, probes, still_open, tasks


@dataclass(frozen=True, slots=True)
class VideoCoverage:
    """A video of a job: duration = analysed + gaps + waiting, and nothing waits once it is closed.
    A rejected video has no duration that could be trusted: all of its times are 0."""

    video_id: int
    state: VideoState
    reason_kind: str | None
    reason: str | None
    """Why it is not complete, where it is closed and is not."""
    duration_us: int
    analysed_us: int
    waiting_us: int
    gaps: tuple[Gap, ...]
    """In order of time."""

    @property
    def gap_us(self) -> int:
        """Microseconds that were given up."""
        return sum(gap.end_us - gap.start_us for gap in self.gaps)


@dataclass(frozen=True, slots=True)
class Listing:
    """How far a job knows its own videos: what is not listed yet has no coverage, no scene and no
    flag, and is no less unseen."""

    job_state: str
    finished: bool
    """Whether the job has all its videos. It gets no more then, unless it is asked for again."""
    unread: int
    """Files that the job was given and has not read: to be read yet, or given up before they
    were."""

    @property
    def complete(self) -> bool:
        """Whether every file of the job is one of its videos."""
        return self.finished and not self.unread


def listing(engine: Engine, job_id: int) -> Listing:
    """How far the job, which must be one, knows its videos.

    Ask this before anything about the videos: what is complete stays complete, and a video that is
    added after the question would be missed the other way round.
    """
    in_job = exists().where(
        files.c.path_sha256 == probes.c.path_sha256,
        job_videos.c.video_id == files.c.video_id,
        job_videos.c.job_id == job_id,
    )
    given_up = probes.c.state.in_([TaskState.FAILED, TaskState.CANCELLED])
    unread = (
        select(func.count())
        .select_from(probes)
        .where(probes.c.job_id == job_id, or_(still_open(probes), given_up & ~in_job))
    )
    with reading(engine) as connection:
        job = connection.execute(
            select(jobs.c.state, jobs.c.planning_finished).where(jobs.c.id == job_id)
        ).one()
        return Listing(job.state, job.planning_finished, connection.scalars(unread).one())


def lacking(engine: Engine, job_id: int, video_ids: Collection[int] | None = None) -> int:
    """How many of the job's videos, or of these of them, are not (yet) complete."""
    videos_of_job = job_videos.c.job_id == job_id, job_videos.c.state != VideoState.COMPLETE
    query = select(func.count()).select_from(job_videos).where(*videos_of_job)
    with reading(engine) as connection:
        if video_ids is not None:
            query = query.where(among(connection, job_videos.c.video_id, video_ids))
        return connection.scalars(query).one()


def coverage(engine: Engine, job_id: int, video: int | None = None) -> list[VideoCoverage]:
    """How each video of the job stands, or the one of number `video`, by number.

    Analysed and waiting time are counted from the tasks, gaps are read: that they add up to the
    duration is a fact of the rows.
    """
    span_us = tasks.c.end_us - tasks.c.start_us
    videos_of_job = select(job_videos).where(job_videos.c.job_id == job_id)
    time_of_tasks = (
        select(tasks.c.video_id, tasks.c.state, func.sum(span_us), func.sum(tasks.c.gap_us))
        .where(tasks.c.job_id == job_id)
        .group_by(tasks.c.video_id, tasks.c.state)
    )
    gaps_of_job = select(gaps).where(gaps.c.job_id == job_id)
    if video is not None:
        videos_of_job = videos_of_job.where(job_videos.c.video_id == video)
        time_of_tasks = time_of_tasks.where(tasks.c.video_id == video)
        gaps_of_job = gaps_of_job.where(gaps.c.video_id == video)
    analysed_us: defaultdict[int, int] = defaultdict(int)
    waiting_us: defaultdict[int, int] = defaultdict(int)
    found: defaultdict[int, list[Gap]] = defaultdict(list)
    with reading(engine) as connection:
        rows = connection.execute(videos_of_job.order_by(job_videos.c.video_id)).all()
        closed = {row.video_id for row in rows if row.state != VideoState.RUNNING}
        for video_id, state, total_us, gap_us in connection.execute(time_of_tasks):
            if state == TaskState.DONE:
                analysed_us[video_id] += int(total_us) - int(gap_us)
            elif state not in (TaskState.FAILED, TaskState.CANCELLED) or video_id not in closed:
                # The gaps of lost tasks are written when the video closes.
                waiting_us[video_id] += int(total_us)
        for gap in connection.execute(gaps_of_job.order_by(gaps.c.video_id, gaps.c.start_us)):
            found[gap.video_id].append(Gap(gap.start_us, gap.end_us, GapKind(gap.kind), gap.detail))
    return [
        VideoCoverage(
            video_id=row.video_id,
            state=VideoState(row.state),
            reason_kind=row.reason_kind,
            reason=row.reason,
            duration_us=row.duration_us,
            analysed_us=analysed_us[row.video_id],
            waiting_us=waiting_us[row.video_id],
            gaps=tuple(found[row.video_id]),
        )
        for row in rows
    ]
