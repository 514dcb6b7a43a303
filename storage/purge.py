"""Deleting all that is known of a job or of a video, in every table.

Which rows those are, the tables themselves say by their columns `job_id` and `video_id`, so that a
table that is added later is not forgotten. `tests/test_purge.py` walks the database for remains.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Table,
    and_,
    delete,
    exists,
    func,
    literal,
    select,
)

from storage.database import reading, writing
from storage.exits import ExitCode
from storage.ledger.events import EventState
from storage.ledger.job import JobState, NoSuchJob
from storage.records import Fit, VideoState, shown_path
from storage.schema import (
    RUNNING,
    embeddings,
    events,
    files,
    job_videos,
    jobs,
    label_examples,
    label_sets,
    label_vectors,
    labels,
    metadata,
    probes,
    samples,
    still_open,
    tasks,
    usage,
    videos,
)
from storage.summaries import NoSuchVideo, videos_named

SAMPLES_AT_ONCE = 50_000
"""Samples that one transaction of a large job deletes; other writers wait no longer than for
these."""
VIDEOS_AT_ONCE = 1_000

_OF_JOB = [table for table in reversed(metadata.sorted_tables) if "job_id" in table.c]
"""Tables with a job's rows, those that refer to others first."""
_OF_VIDEO = [table for table in reversed(metadata.sorted_tables) if "video_id" in table.c]
_OF_LABELS = (label_examples, label_vectors, labels)
_SHARED_BY = ("sampling", "fit", "model")
"""What jobs must have in common to share a video's embeddings."""


class CannotPurge(Exception):
    """Somebody works on what is to be deleted."""

    code = ExitCode.USAGE


@dataclass(frozen=True, slots=True)
class Loss:
    """What deleting takes away."""

    rows: Mapping[str, int]
    """Rows by table; those without any are left out."""
    samples: int
    """Frames with their labels, in all jobs concerned."""
    image_calls: int
    """Calls that the API would bill to get them back: frames without a stored embedding then."""
    undelivered: int = 0
    """Notifications that are still to be delivered."""

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(self.rows.values())


def job_loss(engine: Engine, job_id: int, *, with_embeddings: bool = False) -> Loss:
    """What `purge_job` would delete. Raises NoSuchJob, CannotPurge."""
    with reading(engine) as connection:
        _idle_job(connection, job_id)
        counted = Counter({table.name: _count(connection, table, job_id) for table in _OF_JOB})
        counted["jobs"] = 1
        gone = _spare_embeddings(job_id) if with_embeddings else None
        if gone is not None:
            found = select(func.count()).select_from(embeddings).where(gone)
            counted["embeddings"] = connection.scalars(found).one()
        label_set_id = _lonely_label_set(connection, job_id)
        if label_set_id is not None:
            counted["label_sets"] = 1
            for table in _OF_LABELS:
                of_set = table.c.label_set_id == label_set_id
                found = select(func.count()).select_from(table).where(of_set)
                counted[table.name] = connection.scalars(found).one()
        undelivered = connection.scalars(
            select(func.count())
            .select_from(events)
            .where(events.c.job_id == job_id, events.c.state == EventState.PENDING)
        ).one()
        calls = _calls_of_job(connection, job_id, gone)
    return Loss(+counted, counted["samples"], calls, undelivered)


def _count(connection: Connection, table: Table, job_id: int) -> int:
    found = select(func.count()).select_from(table).where(table.c.job_id == job_id)
    return connection.scalars(found).one()


def _calls_of_job(connection: Connection, job_id: int, gone: ColumnElement[bool] | None) -> int:
    """Squares of the job's frames that were sent and have no embedding once `gone` is gone."""
    embedded = (
        exists()
        .where(
            embeddings.c.video_id == samples.c.video_id,
            *(embeddings.c[name] == jobs.c[name] for name in _SHARED_BY),
            literal(True) if gone is None else ~gone,
        )
        .correlate(samples, jobs)
    )
    sent = (
        select(func.count(), jobs.c.fit)
        .select_from(samples)
        .join(jobs, jobs.c.id == samples.c.job_id)
        .where(samples.c.job_id == job_id, samples.c.reused_from.is_(None), ~embedded)
        .group_by(jobs.c.fit)
    )
    return sum(count * _squares(fit) for count, fit in connection.execute(sent))


def _squares(fit: str) -> int:
    """Squares that are sent of a frame: one at least, where a later release knows another fit."""
    return Fit(fit).squares if fit in set(Fit) else 1


def purge_job(engine: Engine, job_id: int, *, with_embeddings: bool = False) -> Mapping[str, int]:
    """Delete the job, and return the rows deleted by table; embeddings stay unless asked for, and
    then those that another job needs stay.

    A large job goes in several transactions: after an interruption the same call goes on. Raises
    NoSuchJob, CannotPurge.
    """
    deleted: Counter[str] = Counter()
    with reading(engine) as connection:
        _idle_job(connection, job_id)
        batches = list(_batches(connection, job_id))
    for video_ids in batches:
        with writing(engine) as connection:
            _idle_job(connection, job_id, lock=True)
            if with_embeddings:
                mine = _spare_embeddings(job_id) & embeddings.c.video_id.in_(video_ids)
                deleted["embeddings"] += _delete(connection, embeddings, mine)
            deleted += _delete_videos(connection, job_id, video_ids)
    with writing(engine) as connection:
        _idle_job(connection, job_id, lock=True)
        for table in _OF_JOB:
            deleted[table.name] += _delete(connection, table, table.c.job_id == job_id)
        label_set_id = _lonely_label_set(connection, job_id)
        deleted["jobs"] += _delete(connection, jobs, jobs.c.id == job_id)
        if label_set_id is not None:
            for table in _OF_LABELS:
                of_set = table.c.label_set_id == label_set_id
                deleted[table.name] += _delete(connection, table, of_set)
            deleted["label_sets"] += _delete(
                connection, label_sets, label_sets.c.id == label_set_id
            )
    return +deleted


def _idle_job(connection: Connection, job_id: int, *, lock: bool = False) -> None:
    query = select(jobs.c.state, jobs.c.planning_finished).where(jobs.c.id == job_id)
    job = connection.execute(query.with_for_update() if lock else query).first()
    if job is None:
        raise NoSuchJob(f"there is no job {job_id}: `nightreel jobs` lists those there are")
    # Of one that was cancelled, videos may stay open that no release at hand can close.
    works = not job.planning_finished or any(
        connection.scalar(select(exists().where(still_open(table), table.c.job_id == job_id)))
        for table in (tasks, probes)
    )
    if job.state != JobState.CLOSED and works:
        raise CannotPurge(
            f"job {job_id} is {job.state}: end it first with `nightreel cancel {job_id}`"
        )


def _batches(connection: Connection, job_id: int) -> Iterator[list[int]]:
    """The job's videos, in groups of about `SAMPLES_AT_ONCE` samples."""
    sizes = connection.execute(
        select(job_videos.c.video_id, func.coalesce(func.sum(tasks.c.samples), 0))
        .outerjoin(
            tasks,
            (tasks.c.job_id == job_videos.c.job_id) & (tasks.c.video_id == job_videos.c.video_id),
        )
        .where(job_videos.c.job_id == job_id)
        .group_by(job_videos.c.video_id)
        .order_by(job_videos.c.video_id)
    )
    before = 0

    def batch(row: tuple[int, int]) -> int:
        nonlocal before
        at = before // SAMPLES_AT_ONCE
        # Videos without samples count, too: a statement's parameters are bounded.
        before += max(int(row[1]), SAMPLES_AT_ONCE // VIDEOS_AT_ONCE)
        return at

    for _, group in groupby((tuple(row) for row in sizes), key=batch):
        yield [video_id for video_id, _ in group]


def _delete_videos(connection: Connection, job_id: int, video_ids: Iterable[int]) -> Counter[str]:
    """Delete the rows of these videos in the job."""
    deleted: Counter[str] = Counter()
    chosen = list(video_ids)
    # Whoever is about to close one waits, and finds nothing to close.
    connection.execute(
        select(job_videos.c.video_id)
        .where(job_videos.c.job_id == job_id, job_videos.c.video_id.in_(chosen))
        .with_for_update()
    )
    their_tasks = select(tasks.c.id).where(tasks.c.job_id == job_id, tasks.c.video_id.in_(chosen))
    deleted["usage"] += _delete(
        connection, usage, (usage.c.job_id == job_id) & usage.c.task_id.in_(their_tasks)
    )
    for table in _OF_VIDEO:
        if "job_id" in table.c:
            of_videos = (table.c.job_id == job_id) & table.c.video_id.in_(chosen)
            deleted[table.name] += _delete(connection, table, of_videos)
    return deleted


def _spare_embeddings(job_id: int) -> ColumnElement[bool]:
    """Condition on `embeddings` that this job uses them and no other job does."""
    own, other = jobs.alias(), jobs.alias()
    mine = select(job_videos.c.video_id).where(job_videos.c.job_id == job_id)
    others = (
        select(job_videos.c.video_id)
        .join(other, other.c.id == job_videos.c.job_id)
        .join(own, and_(*(own.c[name] == other.c[name] for name in _SHARED_BY)))
        .where(own.c.id == job_id, other.c.id != job_id)
        .where(job_videos.c.state != VideoState.REJECTED)
    )
    return and_(
        *(
            embeddings.c[name] == select(jobs.c[name]).where(jobs.c.id == job_id).scalar_subquery()
            for name in _SHARED_BY
        ),
        embeddings.c.video_id.in_(mine),
        embeddings.c.video_id.not_in(others),
    )


def _lonely_label_set(connection: Connection, job_id: int) -> int | None:
    """The job's label set, if no other job uses it."""
    other = jobs.alias()
    return connection.scalar(
        select(jobs.c.label_set_id).where(
            jobs.c.id == job_id,
            ~exists().where(other.c.label_set_id == jobs.c.label_set_id, other.c.id != job_id),
        )
    )


def _delete(connection: Connection, table: Table, where: ColumnElement[bool]) -> int:
    return connection.execute(delete(table).where(where)).rowcount


@dataclass(frozen=True, slots=True)
class KnownVideo:
    """A video of the archive, of whichever jobs."""

    video_id: int
    content_id: str
    paths: tuple[str, ...]
    """Every place that it was seen at, printable."""
    jobs: tuple[int, ...]
    """The jobs that know it."""
    label_sets: tuple[str, ...]
    """Names of the label sets that were made from moments of it."""


def find_video(engine: Engine, text: str) -> KnownVideo:
    """The one video of all jobs that the text names: by path, by the path's end (a file name, or
    some folders and a file name), or by content id. Raises NoSuchVideo where that is none or
    several.
    """
    given = shown_path(os.fsencode(text))
    with reading(engine) as connection:
        found = videos_named(connection, text)
        if len(found) == 1:
            return _known(connection, found[0])
        if found:
            places = connection.scalars(
                select(files.c.path).where(files.c.video_id.in_(found[:5])).limit(5)
            )
            raise NoSuchVideo(f"{given!r} names {len(found)} videos: {', '.join(places)}")
    raise NoSuchVideo(
        f"no job has a video {given!r}: give a path, a file name, or a content id; "
        "`./7` names a file where `7` names a job"
    )


def _known(connection: Connection, video_id: int) -> KnownVideo:
    content_id = connection.scalars(
        select(videos.c.content_id).where(videos.c.id == video_id)
    ).one()
    places = connection.scalars(
        select(files.c.path).where(files.c.video_id == video_id).order_by(files.c.id)
    )
    holders = connection.scalars(
        select(job_videos.c.job_id)
        .where(job_videos.c.video_id == video_id)
        .order_by(job_videos.c.job_id)
    )
    picked = connection.scalars(
        select(label_sets.c.name)
        .distinct()
        .join(labels, labels.c.label_set_id == label_sets.c.id)
        .where(labels.c.samples.contains(f'"{content_id}@', autoescape=True))
        .order_by(label_sets.c.name)
    )
    return KnownVideo(video_id, content_id, tuple(places), tuple(holders), tuple(picked))


def video_loss(engine: Engine, video_id: int) -> Loss:
    """What `purge_video` would delete. Raises NoSuchVideo, CannotPurge."""
    with reading(engine) as connection:
        _closed_video(connection, video_id)
        counted = Counter(
            {
                table.name: connection.scalars(
                    select(func.count()).select_from(table).where(where)
                ).one()
                for table, where in _of_video(connection, video_id)
            }
        )
        # Jobs of one sampling, fit and model share what was sent.
        sent = connection.execute(
            select(func.count(samples.c.bucket.distinct()), jobs.c.fit)
            .join(jobs, jobs.c.id == samples.c.job_id)
            .where(
                samples.c.job_id.in_(_jobs_of(connection, video_id)),
                samples.c.video_id == video_id,
                samples.c.reused_from.is_(None),
            )
            .group_by(*(jobs.c[name] for name in _SHARED_BY))
        )
        calls = sum(count * _squares(fit) for count, fit in sent)
    return Loss(+counted, counted["samples"], calls)


def purge_video(engine: Engine, video_id: int) -> Mapping[str, int]:
    """Delete all that is known of the video: its rows in every job, embeddings, the names of its
    files; return the rows deleted by table. One transaction. Raises NoSuchVideo, CannotPurge.
    """
    deleted: Counter[str] = Counter()
    with writing(engine) as connection:
        if connection.dialect.name == "sqlite":
            # Or names would stand in the file until their pages are used again.
            connection.exec_driver_sql("PRAGMA secure_delete = ON")
        _closed_video(connection, video_id, lock=True)
        for table, where in _of_video(connection, video_id):
            deleted[table.name] += _delete(connection, table, where)
    if engine.dialect.name == "sqlite":
        _empty_log(engine)
    return +deleted


def _empty_log(engine: Engine) -> None:
    """Move SQLite's write-ahead log into its file, as far as no reader needs the log: older pages
    stand in it."""
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        connection.close()


def _of_video(connection: Connection, video_id: int) -> Iterator[tuple[Table, ColumnElement[bool]]]:
    """Each table with rows of the video and the condition on them, in the order to delete them."""
    holders = _jobs_of(connection, video_id)
    their_tasks = select(tasks.c.id).where(
        tasks.c.job_id.in_(holders), tasks.c.video_id == video_id
    )
    yield usage, usage.c.job_id.in_(holders) & usage.c.task_id.in_(their_tasks)
    yield probes, _probes_of(video_id)
    for table in _OF_VIDEO:
        of_video = table.c.video_id == video_id
        # Most tables are found by job first.
        yield table, of_video & table.c.job_id.in_(holders) if "job_id" in table.c else of_video
    yield videos, videos.c.id == video_id


def _probes_of(video_id: int) -> ColumnElement[bool]:
    return probes.c.path_sha256.in_(select(files.c.path_sha256).where(files.c.video_id == video_id))


def _jobs_of(connection: Connection, video_id: int) -> list[int]:
    found = select(job_videos.c.job_id).where(job_videos.c.video_id == video_id)
    return list(connection.scalars(found))


def _closed_video(connection: Connection, video_id: int, *, lock: bool = False) -> None:
    query = select(videos.c.id).where(videos.c.id == video_id)
    if connection.scalar(query.with_for_update() if lock else query) is None:
        raise NoSuchVideo(f"there is no video {video_id}")
    works = connection.scalars(
        select(job_videos.c.job_id)
        .where(RUNNING, job_videos.c.video_id == video_id)
        .union(select(probes.c.job_id).where(still_open(probes), _probes_of(video_id)))
    ).all()
    if works:
        raise CannotPurge(
            f"job {min(works)} works on the video: "
            f"end that first with `nightreel cancel {min(works)}`"
        )
