"""New labels for a job that is done: from its stored embeddings, without a picture being decoded
or sent. What comes of it is a job of its own beside the old one.

First come the answers (scenes, summaries, flags), for which reading the vectors is the most of the
work; then the rows of all samples and predictions, of which there are so many that writing them
takes ten times as long. The vectors are read twice for that: rows that waited would fill memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, Engine, Select, delete, exists, select
from sqlalchemy import insert as plain_insert

from storage import ledger, vectors
from storage.bulk import insert_columns
from storage.database import reading, writing
from storage.dialect import Now, among, upsert
from storage.labels import label_set, label_vectors
from storage.ledger import Job, JobState
from storage.ledger.job import lock_job
from storage.records import Gap, GapKind, JobSpec, LabelSet, VideoState
from storage.relabelled import Answered, OldRow, Scored, answered, scored
from storage.schema import flags, gaps, job_videos, predictions, samples, scenes, tasks
from storage.vectors import VideoVectors

_SAMPLES_AT_ONCE = 20_000
"""Samples whose rows one transaction writes, of a video without any one; other writers wait no
longer than for these."""

_ANSWERED_AT_ONCE = 60_000
"""Samples of the videos whose scenes are found together; more fill memory and gain little."""

_AT_ONCE = min(4, os.cpu_count() or 1)
"""Videos that are scored at once; each is some megabytes."""

Batch = TypeVar("Batch")


class CannotRelabel(Exception):
    """The job cannot be given other labels without its pictures being sent again."""


def check(engine: Engine, job: Job) -> None:
    """Return where the job can be given other labels.

    Raises CannotRelabel where it is not done, or nothing of it is embedded.
    """
    if job.state is not JobState.CLOSED:
        raise CannotRelabel(
            f"job {job.id} is not done: finish it first with the `nightreel run` that began it"
        )
    with reading(engine) as connection:
        if not any(_stored(connection, job)):
            raise CannotRelabel(
                f"job {job.id} has no stored embeddings: an API that only compares gives none, so "
                "other labels need `nightreel run` with the pictures sent again"
            )


def new_job(engine: Engine, job: Job, labels: LabelSet) -> Job:
    """The job that holds this job's samples under other labels, made if there is none.

    The same job and labels are always the same new job. Raises CannotRelabel as `check` does.
    """
    check(engine, job)
    asked = ["relabel", job.key, labels.digest]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    spec = JobSpec(
        key, labels.name, job.sampling, job.fit, job.top_n, labels, job.model, job.notice
    )
    return ledger.open_job(engine, spec)


def relabel(
    engine: Engine,
    source: Job,
    target: Job,
    *,
    answers: Callable[[int], None] = lambda samples: None,
    progress: Callable[[int], None] = lambda samples: None,
) -> None:
    """Fill the job made by `new_job` from the stored vectors, and close it.

    The label set's vectors must be stored (`labels.store_label_vectors`). `answers` is called once
    every video has its state, scenes and flags, with the number of samples whose rows are still to
    be written; `progress` with the number of those written, after each transaction. Videos that
    stand in `target` already and have not changed in `source` are left as they are, so an
    interrupted call may be repeated. Time without a stored vector becomes a gap that says so.
    """
    named = label_set(engine, target.label_set_id).labels
    matrix = label_vectors(engine, target.label_set_id, target.model)
    if matrix is None:
        raise ValueError(f"the vectors of label set {target.label_set_id} are not stored")
    # One moment for both passes: what is embedded meanwhile belongs to neither.
    with reading(engine) as connection:
        waiting = connection.execute(_waiting(source.id, target.id)).all()
        old_gaps = _gaps_of(connection, source.id)

        def read(*, with_changes: bool) -> Generator[Scored]:
            score = partial(scored, matrix=matrix, top_n=target.top_n, with_changes=with_changes)
            with vectors.ahead(_stored(connection, source) if waiting else ()) as stored:
                yield from _side_by_side(score, _paired(waiting, stored))

        with closing(read(with_changes=True)) as videos:
            batches = _batches(videos, _ANSWERED_AT_ONCE)
            found = (answered(batch, old_gaps, named) for batch in batches)
            write_answers = partial(_write_answers, engine, source.id, target.id)
            answers(sum(_one_behind(write_answers, found)))
        with closing(read(with_changes=False)) as videos:
            write_rows = partial(_write_rows, engine, target.id)
            for count in _one_behind(write_rows, _batches(videos, _SAMPLES_AT_ONCE)):
                progress(count)
    ledger.finish_planning(engine, target.id)
    ledger.close_finished(engine, target.id)


def _waiting(source: int, target: int) -> Select[*tuple[Any, ...]]:
    """The rows of the source's closed videos that the target lacks, holds as they were, or holds
    without the rows of their samples; by number of video."""
    there = job_videos.alias()
    return (
        select(job_videos)
        .outerjoin(there, (there.c.job_id == target) & (there.c.video_id == job_videos.c.video_id))
        .where(
            job_videos.c.job_id == source,
            job_videos.c.state != VideoState.RUNNING,
            there.c.closed_ms.is_(None)
            | (there.c.closed_ms < job_videos.c.closed_ms)
            | _without_rows(target, job_videos.c.video_id),
        )
        .order_by(job_videos.c.video_id)
    )


def _without_rows(job_id: int, video_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether a relabelling has answered for the video and not written its samples."""
    task = exists().where(
        tasks.c.job_id == job_id, tasks.c.video_id == video_id, tasks.c.samples > 0
    )
    return task & ~_has_rows(job_id, video_id)


def _has_rows(job_id: int, video_id: ColumnElement[int]) -> ColumnElement[bool]:
    return exists().where(samples.c.job_id == job_id, samples.c.video_id == video_id)


def _stored(connection: Connection, job: Job) -> Iterator[VideoVectors]:
    return vectors.of_job(connection, job.id, job.sampling, job.fit, job.model)


def _gaps_of(connection: Connection, job_id: int) -> dict[int, list[Gap]]:
    rows = connection.execute(
        select(gaps.c.video_id, gaps.c.start_us, gaps.c.end_us, gaps.c.kind, gaps.c.detail)
        .where(gaps.c.job_id == job_id)
        .order_by(gaps.c.video_id, gaps.c.start_us)
    )
    return {
        video_id: [Gap(start, end, GapKind(kind), detail) for _, start, end, kind, detail in of]
        for video_id, of in groupby(rows, key=lambda row: row.video_id)
    }


def _paired(
    rows: Sequence[OldRow], stored: Iterator[VideoVectors]
) -> Iterator[tuple[OldRow, VideoVectors | None]]:
    """Each video with its vectors, if there are any; both come by number of video."""
    ahead = next(stored, None)
    for row in rows:
        while ahead is not None and ahead.video_id < row.video_id:
            ahead = next(stored, None)
        yield row, ahead if ahead is not None and ahead.video_id == row.video_id else None


def _side_by_side(
    score: Callable[[OldRow, VideoVectors | None], Scored],
    videos: Iterable[tuple[OldRow, VideoVectors | None]],
) -> Iterator[Scored]:
    """What `score` gives of each video, in their order, of some of them at the same time."""
    with ThreadPoolExecutor(_AT_ONCE, "scores") as threads:
        coming: deque[Future[Scored]] = deque()
        for video in videos:
            coming.append(threads.submit(score, *video))
            if len(coming) > _AT_ONCE:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _batches(videos: Iterable[Scored], samples_at_once: int) -> Iterator[list[Scored]]:
    """The videos, several together until they have so many samples."""
    batch, size = [], 0
    for video in videos:
        batch.append(video)
        size += max(len(video.samples), 1)
        if size >= samples_at_once:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _one_behind(write: Callable[[Batch], int], batches: Iterable[Batch]) -> Iterator[int]:
    """What `write` returns of each batch, which a thread of its own writes while the next one is
    worked out."""
    with ThreadPoolExecutor(1, "relabel") as thread:
        before: Future[int] | None = None
        for batch in batches:
            if before is not None:
                yield before.result()
            before = thread.submit(write, batch)
        if before is not None:
            yield before.result()


def _write_answers(engine: Engine, source: int, target: int, batch: Sequence[Answered]) -> int:
    """Write what stands of videos in one transaction, but for the rows of their samples; return
    the number of those."""
    with writing(engine) as connection:
        # Who relabels the same job in the same way at once waits, and then leaves these alone.
        lock_job(connection, target)
        ids = [video.row["video_id"] for video in batch]
        still = _waiting(source, target).where(among(connection, job_videos.c.video_id, ids))
        waiting = {row.video_id for row in connection.execute(still)}
        _clear(connection, target, waiting)
        mine = [video for video in batch if video.row["video_id"] in waiting]
        now_ms = connection.execute(select(Now())).scalar_one()
        rows = [{"job_id": target, "closed_ms": now_ms, **video.row} for video in mine]
        upsert(connection, job_videos, rows)
        _write_found(connection, target, now_ms, [video for video in mine if video.task])
    return sum(video.samples for video in batch)


def _clear(connection: Connection, job_id: int, video_ids: Iterable[int]) -> None:
    """Delete what the job says of these videos so far."""
    of_these = select(job_videos.c.video_id).where(
        job_videos.c.job_id == job_id, among(connection, job_videos.c.video_id, video_ids)
    )
    there = connection.scalars(of_these).all()
    with_rows = connection.scalars(of_these.where(_has_rows(job_id, job_videos.c.video_id))).all()
    for table in (gaps, scenes, flags, tasks, samples, predictions):
        # Not without need: PostgreSQL may read a table of millions of rows to find none.
        if ids := with_rows if table in (samples, predictions) else there:
            connection.execute(
                delete(table).where(
                    table.c.job_id == job_id, among(connection, table.c.video_id, ids)
                )
            )


def _write_found(
    connection: Connection, job_id: int, now_ms: int, videos: Sequence[Answered]
) -> None:
    """What was found in videos that can be read: a statement or two for each table, so that many
    small videos are no slower than a few large ones."""
    if not videos:
        return
    keyed = [({"job_id": job_id, "video_id": one.row["video_id"]}, one) for one in videos]
    made = connection.execute(
        plain_insert(tasks).returning(tasks.c.video_id, tasks.c.id),
        [key | {"done_ms": now_ms} | one.task for key, one in keyed if one.task is not None],
    )
    task_of = {row.video_id: row.id for row in made}
    gap_rows = [
        {
            **key,
            "start_us": gap.start_us,
            "end_us": gap.end_us,
            "kind": gap.kind,
            "detail": gap.detail,
            "task_id": task_of[key["video_id"]],
        }
        for key, one in keyed
        for gap in one.gaps
    ]
    flag_rows = [key | row for key, one in keyed for row in one.flags]
    for table, rows in ((gaps, gap_rows), (flags, flag_rows)):
        if rows:
            connection.execute(plain_insert(table), rows)
    video_ids = [key["video_id"] for key, _ in keyed]
    found = [one.scenes.columns() for one in videos]
    columns = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    video_id = np.repeat(video_ids, [len(one["label"]) for one in found])
    insert_columns(connection, scenes, {"job_id": job_id, "video_id": video_id, **columns})


def _write_rows(engine: Engine, job_id: int, batch: Sequence[Scored]) -> int:
    """Write the samples and predictions of videos in one transaction; the number of samples."""
    with writing(engine) as connection:
        lock_job(connection, job_id)
        ids = [video.old.video_id for video in batch]
        answered_for = select(tasks.c.video_id, tasks.c.samples).where(
            tasks.c.job_id == job_id,
            among(connection, tasks.c.video_id, ids),
            _without_rows(job_id, tasks.c.video_id),
        )
        lacking = {row.video_id: row.samples for row in connection.execute(answered_for)}
        _write_samples(
            connection,
            job_id,
            # Whoever relabels the same job at once may have written them, or found others.
            [one for one in batch if lacking.get(one.old.video_id) == len(one.samples)],
        )
    return sum(len(video.samples) for video in batch)


def _write_samples(connection: Connection, job_id: int, videos: Sequence[Scored]) -> None:
    """Samples and predictions of videos, each of which has some: as many predictions a sample."""
    if not videos:
        return

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(one.samples, name) for one in videos])

    video_id = np.repeat([one.old.video_id for one in videos], [len(one.samples) for one in videos])
    bucket = column("bucket")
    times = {name: column(name) for name in ("t_us", "start_us", "end_us")}
    insert_columns(
        connection, samples, {"job_id": job_id, "video_id": video_id, "bucket": bucket, **times}
    )
    best = {name: column(name) for name in ("label", "similarity", "confidence")}
    count, ranks = best["label"].shape
    insert_columns(
        connection,
        predictions,
        {
            "job_id": job_id,
            "video_id": np.repeat(video_id, ranks),
            "bucket": np.repeat(bucket, ranks),
            "rank": np.tile(np.arange(ranks), count),
            **{name: values.ravel() for name, values in best.items()},
        },
    )
