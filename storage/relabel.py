"""New labels for a job that is done: from its stored embeddings, without a picture being decoded
or sent. What comes of it is a job of its own beside the old one.

First come the answers (scenes, summaries, flags), for which reading the vectors is the most of the
work; then the rows of all samples and predictions, of which there are so many that writing them
takes ten times as long. The vectors are read twice for that: rows that waited would fill memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, Select, delete, func, select
from sqlalchemy import insert as plain_insert

from storage import ledger, vectors
from storage.bulk import insert_columns
from storage.columns import SampleColumns, with_rows, without_rows
from storage.crew import crew
from storage.database import reading, writing
from storage.dialect import Now, among, upsert
from storage.embedded import why_not_embedded
from storage.labels import label_set, label_vectors
from storage.ledger import Job, JobState
from storage.ledger.job import finish_planning_in, lock_job, reopen
from storage.records import Gap, GapKind, JobSpec, LabelSet, VideoState
from storage.relabelled import Answered, Question, Ranked, answers_of, paired
from storage.schema import (
    flags,
    gaps,
    job_videos,
    jobs,
    predictions,
    samples,
    scenes,
    tasks,
    videos,
)
from storage.vectors import VideoVectors

_SAMPLES_AT_ONCE = 20_000
"""Samples whose rows one transaction writes, of a video without any one; other writers wait no
longer than for these."""

_SHARES_AT_ONCE = 1_200_000
"""Samples times labels of the videos whose scenes are found together; more fill memory and gain
little."""

_WORTH_A_CREW = 100_000
"""Samples for which processes are begun; fewer are answered for in less than half a second."""

Video = TypeVar("Video")
Batch = TypeVar("Batch")


class CannotRelabel(Exception):
    """The job cannot be given other labels without its pictures being sent again."""


def check(engine: Engine, job: Job) -> None:
    """Return where the job can be given other labels.

    Raises CannotRelabel where it is not done, or nothing of it is embedded.
    """
    if job.state is not JobState.CLOSED:
        raise CannotRelabel(
            f"job {job.id} is not done: first finish it with the command that began it"
        )
    with reading(engine) as connection:
        if not any(_stored(connection, job)):
            raise CannotRelabel(
                f"job {job.id} has no stored embeddings: {why_not_embedded(engine, job)}"
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
) -> bool:
    """Fill the job made by `new_job` from the stored vectors, and close it; False where rows are
    left to be written, by another call that is at it or by repeating this one.

    The label set's vectors must be stored (`labels.store_label_vectors`). `answers` is called once
    every video has its state, scenes and flags, with the number of samples whose rows are still to
    be written; `progress` with the number of those written, after each transaction. Videos that
    stand in `target` already and have not changed in `source` are left as they are, so an
    interrupted call may be repeated. Time without a stored vector becomes a gap that says so.
    Raises CannotRelabel where the new job is purged meanwhile.
    """
    named = label_set(engine, target.label_set_id).labels
    matrix = label_vectors(engine, target.label_set_id, target.model)
    if matrix is None:
        raise ValueError(f"the vectors of label set {target.label_set_id} are not stored")
    sizes = _sizes(engine, source.id)
    with reading(engine) as connection:
        asked = [row.video_id for row in connection.execute(_waiting(source.id, target.id))]
    few = sum(sizes.get(video_id, 0) for video_id in asked) < _WORTH_A_CREW
    # One moment for all that this process reads.
    with crew(engine, alone=few) as workers, reading(engine) as connection:
        waiting = connection.execute(_waiting(source.id, target.id)).all()
        old_gaps = _gaps_of(connection, source.id)
        of_job = source.id, str(source.sampling), str(source.fit), source.model
        # Pictures of examples have become vectors.
        bare = [replace(label, examples=()) for label in named]
        ask = partial(answers_of, question=Question(of_job, bare, matrix, target.top_n))
        at_once = max(_SHARES_AT_ONCE // len(named), 1)
        parts = [
            (rows, {row.video_id: old_gaps.get(row.video_id, []) for row in rows})
            for rows in _batches(waiting, lambda row: sizes.get(row.video_id, 0), at_once)
        ]
        found = (
            ask(connection, part) or [] if answer is None else answer
            for part, answer in zip(parts, workers.map(ask, connection, parts), strict=True)
        )
        answers(sum(_one_behind(partial(_write_answers, engine, target.id), found)))
        workers.end()
        ids = [row.video_id for row in waiting]
        with vectors.ahead(vectors.of_job(connection, *of_job, ids) if ids else ()) as stored:
            ranked = (
                Ranked(old, SampleColumns.scored(one.times, one.vectors, matrix, target.top_n))
                for old, one in paired(waiting, stored)
                if one is not None
            )
            write_rows = partial(_write_rows, engine, target.id)
            for count in _one_behind(write_rows, _batches(ranked, len, _SAMPLES_AT_ONCE)):
                progress(count)
    return _finish(engine, target.id)


def _sizes(engine: Engine, job_id: int) -> dict[int, int]:
    """How many samples the job has of each video."""
    counts = select(tasks.c.video_id, func.sum(tasks.c.samples).label("samples"))
    of_job = counts.where(tasks.c.job_id == job_id).group_by(tasks.c.video_id)
    with reading(engine) as connection:
        return {row.video_id: int(row.samples) for row in connection.execute(of_job)}


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
            | without_rows(target, job_videos.c.video_id),
        )
        .order_by(job_videos.c.video_id)
    )


def _finish(engine: Engine, job_id: int) -> bool:
    """Let the job close, unless rows of it are still to be written; whether it was."""
    with writing(engine) as connection:
        lock_job(connection, job_id)
        unwritten = select(job_videos.c.video_id).where(
            job_videos.c.job_id == job_id, without_rows(job_id, job_videos.c.video_id)
        )
        whole = connection.execute(unwritten.limit(1)).first() is None
        if whole:
            finish_planning_in(connection, job_id)
    ledger.close_finished(engine, job_id)
    return whole


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


def _batches(
    videos: Iterable[Video], samples_of: Callable[[Video], int], samples_at_once: int
) -> Iterator[list[Video]]:
    """The videos, several together until they have so many samples, of a video without any one."""
    batch, size = [], 0
    for video in videos:
        batch.append(video)
        size += max(samples_of(video), 1)
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


def _write_answers(engine: Engine, job_id: int, batch: Sequence[Answered]) -> int:
    """Write what stands of videos in one transaction, but for the rows of their samples; return
    the number of those."""
    by_id = {video.row["video_id"]: video for video in batch}
    with _writing(engine, job_id, by_id) as (connection, there):
        # Who relabels the same job at once may have answered, and from a later state of the old.
        known = select(
            job_videos.c.video_id,
            job_videos.c.closed_ms,
            without_rows(job_id, job_videos.c.video_id).label("lacking"),
        ).where(job_videos.c.job_id == job_id, among(connection, job_videos.c.video_id, there))
        for row in connection.execute(known):
            asked_ms = by_id[row.video_id].row["closed_ms"]
            if asked_ms < row.closed_ms or (asked_ms == row.closed_ms and not row.lacking):
                there.remove(row.video_id)
        _clear(connection, job_id, there)
        mine = [by_id[video_id] for video_id in sorted(there)]
        if mine:
            # Another call may have let it close meanwhile, when these had their rows.
            reopen(connection, job_id, planning_finished=False)
        upsert(connection, job_videos, [{"job_id": job_id, **video.row} for video in mine])
        _write_found(connection, job_id, [video for video in mine if video.task])
    return sum(video.samples for video in batch)


@contextmanager
def _writing(
    engine: Engine, job_id: int, video_ids: Iterable[int]
) -> Iterator[tuple[Connection, set[int]]]:
    """A transaction in which nobody else writes to the job, and those of the videos that still are
    there, which nobody purges before it ends. Raises CannotRelabel where the job is gone."""
    with writing(engine) as connection:
        lock_job(connection, job_id)
        if connection.scalar(select(jobs.c.id).where(jobs.c.id == job_id)) is None:
            raise CannotRelabel(f"job {job_id} was purged while it was filled: repeat the command")
        those = select(videos.c.id).where(among(connection, videos.c.id, video_ids))
        kept = those.order_by(videos.c.id).with_for_update(read=True, key_share=True)
        yield connection, set(connection.scalars(kept))


def _clear(connection: Connection, job_id: int, video_ids: Iterable[int]) -> None:
    """Delete what the job says of these videos so far."""
    of_these = select(job_videos.c.video_id).where(
        job_videos.c.job_id == job_id, among(connection, job_videos.c.video_id, video_ids)
    )
    there = connection.scalars(of_these).all()
    filled = connection.scalars(of_these.where(with_rows(job_id, job_videos.c.video_id))).all()
    for table in (gaps, scenes, flags, tasks, samples, predictions):
        # Not without need: PostgreSQL may read a table of millions of rows to find none.
        if ids := filled if table in (samples, predictions) else there:
            connection.execute(
                delete(table).where(
                    table.c.job_id == job_id, among(connection, table.c.video_id, ids)
                )
            )


def _write_found(connection: Connection, job_id: int, found: Sequence[Answered]) -> None:
    """What was found in videos that can be read: a statement or two for each table, so that many
    small videos are no slower than a few large ones."""
    if not found:
        return
    keyed = [({"job_id": job_id, "video_id": one.row["video_id"]}, one) for one in found]
    now_ms = connection.execute(select(Now())).scalar_one()
    connection.execute(
        plain_insert(tasks), [key | {"done_ms": now_ms} | (one.task or {}) for key, one in keyed]
    )
    with_gaps = [key["video_id"] for key, one in keyed if one.gaps]
    numbers = select(tasks.c.video_id, tasks.c.id).where(
        tasks.c.job_id == job_id, among(connection, tasks.c.video_id, with_gaps)
    )
    task_of = {row.video_id: row.id for row in connection.execute(numbers)}
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
    shown = [one.scenes.columns() for one in found]
    columns = {name: np.concatenate([one[name] for one in shown]) for name in shown[0]}
    video_id = np.repeat(video_ids, [len(one["label"]) for one in shown])
    insert_columns(connection, scenes, {"job_id": job_id, "video_id": video_id, **columns})


def _write_rows(engine: Engine, job_id: int, batch: Sequence[Ranked]) -> int:
    """Write the samples and predictions of videos in one transaction; the number of samples."""
    with _writing(engine, job_id, [one.old.video_id for one in batch]) as (connection, there):
        # Whoever relabels the same job at once may have written them, or answered otherwise.
        task = tasks.alias()
        lacking = (
            select(job_videos.c.video_id, job_videos.c.closed_ms, task.c.samples)
            .join(
                task,
                (task.c.job_id == job_videos.c.job_id) & (task.c.video_id == job_videos.c.video_id),
            )
            .where(
                job_videos.c.job_id == job_id,
                among(connection, job_videos.c.video_id, there),
                without_rows(job_id, job_videos.c.video_id),
            )
        )
        answered_for = {tuple(row) for row in connection.execute(lacking)}
        mine = [
            one for one in batch if (one.old.video_id, one.old.closed_ms, len(one)) in answered_for
        ]
        if mine:
            _insert_rows(connection, job_id, mine)
    return sum(map(len, batch))


def _insert_rows(connection: Connection, job_id: int, of_videos: Sequence[Ranked]) -> None:
    """Samples and predictions of videos, each of which has some: as many predictions a sample."""

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(one.samples, name) for one in of_videos])

    video_id = np.repeat([one.old.video_id for one in of_videos], list(map(len, of_videos)))
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
