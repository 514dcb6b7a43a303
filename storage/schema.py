"""The tables, as SQLAlchemy describes them; `migrations/` makes exactly these.

Times within a video are integer microseconds (`_us`), moments are milliseconds of the database's
clock (`_ms`). What a job found (samples, predictions, gaps, scenes, flags) is keyed by the job, so
that no other job can change it. What is costly and the same for every job (embeddings, with the
times of their samples) is keyed by content, sampling, fit and model, so that jobs share it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    UniqueConstraint,
    bindparam,
)

from storage.dialect import StorableText
from storage.records import TaskState, VideoState

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the type is spelled INTEGER, and gives the number of a
# purged row to the next one unless told otherwise: a worker that still holds it must find nothing.
_Id = BigInteger().with_variant(Integer, "sqlite")

videos = Table(
    "videos",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("content_id", StorableText, nullable=False, unique=True),
    # Facts of probing, NULL until a job has planned the video.
    Column("container", StorableText),
    Column("codec", StorableText),
    Column("pixel_format", StorableText),
    Column("stream_index", Integer),
    Column("stream_reason", StorableText),
    Column("width", Integer),
    Column("height", Integer),
    Column("rotation", Integer),
    Column("time_base", StorableText),
    Column("frame_rate", StorableText),
    Column("frame_count", BigInteger),
    Column("first_pts", BigInteger),
    Column("duration_us", BigInteger),
    Column("indexed_us", BigInteger),
    Column("header_us", BigInteger),
    Column("sequential_reason", StorableText),
    Column("interlaced", Boolean),
    Column("bit_depth", Integer),
    Column("transfer", StorableText),
    Column("warnings", StorableText),
    Column("created", StorableText),
    # Day of recording as YYYY-MM-DD, and what it was taken from (storage.recorded).
    Column("recorded_on", StorableText),
    Column("recorded_from", StorableText),
    sqlite_autoincrement=True,
)

files = Table(
    "files",
    metadata,
    Column("id", _Id, primary_key=True),
    # A path may be longer than a PostgreSQL index row; its digest never is.
    Column("path_sha256", LargeBinary, nullable=False, unique=True),
    Column("path_raw", LargeBinary, nullable=False),
    Column("path", StorableText, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("mtime_ns", BigInteger, nullable=False),
    Column("video_id", _Id, ForeignKey("videos.id"), nullable=False, index=True),
    Column("seen_ms", BigInteger, nullable=False),
)

label_sets = Table(
    "label_sets",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("digest", StorableText, nullable=False, unique=True),
    Column("name", StorableText, nullable=False),
)

labels = Table(
    "labels",
    metadata,
    Column("label_set_id", _Id, ForeignKey("label_sets.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("name", StorableText, nullable=False),
    Column("prompts", StorableText, nullable=False),
    # JSON list of CONTENT_ID@MICROSECONDS.
    Column("samples", StorableText, nullable=False),
    Column("threshold", Double),
    Column("flag", StorableText),
    PrimaryKeyConstraint("label_set_id", "position"),
)

label_examples = Table(
    "label_examples",
    metadata,
    Column("label_set_id", _Id, nullable=False),
    Column("label", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("picture", LargeBinary, nullable=False),
    PrimaryKeyConstraint("label_set_id", "label", "position"),
    ForeignKeyConstraint(["label_set_id", "label"], ["labels.label_set_id", "labels.position"]),
)

label_vectors = Table(
    "label_vectors",
    metadata,
    Column("label_set_id", _Id, ForeignKey("label_sets.id"), nullable=False),
    Column("model", StorableText, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("vectors", LargeBinary, nullable=False),
    PrimaryKeyConstraint("label_set_id", "model"),
)

text_vectors = Table(
    "text_vectors",
    metadata,
    Column("model", StorableText, nullable=False),
    Column("text", StorableText, nullable=False),
    # float32 little endian, unit length.
    Column("vector", LargeBinary, nullable=False),
    PrimaryKeyConstraint("model", "text"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", StorableText, nullable=False, unique=True),
    Column("name", StorableText, nullable=False),
    Column("state", StorableText, nullable=False),
    Column("planning_finished", Boolean, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("sampling", StorableText, nullable=False),
    Column("fit", StorableText, nullable=False),
    Column("top_n", Integer, nullable=False),
    Column("label_set_id", _Id, ForeignKey("label_sets.id"), nullable=False),
    Column("model", StorableText, nullable=False),
    Column("notice", StorableText),
    # Release of nightreel that made the job.
    Column("version", StorableText, nullable=False),
    # Digest of all that was asked, where the key is one that a person chose.
    Column("request", StorableText, nullable=False),
    Column("tag", StorableText),
    # Fed by the scheduler service; others by the run that opened them.
    Column("submitted", Boolean, nullable=False),
    # Length of a task in the plans of workers.
    Column("task_us", BigInteger, nullable=False),
    # Tasks fed over the job's weight: whose is least is fed next (storage.ledger.feeding).
    Column("served", Double, nullable=False),
    Column("served_probes", Double, nullable=False),
    Column("notify_url", StorableText),
    Column("pause_kind", StorableText),
    Column("pause_reason", StorableText),
    Column("created_ms", BigInteger, nullable=False),
    Column("opened_ms", BigInteger, nullable=False),
    Column("closed_ms", BigInteger),
    sqlite_autoincrement=True,
)

job_videos = Table(
    "job_videos",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id"), nullable=False),
    Column("video_id", _Id, ForeignKey("videos.id"), nullable=False),
    Column("state", StorableText, nullable=False),
    # The duration that was planned: what this job answers for, whatever a later probe finds.
    Column("duration_us", BigInteger, nullable=False),
    Column("analysed_us", BigInteger, nullable=False),
    Column("reason_kind", StorableText),
    Column("reason", StorableText),
    # Counts openings, so that a close computed from an earlier opening is not written.
    Column("opening", Integer, nullable=False),
    Column("closed_ms", BigInteger),
    PrimaryKeyConstraint("job_id", "video_id"),
)


def _work() -> list[Column[Any]]:
    """What every unit of work has: its place in the ledger's protocol."""
    return [
        Column("state", StorableText, nullable=False),
        Column("attempts", Integer, nullable=False),
        # Counts claims: whoever holds an older one can write nothing.
        Column("fence", Integer, nullable=False),
        Column("not_before_ms", BigInteger, nullable=False),
        Column("queued_ms", BigInteger),
        Column("lease_until_ms", BigInteger),
        # When it ended: done, failed or cancelled.
        Column("done_ms", BigInteger),
        Column("worker", StorableText),
        Column("error_kind", StorableText),
        Column("error", StorableText),
    ]


probes = Table(
    "probes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", _Id, ForeignKey("jobs.id"), nullable=False),
    # A file to be read and planned, as it was when it was listed.
    Column("path_sha256", LargeBinary, nullable=False),
    Column("path_raw", LargeBinary, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("mtime_ns", BigInteger, nullable=False),
    *_work(),
    UniqueConstraint("job_id", "path_sha256"),
    sqlite_autoincrement=True,
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", _Id, nullable=False),
    Column("video_id", _Id, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("bucket_start", BigInteger, nullable=False),
    Column("bucket_end", BigInteger, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False),
    Column("plan", StorableText, nullable=False),
    *_work(),
    # Of a done task: what it found.
    Column("samples", Integer, nullable=False),
    Column("gap_us", BigInteger, nullable=False),
    UniqueConstraint("job_id", "video_id", "bucket_start", "bucket_end"),
    ForeignKeyConstraint(["job_id", "video_id"], ["job_videos.job_id", "job_videos.video_id"]),
    sqlite_autoincrement=True,
)

# What a commit writes (samples, predictions, gaps, usage) has no foreign keys, nor have scenes: it
# is written under the lock of its task's or its video's row and nowhere else, and PostgreSQL keeps
# a check's plan from when the table was small, which made a commit of 300 predictions take 150 ms
# instead of 10.

samples = Table(
    "samples",
    metadata,
    Column("job_id", _Id, nullable=False),
    Column("video_id", _Id, nullable=False),
    Column("bucket", BigInteger, nullable=False),
    Column("t_us", BigInteger, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False),
    # Of a duplicate: the bucket whose result it took over, or was sent to be compared with.
    Column("reused_from", BigInteger),
    Column("audit_of", BigInteger),
    PrimaryKeyConstraint("job_id", "video_id", "bucket"),
    sqlite_with_rowid=False,
)

predictions = Table(
    "predictions",
    metadata,
    Column("job_id", _Id, nullable=False),
    Column("video_id", _Id, nullable=False),
    Column("bucket", BigInteger, nullable=False),
    Column("rank", SmallInteger, nullable=False),
    Column("label", Integer, nullable=False),
    Column("similarity", Double, nullable=False),
    Column("confidence", Double, nullable=False),
    PrimaryKeyConstraint("job_id", "video_id", "bucket", "rank"),
    sqlite_with_rowid=False,
)

embeddings = Table(
    "embeddings",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("video_id", _Id, ForeignKey("videos.id"), nullable=False),
    Column("sampling", StorableText, nullable=False),
    Column("fit", StorableText, nullable=False),
    Column("model", StorableText, nullable=False),
    Column("bucket_start", BigInteger, nullable=False),
    Column("bucket_end", BigInteger, nullable=False),
    Column("dimension", Integer, nullable=False),
    # int64 little endian, samples x (bucket, t_us, start_us, end_us).
    Column("times", LargeBinary, nullable=False),
    # float16 little endian, samples x dimension: of each of a sample's squares a unit vector.
    Column("vectors", LargeBinary, nullable=False),
    # int64 little endian, samples x (reused_from, audit_of), -1 for none; NULL without duplicates.
    Column("duplicates", LargeBinary),
    # JSON list of [start_us, end_us, kind, detail].
    Column("gaps", StorableText, nullable=False),
    UniqueConstraint("video_id", "sampling", "fit", "model", "bucket_start", "bucket_end"),
)

gaps = Table(
    "gaps",
    metadata,
    Column("job_id", _Id, nullable=False),
    Column("video_id", _Id, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False),
    Column("kind", StorableText, nullable=False),
    Column("detail", StorableText, nullable=False),
    Column("task_id", _Id, nullable=False, index=True),
    PrimaryKeyConstraint("job_id", "video_id", "start_us"),
)

scenes = Table(
    "scenes",
    metadata,
    Column("job_id", _Id, nullable=False),
    Column("video_id", _Id, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False),
    Column("label", Integer, nullable=False),
    Column("confidence", Double, nullable=False),
    Column("peak", Double, nullable=False),
    Column("samples", Integer, nullable=False),
    Column("agreeing", Double, nullable=False),
    PrimaryKeyConstraint("job_id", "video_id", "start_us"),
    Index(None, "job_id", "label"),
)

flags = Table(
    "flags",
    metadata,
    Column("job_id", _Id, nullable=False),
    Column("video_id", _Id, nullable=False),
    Column("label", Integer, nullable=False),
    Column("samples", Integer, nullable=False),
    Column("first_us", BigInteger, nullable=False),
    Column("last_us", BigInteger, nullable=False),
    Column("peak", Double, nullable=False),
    PrimaryKeyConstraint("job_id", "video_id", "label"),
    ForeignKeyConstraint(["job_id", "video_id"], ["job_videos.job_id", "job_videos.video_id"]),
)

budgets = Table(
    "budgets",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id"), primary_key=True, autoincrement=False),
    # Counts the settings of the budget, so that what is left of an earlier one does not return.
    Column("allowance", Integer, nullable=False),
    Column("max_calls", BigInteger),
    Column("calls_left", BigInteger),
)

job_endpoints = Table(
    "job_endpoints",
    metadata,
    Column("job_id", _Id, ForeignKey("jobs.id"), nullable=False),
    # Digest of its address, of what it says it runs, and of the routes that may be used.
    Column("endpoint", StorableText, nullable=False),
    Column("embeds", Boolean, nullable=False),
    # Pictures that a call may hold.
    Column("batch", Integer, nullable=False),
    PrimaryKeyConstraint("job_id", "endpoint"),
)

usage = Table(
    "usage",
    metadata,
    Column("job_id", _Id, nullable=False),
    Column("task_id", _Id, nullable=False),
    # Of the claim that spent it: what an attempt in vain has cost is not forgotten.
    Column("fence", Integer, nullable=False),
    Column("image_calls", BigInteger, nullable=False),
    Column("text_calls", BigInteger, nullable=False),
    Column("bytes_sent", BigInteger, nullable=False),
    Column("api_seconds", Double, nullable=False),
    Column("decode_seconds", Double, nullable=False),
    PrimaryKeyConstraint("job_id", "task_id", "fence"),
)

leaders = Table(
    "leaders",
    metadata,
    Column("name", StorableText, primary_key=True),
    Column("holder", StorableText, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", StorableText, primary_key=True),
    Column("job_id", _Id, nullable=False, index=True),
    Column("kind", StorableText, nullable=False),
    Column("url", StorableText, nullable=False),
    Column("body", StorableText, nullable=False),
    Column("state", StorableText, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before_ms", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("delivered_ms", BigInteger),
    Column("error", StorableText),
)


def _written(state: str) -> ColumnElement[str]:
    # A partial index serves only a query that spells out the same condition: no bound parameters.
    return bindparam(None, state, type_=StorableText(), literal_execute=True)


def _in_states(table: Table, *states: str) -> ColumnElement[bool]:
    if len(states) == 1:
        return table.c.state == _written(states[0])
    return table.c.state.in_([_written(state) for state in states])


def pending(table: Table) -> ColumnElement[bool]:
    """Condition on `tasks` or `probes`, as its partial index spells it."""
    return _in_states(table, TaskState.PENDING)


def in_flight(table: Table) -> ColumnElement[bool]:
    """Condition on `tasks` or `probes`, as its partial index spells it."""
    return _in_states(table, TaskState.QUEUED, TaskState.LEASED)


def still_open(table: Table) -> ColumnElement[bool]:
    """Condition on `tasks` or `probes`, as its partial index spells it."""
    return _in_states(table, TaskState.PENDING, TaskState.QUEUED, TaskState.LEASED)


PENDING, IN_FLIGHT, OPEN = pending(tasks), in_flight(tasks), still_open(tasks)
RUNNING = _in_states(job_videos, VideoState.RUNNING)
"""Condition on `job_videos` as its partial index spells it."""


def held(row_id: int, fence: int, table: Table = tasks) -> ColumnElement[bool]:
    """Condition on `tasks` or `probes` that the claim of this fence holds."""
    return (table.c.id == row_id) & (table.c.fence == fence) & (table.c.state == TaskState.LEASED)


def _partial(name: str, *columns: Column[int], where: ColumnElement[bool]) -> None:
    Index(name, *columns, sqlite_where=where, postgresql_where=where)


_partial("ix_tasks_feed", tasks.c.job_id, tasks.c.ordinal, tasks.c.video_id, where=PENDING)
_partial("ix_tasks_in_flight", tasks.c.lease_until_ms, where=IN_FLIGHT)
_partial("ix_tasks_open", tasks.c.job_id, tasks.c.video_id, where=OPEN)
_partial("ix_probes_feed", probes.c.job_id, probes.c.id, where=pending(probes))
_partial("ix_probes_in_flight", probes.c.lease_until_ms, where=in_flight(probes))
_partial("ix_probes_open", probes.c.job_id, where=still_open(probes))
_partial("ix_job_videos_running", job_videos.c.job_id, job_videos.c.video_id, where=RUNNING)
