"""The first tables: archive, jobs, ledger, results, answers; and the views of them."""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "label_sets",
        sa.Column("id", _ID, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_label_sets"),
        sa.UniqueConstraint("digest", name="uq_label_sets_digest"),
    )
    op.create_table(
        "videos",
        sa.Column("id", _ID, nullable=False),
        sa.Column("content_id", sa.Text(), nullable=False),
        sa.Column("container", sa.Text()),
        sa.Column("codec", sa.Text()),
        sa.Column("pixel_format", sa.Text()),
        sa.Column("stream_index", sa.Integer()),
        sa.Column("stream_reason", sa.Text()),
        sa.Column("width", sa.Integer()),
        sa.Column("height", sa.Integer()),
        sa.Column("rotation", sa.Integer()),
        sa.Column("time_base", sa.Text()),
        sa.Column("frame_rate", sa.Text()),
        sa.Column("frame_count", sa.BigInteger()),
        sa.Column("first_pts", sa.BigInteger()),
        sa.Column("duration_us", sa.BigInteger()),
        sa.Column("indexed_us", sa.BigInteger()),
        sa.Column("header_us", sa.BigInteger()),
        sa.Column("sequential_reason", sa.Text()),
        sa.Column("interlaced", sa.Boolean()),
        sa.Column("bit_depth", sa.Integer()),
        sa.Column("transfer", sa.Text()),
        sa.Column("warnings", sa.Text()),
        sa.Column("created", sa.Text()),
        sa.Column("recorded_on", sa.Text()),
        sa.Column("recorded_from", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_videos"),
        sa.UniqueConstraint("content_id", name="uq_videos_content_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "text_vectors",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("model", "text", name="pk_text_vectors"),
    )
    op.create_table(
        "embeddings",
        sa.Column("id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("sampling", sa.Text(), nullable=False),
        sa.Column("fit", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("bucket_start", sa.BigInteger(), nullable=False),
        sa.Column("bucket_end", sa.BigInteger(), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("times", sa.LargeBinary(), nullable=False),
        sa.Column("vectors", sa.LargeBinary(), nullable=False),
        sa.Column("duplicates", sa.LargeBinary()),
        sa.Column("gaps", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["video_id"], ["videos.id"], name="fk_embeddings_video_id"),
        sa.PrimaryKeyConstraint("id", name="pk_embeddings"),
        sa.UniqueConstraint(
            "video_id",
            "sampling",
            "fit",
            "model",
            "bucket_start",
            "bucket_end",
            name="uq_embeddings_video_id",
        ),
    )
    op.create_table(
        "files",
        sa.Column("id", _ID, nullable=False),
        sa.Column("path_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("path_raw", sa.LargeBinary(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("seen_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["video_id"], ["videos.id"], name="fk_files_video_id"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.UniqueConstraint("path_sha256", name="uq_files_path_sha256"),
    )
    op.create_index("ix_files_video_id", "files", ["video_id"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("id", _ID, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("planning_finished", sa.Boolean(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("sampling", sa.Text(), nullable=False),
        sa.Column("fit", sa.Text(), nullable=False),
        sa.Column("top_n", sa.Integer(), nullable=False),
        sa.Column("label_set_id", _ID, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("notice", sa.Text()),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("tag", sa.Text()),
        sa.Column("submitted", sa.Boolean(), nullable=False),
        sa.Column("task_us", sa.BigInteger(), nullable=False),
        sa.Column("served", sa.Double(), nullable=False),
        sa.Column("served_probes", sa.Double(), nullable=False),
        sa.Column("notify_url", sa.Text()),
        sa.Column("pause_kind", sa.Text()),
        sa.Column("pause_reason", sa.Text()),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False),
        sa.Column("closed_ms", sa.BigInteger()),
        sa.ForeignKeyConstraint(["label_set_id"], ["label_sets.id"], name="fk_jobs_label_set_id"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("key", name="uq_jobs_key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "budgets",
        sa.Column("job_id", _ID, autoincrement=False, nullable=False),
        sa.Column("allowance", sa.Integer(), nullable=False),
        sa.Column("max_calls", sa.BigInteger()),
        sa.Column("calls_left", sa.BigInteger()),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_budgets_job_id"),
        sa.PrimaryKeyConstraint("job_id", name="pk_budgets"),
    )
    op.create_table(
        "job_endpoints",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("embeds", sa.Boolean(), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_endpoints_job_id"),
        sa.PrimaryKeyConstraint("job_id", "endpoint", name="pk_job_endpoints"),
    )
    op.create_table(
        "label_vectors",
        sa.Column("label_set_id", _ID, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("vectors", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["label_set_id"], ["label_sets.id"], name="fk_label_vectors_label_set_id"
        ),
        sa.PrimaryKeyConstraint("label_set_id", "model", name="pk_label_vectors"),
    )
    op.create_table(
        "labels",
        sa.Column("label_set_id", _ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prompts", sa.Text(), nullable=False),
        sa.Column("samples", sa.Text(), nullable=False),
        sa.Column("threshold", sa.Double()),
        sa.Column("flag", sa.Text()),
        sa.ForeignKeyConstraint(["label_set_id"], ["label_sets.id"], name="fk_labels_label_set_id"),
        sa.PrimaryKeyConstraint("label_set_id", "position", name="pk_labels"),
    )
    op.create_table(
        "job_videos",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("duration_us", sa.BigInteger(), nullable=False),
        sa.Column("analysed_us", sa.BigInteger(), nullable=False),
        sa.Column("reason_kind", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("opening", sa.Integer(), nullable=False),
        sa.Column("closed_ms", sa.BigInteger()),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_videos_job_id"),
        sa.ForeignKeyConstraint(["video_id"], ["videos.id"], name="fk_job_videos_video_id"),
        sa.PrimaryKeyConstraint("job_id", "video_id", name="pk_job_videos"),
    )
    op.create_index(
        "ix_job_videos_running",
        "job_videos",
        ["job_id", "video_id"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "label_examples",
        sa.Column("label_set_id", _ID, nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("picture", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["label_set_id", "label"],
            ["labels.label_set_id", "labels.position"],
            name="fk_label_examples_label_set_id",
        ),
        sa.PrimaryKeyConstraint("label_set_id", "label", "position", name="pk_label_examples"),
    )
    op.create_table(
        "flags",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("first_us", sa.BigInteger(), nullable=False),
        sa.Column("last_us", sa.BigInteger(), nullable=False),
        sa.Column("peak", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "video_id"],
            ["job_videos.job_id", "job_videos.video_id"],
            name="fk_flags_job_id",
        ),
        sa.PrimaryKeyConstraint("job_id", "video_id", "label", name="pk_flags"),
    )
    op.create_table(
        "samples",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("bucket", sa.BigInteger(), nullable=False),
        sa.Column("t_us", sa.BigInteger(), nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=False),
        sa.Column("end_us", sa.BigInteger(), nullable=False),
        sa.Column("reused_from", sa.BigInteger()),
        sa.Column("audit_of", sa.BigInteger()),
        sa.PrimaryKeyConstraint("job_id", "video_id", "bucket", name="pk_samples"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "scenes",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=False),
        sa.Column("end_us", sa.BigInteger(), nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("peak", sa.Double(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("agreeing", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "video_id", "start_us", name="pk_scenes"),
    )
    op.create_index("ix_scenes_job_id", "scenes", ["job_id", "label"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", _ID, nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("bucket_start", sa.BigInteger(), nullable=False),
        sa.Column("bucket_end", sa.BigInteger(), nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=False),
        sa.Column("end_us", sa.BigInteger(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("not_before_ms", sa.BigInteger(), nullable=False),
        sa.Column("queued_ms", sa.BigInteger()),
        sa.Column("lease_until_ms", sa.BigInteger()),
        sa.Column("done_ms", sa.BigInteger()),
        sa.Column("worker", sa.Text()),
        sa.Column("error_kind", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("gap_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "video_id"],
            ["job_videos.job_id", "job_videos.video_id"],
            name="fk_tasks_job_id",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.UniqueConstraint(
            "job_id", "video_id", "bucket_start", "bucket_end", name="uq_tasks_job_id"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_tasks_feed",
        "tasks",
        ["job_id", "ordinal", "video_id"],
        unique=False,
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_tasks_in_flight",
        "tasks",
        ["lease_until_ms"],
        unique=False,
        sqlite_where=sa.text("state IN ('queued', 'leased')"),
        postgresql_where=sa.text("state IN ('queued', 'leased')"),
    )
    op.create_index(
        "ix_tasks_open",
        "tasks",
        ["job_id", "video_id"],
        unique=False,
        sqlite_where=sa.text("state IN ('pending', 'queued', 'leased')"),
        postgresql_where=sa.text("state IN ('pending', 'queued', 'leased')"),
    )
    op.create_table(
        "probes",
        sa.Column("id", _ID, nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("path_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("path_raw", sa.LargeBinary(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("not_before_ms", sa.BigInteger(), nullable=False),
        sa.Column("queued_ms", sa.BigInteger()),
        sa.Column("lease_until_ms", sa.BigInteger()),
        sa.Column("done_ms", sa.BigInteger()),
        sa.Column("worker", sa.Text()),
        sa.Column("error_kind", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_probes_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_probes"),
        sa.UniqueConstraint("job_id", "path_sha256", name="uq_probes_job_id"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_probes_feed",
        "probes",
        ["job_id", "id"],
        unique=False,
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index(
        "ix_probes_in_flight",
        "probes",
        ["lease_until_ms"],
        unique=False,
        sqlite_where=sa.text("state IN ('queued', 'leased')"),
        postgresql_where=sa.text("state IN ('queued', 'leased')"),
    )
    op.create_index(
        "ix_probes_open",
        "probes",
        ["job_id"],
        unique=False,
        sqlite_where=sa.text("state IN ('pending', 'queued', 'leased')"),
        postgresql_where=sa.text("state IN ('pending', 'queued', 'leased')"),
    )
    op.create_table(
        "leaders",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("until_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leaders"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before_ms", sa.BigInteger(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("delivered_ms", sa.BigInteger()),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_job_id", "events", ["job_id"], unique=False)
    op.create_table(
        "gaps",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("start_us", sa.BigInteger(), nullable=False),
        sa.Column("end_us", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("task_id", _ID, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "video_id", "start_us", name="pk_gaps"),
    )
    op.create_index("ix_gaps_task_id", "gaps", ["task_id"], unique=False)
    op.create_table(
        "predictions",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("video_id", _ID, nullable=False),
        sa.Column("bucket", sa.BigInteger(), nullable=False),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("similarity", sa.Double(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "video_id", "bucket", "rank", name="pk_predictions"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("task_id", _ID, nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("image_calls", sa.BigInteger(), nullable=False),
        sa.Column("text_calls", sa.BigInteger(), nullable=False),
        sa.Column("bytes_sent", sa.BigInteger(), nullable=False),
        sa.Column("api_seconds", sa.Double(), nullable=False),
        sa.Column("decode_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "task_id", "fence", name="pk_usage"),
    )
    for statement in _views():
        op.execute(statement)


def _views() -> list[str]:
    written = Path(__file__).parent.with_name("0001_views.sql").read_text(encoding="utf-8")
    return [statement for statement in written.split("\n;\n") if statement.strip()]


def downgrade() -> None:
    """Drop the tables, with all that is in them."""
    names = [re.findall(r"CREATE VIEW (\w+)", statement)[0] for statement in _views()]
    for name in reversed(names):
        op.execute(f"DROP VIEW {name}")
    for table in (
        "events",
        "leaders",
        "usage",
        "predictions",
        "gaps",
        "probes",
        "tasks",
        "scenes",
        "samples",
        "flags",
        "label_examples",
        "job_videos",
        "labels",
        "label_vectors",
        "job_endpoints",
        "budgets",
        "jobs",
        "files",
        "embeddings",
        "text_vectors",
        "videos",
        "label_sets",
    ):
        op.drop_table(table)
