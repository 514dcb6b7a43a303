"""Tables of a job as files: CSV, JSON Lines, Parquet. What they hold are the views of the
database, so a file and a query say the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from sqlalchemy import Engine, column, select, table

from storage.database import reading
from storage.dialect import among
from storage.labels import labels_in
from storage.ledger import Job
from storage.whole_files import whole

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 20_000


class Kind(StrEnum):
    """What is exported."""

    SAMPLES = "samples"
    PREDICTIONS = "predictions"
    SCENES = "scenes"
    SUMMARIES = "summaries"
    FLAGS = "flags"


class Format(StrEnum):
    """How it is written."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


_VIEWS = {
    Kind.SAMPLES: "v_samples",
    Kind.PREDICTIONS: "v_predictions",
    Kind.SCENES: "v_scenes",
    Kind.SUMMARIES: "v_summary",
    Kind.FLAGS: "v_flags",
}
_ORDER = {
    Kind.SAMPLES: ("video_id", "bucket"),
    Kind.PREDICTIONS: ("video_id", "bucket", "rank"),
    Kind.SCENES: ("video_id", "start_s"),
    Kind.SUMMARIES: ("video_id", "first_s"),
    Kind.FLAGS: ("video_id", "first_s", "label"),
}
_MADE_BY = {"model": str, "sampling": str}
_COLUMNS: dict[Kind, dict[str, type]] = {
    Kind.SAMPLES: {
        "job_id": int, "video_id": int, "path": str, "bucket": int, "time_s": float,
        "start_s": float, "end_s": float, "label": str, "confidence": float,
    } | _MADE_BY,
    Kind.PREDICTIONS: {
        "job_id": int, "video_id": int, "path": str, "bucket": int, "time_s": float, "rank": int,
        "label": str, "similarity": float, "confidence": float,
    } | _MADE_BY,
    Kind.SCENES: {
        "job_id": int, "video_id": int, "path": str, "recorded_on": str, "start_s": float,
        "end_s": float, "duration_s": float, "label": str, "confidence": float, "peak": float,
        "samples": int, "agreeing": float,
    } | _MADE_BY,
    Kind.SUMMARIES: {
        "job_id": int, "video_id": int, "path": str, "recorded_on": str, "recorded_from": str,
        "state": str, "duration_s": float, "analysed_s": float, "label": str, "total_s": float,
        "share": float, "scenes": int, "first_s": float, "last_s": float, "longest_s": float,
        "peak": float,
    } | _MADE_BY,
    Kind.FLAGS: {
        "job_id": int, "video_id": int, "path": str, "recorded_on": str, "label": str,
        "reason": str, "threshold": float, "samples": int, "first_s": float, "last_s": float,
        "peak": float,
    } | _MADE_BY,
}  # fmt: skip


def export_rows(
    engine: Engine,
    job_id: int,
    kind: Kind,
    out: TextIO,
    form: Format,
    *,
    video_ids: Collection[int] | None = None,
) -> int:
    """Write the job's rows, or those of some videos, as CSV or JSON Lines; return their number."""
    names = list(_COLUMNS[kind])
    count = 0
    writer = csv.writer(out, lineterminator="\n")
    if form is Format.CSV:
        writer.writerow(names)
    for rows in _parts(engine, job_id, kind, video_ids):
        count += len(rows)
        if form is Format.CSV:
            writer.writerows(rows)
        else:
            lines = (
                json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows
            )
            out.writelines(f"{line}\n" for line in lines)
    return count


def export_file(
    engine: Engine,
    job: Job,
    kind: Kind,
    path: Path,
    form: Format,
    *,
    video_ids: Collection[int] | None = None,
) -> int:
    """Write the job's rows, or those of some videos, into a file; return their number.

    The file appears under its name once it is complete; a device or a pipe is written into. Raises
    OSError. A Parquet file carries `about` in its metadata, under the key `nightreel`.
    """
    with whole(path) as part:
        if form is not Format.PARQUET:
            with part.open("w", encoding="utf-8", newline="") as out:
                return export_rows(engine, job.id, kind, out, form, video_ids=video_ids)
        with part.open("wb") as sink:
            return _parquet(engine, job, kind, sink, video_ids)


def _parts(
    engine: Engine, job_id: int, kind: Kind, video_ids: Collection[int] | None
) -> Iterator[list[tuple[Any, ...]]]:
    view = table(_VIEWS[kind], *(column(name) for name in _COLUMNS[kind]))
    query = (
        select(view)
        .where(view.c.job_id == job_id)
        .order_by(*(view.c[name] for name in _ORDER[kind]))
    )
    with reading(engine) as connection:
        if video_ids is not None:
            query = query.where(among(connection, view.c.video_id, video_ids))
        options = {"yield_per": _ROWS_AT_ONCE}
        with connection.execute(query, execution_options=options) as found:
            for rows in found.partitions():
                yield [tuple(row) for row in rows]


def _parquet(
    engine: Engine, job: Job, kind: Kind, sink: IO[bytes], video_ids: Collection[int] | None
) -> int:
    import pyarrow  # noqa: PLC0415 - an extra, and slow to load
    import pyarrow.parquet  # noqa: PLC0415

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    schema = pyarrow.schema(
        [(name, types[kind_of]) for name, kind_of in _COLUMNS[kind].items()],
        metadata={"nightreel": json.dumps(about(engine, job), ensure_ascii=False)},
    )
    count = 0
    with pyarrow.parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        for rows in _parts(engine, job.id, kind, video_ids):
            count += len(rows)
            writer.write_table(_arrow(rows, schema))
    return count


def _arrow(rows: Sequence[tuple[Any, ...]], schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow  # noqa: PLC0415

    columns = zip(*rows, strict=True)
    arrays = [
        pyarrow.array(values, field.type) for values, field in zip(columns, schema, strict=True)
    ]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def about(engine: Engine, job: Job) -> dict[str, Any]:
    """What a file that leaves the database says of the job: model, sampling, fit, notice, release
    of nightreel, and labels with their prompts; values that JSON can hold."""
    with reading(engine) as connection:
        labels = labels_in(connection, job.id)
    return {
        "job": job.id,
        "name": job.name,
        "model": job.model,
        "sampling": str(job.sampling),
        "fit": str(job.fit),
        "notice": job.notice,
        "version": job.version,
        "labels": [
            {
                "name": label.name,
                "prompts": list(label.prompts),
                "samples": list(label.samples),
                "threshold": label.threshold,
                "flag": label.flag,
            }
            for label in labels
        ],
    }
