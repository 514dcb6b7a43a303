"""Videos and jobs are closed by counting their rows, never by a message that could get lost."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, Row, delete, exists, select, update
from sqlalchemy import insert as plain_insert

from storage import vectors
from storage.bulk import insert_columns
from storage.columns import SampleColumns, columns_in
from storage.database import DatabaseError, reading, writing
from storage.dialect import Now, upsert
from storage.flags import flag_rows
from storage.labels import labels_in
from storage.ledger.events import job_closed
from storage.ledger.job import JobState
from storage.records import Gap, GapKind, TaskState, VideoState
from storage.results import gaps_in
from storage.scenes import SceneColumns, Shares, scenes_of_videos
from storage.schema import (
    OPEN,
    RUNNING,
    flags,
    gaps,
    job_videos,
    jobs,
    probes,
    scenes,
    still_open,
    tasks,
)
from storage.scoring import picture_changes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClosedVideo:
    """A video that was closed, and how it stands now."""

    job_id: int
    video_id: int
    state: VideoState


class Unclosable:
    """Videos that could not be closed, since another release planned them or their rows are
    damaged: each fault is told once, and the video left alone for a while; there may be thousands.
    """

    REST_S = 60.0

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[int, int], tuple[float, str]] = {}

    def rests(self, job_id: int, video_id: int) -> bool:
        """Whether it is too early to try this one again."""
        until, _ = self._known.get((job_id, video_id), (0.0, ""))
        return self._clock() < until

    def add(self, job_id: int, video_id: int, error: Exception) -> None:
        """That is why it could not be closed now."""
        said = f"{type(error).__name__}: {error}"
        _, before = self._known.get((job_id, video_id), (0.0, ""))
        self._known[job_id, video_id] = self._clock() + self.REST_S, said
        if said != before:
            log.error("video %d of job %d cannot be closed", video_id, job_id, exc_info=error)


def close_finished(
    engine: Engine,
    job_id: int | None = None,
    limit: int | None = None,
    unclosable: Unclosable | None = None,
) -> list[ClosedVideo]:
    """Close every video whose tasks are all finished, of all jobs or of `job_id` alone, then every
    job whose videos are all closed; return the videos closed by this call, `limit` at most.

    Closing writes the gaps of failed and cancelled tasks, the scenes and the flags. Done twice or
    by two at once, it gives the same rows. A video that cannot be closed stays open, is told in the
    log and holds up no other; whoever looks often keeps the `unclosable`.
    """
    open_task = exists().where(
        OPEN, tasks.c.job_id == job_videos.c.job_id, tasks.c.video_id == job_videos.c.video_id
    )
    finished = select(job_videos.c.job_id, job_videos.c.video_id).where(RUNNING, ~open_task)
    if job_id is not None:
        finished = finished.where(job_videos.c.job_id == job_id)
    with reading(engine) as connection:
        found = connection.execute(finished.order_by(*finished.selected_columns)).all()
    unclosable = unclosable or Unclosable()
    closed: list[ClosedVideo] = []
    for job, video in found:
        if len(closed) == limit:
            break
        if unclosable.rests(job, video):
            continue
        try:
            state = _close_video(engine, job, video)
        except DatabaseError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are closed
            unclosable.add(job, video, error)
            continue
        if state is not None:
            closed.append(ClosedVideo(job, video, state))
    _close_jobs(engine, job_id)
    return closed


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A finished video as it will stand in the tables."""

    opening: int
    state: VideoState
    analysed_us: int
    reason: tuple[str, str] | tuple[None, None]
    lost: list[tuple[int, Gap]]
    scenes: SceneColumns
    flags: list[dict[str, Any]]


def _close_video(engine: Engine, job_id: int, video_id: int) -> VideoState | None:
    outcome = _outcome(engine, job_id, video_id)
    if outcome is None:
        return None
    of_video = {"job_id": job_id, "video_id": video_id}
    kind, detail = outcome.reason
    with writing(engine) as connection:
        # Scenes take a while to compute, and no writer waits for that; so the video may have been
        # closed, or closed and opened again, by somebody else meanwhile.
        mine = connection.execute(
            update(job_videos)
            .where(
                RUNNING,
                job_videos.c.job_id == job_id,
                job_videos.c.video_id == video_id,
                job_videos.c.opening == outcome.opening,
            )
            .values(
                state=outcome.state,
                analysed_us=outcome.analysed_us,
                reason_kind=kind,
                reason=detail,
                closed_ms=Now(),
            )
        )
        if mine.rowcount == 0:
            return None
        upsert(
            connection,
            gaps,
            [
                {
                    **of_video,
                    "start_us": gap.start_us,
                    "end_us": gap.end_us,
                    "kind": gap.kind,
                    "detail": gap.detail,
                    "task_id": task_id,
                }
                for task_id, gap in outcome.lost
            ],
        )
        for table in (scenes, flags):
            connection.execute(
                delete(table).where(table.c.job_id == job_id, table.c.video_id == video_id)
            )
        insert_columns(connection, scenes, {**of_video, **outcome.scenes.columns()})
        if outcome.flags:
            connection.execute(plain_insert(flags), [of_video | row for row in outcome.flags])
    return outcome.state


def _outcome(engine: Engine, job_id: int, video_id: int) -> _Outcome | None:
    with reading(engine) as connection:
        opening = connection.scalar(
            select(job_videos.c.opening).where(
                RUNNING, job_videos.c.job_id == job_id, job_videos.c.video_id == video_id
            )
        )
        if opening is None:
            return None
        rows = connection.execute(
            select(
                tasks.c.id,
                tasks.c.state,
                tasks.c.start_us,
                tasks.c.end_us,
                tasks.c.gap_us,
                tasks.c.error_kind,
                tasks.c.error,
            ).where(tasks.c.job_id == job_id, tasks.c.video_id == video_id)
        ).all()
        found = columns_in(connection, job_id, video_id)
        changes = _picture_changes(connection, job_id, video_id, found)
        known = gaps_in(connection, job_id, video_id)
        label_set = labels_in(connection, job_id)
    lost = [(row.id, _gap_of(row)) for row in rows if row.state != TaskState.DONE]
    every_gap = sorted([*known, *(gap for _, gap in lost)], key=lambda gap: gap.start_us)
    analysed_us = sum(
        row.end_us - row.start_us - row.gap_us for row in rows if row.state == TaskState.DONE
    )
    state, reason = standing(analysed_us, every_gap)
    curves = found.curves(len(label_set))
    (shown,) = scenes_of_videos([(curves, every_gap, changes)])
    return _Outcome(
        opening=opening,
        state=state,
        analysed_us=analysed_us,
        reason=reason,
        lost=lost,
        scenes=shown,
        flags=flag_rows(found, label_set),
    )


def _picture_changes(
    connection: Connection, job_id: int, video_id: int, found: SampleColumns
) -> Shares | None:
    """How the video's pictures change from sample to sample; None where they are not embedded."""
    job = connection.execute(
        select(jobs.c.sampling, jobs.c.fit, jobs.c.model).where(jobs.c.id == job_id)
    ).one()
    # As they are written: a release that cannot read them can close the video all the same.
    for stored in vectors.of_job(connection, job_id, *job, [video_id]):
        at = np.searchsorted(stored.times[:, vectors.BUCKET], found.bucket)
        if (
            at.max(initial=-1) < len(stored.times)
            and (stored.times[at, vectors.BUCKET] == found.bucket).all()
        ):
            return picture_changes([stored.vectors[at]])
    return None


def _gap_of(task: Row[*tuple[Any, ...]]) -> Gap:
    if task.state == TaskState.CANCELLED:
        return Gap(task.start_us, task.end_us, GapKind.CANCELLED)
    detail = f"{task.error_kind}: {task.error}"
    return Gap(task.start_us, task.end_us, GapKind.TASK_FAILED, detail)


def standing(
    analysed_us: int, every_gap: Sequence[Gap]
) -> tuple[VideoState, tuple[str, str] | tuple[None, None]]:
    """State of a video whose tasks are finished, and kind and detail of why it is not complete."""
    return _state_of(analysed_us, every_gap), _reason_of(every_gap)


def _state_of(analysed_us: int, every_gap: Sequence[Gap]) -> VideoState:
    if not every_gap:
        return VideoState.COMPLETE
    if analysed_us > 0:
        return VideoState.PARTIAL
    if all(gap.kind is GapKind.CANCELLED for gap in every_gap):
        return VideoState.CANCELLED
    return VideoState.FAILED


def _reason_of(every_gap: Sequence[Gap]) -> tuple[str, str] | tuple[None, None]:
    """Kind of the gaps that take most of the time, and what the longest of them says."""
    if not every_gap:
        return None, None
    lengths: Counter[GapKind] = Counter()
    for gap in every_gap:
        lengths[gap.kind] += gap.end_us - gap.start_us
    worst = lengths.most_common(1)[0][0]
    longest = max(
        (gap for gap in every_gap if gap.kind is worst), key=lambda gap: gap.end_us - gap.start_us
    )
    return worst, longest.detail


def _close_jobs(engine: Engine, job_id: int | None) -> None:
    running_video = exists().where(RUNNING, job_videos.c.job_id == jobs.c.id)
    open_probe = exists().where(still_open(probes), probes.c.job_id == jobs.c.id)
    finished = (
        (jobs.c.state != JobState.CLOSED) & jobs.c.planning_finished & ~running_video & ~open_probe
    )
    if job_id is not None:
        finished = finished & (jobs.c.id == job_id)
    with reading(engine) as connection:
        if connection.scalar(select(jobs.c.id).where(finished).limit(1)) is None:
            return
    with writing(engine) as connection:
        # Locked first, then asked again: see `lock_job`.
        ids = connection.scalars(
            select(jobs.c.id).where(finished).with_for_update(key_share=True)
        ).all()
        closed = connection.scalars(
            update(jobs)
            .where(jobs.c.id.in_(ids), finished)
            .values(state=JobState.CLOSED, pause_kind=None, pause_reason=None, closed_ms=Now())
            .returning(jobs.c.id)
        ).all()
        for one in closed:
            job_closed(connection, one)
