"""What workers find: committed once for each range, and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, Row, delete, select, update

from storage.bulk import insert_columns
from storage.database import reading, writing
from storage.dialect import Now, insert, one_line, upsert
from storage.records import (
    Fit,
    FrameRange,
    Gap,
    GapKind,
    Label,
    LabelSet,
    Prediction,
    RangeResult,
    SampleResult,
    Sampling,
    TaskState,
    Usage,
)
from storage.schema import (
    embeddings,
    gaps,
    held,
    jobs,
    label_examples,
    label_sets,
    labels,
    predictions,
    tasks,
    usage,
)
from storage.schema import (
    label_vectors as label_vector_rows,
)
from storage.schema import (
    samples as sample_rows,
)

LASTING_GAPS = frozenset({GapKind.TRUNCATED, GapKind.DAMAGED, GapKind.API_REFUSED_FRAME})
"""Gaps that lie in the content: another reading would find them again."""

_Row = Row[*tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class SampleTimes:
    """Where a sample stands in its video, as in SampleResult."""

    bucket: int
    t_us: int
    start_us: int
    end_us: int
    reused_from: int | None = None
    audit_of: int | None = None


@dataclass(frozen=True, slots=True)
class StoredRange:
    """A range as it was embedded before. Samples and gaps tile the range's interval."""

    samples: tuple[SampleTimes, ...]
    gaps: tuple[Gap, ...]
    vectors: npt.NDArray[np.float16]
    """Unit vectors of the samples, samples x dimension; of several squares one after the other."""


def commit(engine: Engine, task_id: int, fence: int, result: RangeResult) -> bool:
    """Write what a task found and mark it done, in one transaction; True once that stands.

    False, with nothing written, where the claim of this fence no longer holds. Committing what
    this fence has committed already is True again. ValueError where samples and gaps do not tile
    the task's interval, or the vectors do not fit the samples.
    """
    gap_us = sum(gap.end_us - gap.start_us for gap in result.gaps)
    with writing(engine) as connection:
        # First, since it takes the row's lock: a zombie is turned away before it writes anything.
        task = connection.execute(
            update(tasks)
            .where(held(task_id, fence))
            .values(
                state=TaskState.DONE,
                done_ms=Now(),
                lease_until_ms=None,
                error_kind=None,
                error=None,
                samples=len(result.samples),
                gap_us=gap_us,
            )
            .returning(
                tasks.c.id,
                tasks.c.job_id,
                tasks.c.video_id,
                tasks.c.fence,
                tasks.c.bucket_start,
                tasks.c.bucket_end,
                tasks.c.start_us,
                tasks.c.end_us,
            )
        ).first()
        if task is None:
            done = select(tasks.c.id).where(
                tasks.c.id == task_id, tasks.c.fence == fence, tasks.c.state == TaskState.DONE
            )
            return connection.scalar(done) is not None
        _check(task, result)
        _write_rows(connection, task, result)
        if result.vectors is not None and result.samples:
            _write_vectors(connection, task, result)
    return True


def _check(task: _Row, result: RangeResult) -> None:
    if not _tile([*result.samples, *result.gaps], task.start_us, task.end_us):
        raise ValueError(
            f"samples and gaps of task {task.id} do not tile "
            f"[{task.start_us}, {task.end_us}) microseconds"
        )
    buckets = [sample.bucket for sample in result.samples]
    ascending = all(a < b for a, b in pairwise(buckets))
    inside = all(task.bucket_start <= bucket < task.bucket_end for bucket in buckets)
    if not (ascending and inside):
        raise ValueError(
            f"samples of task {task.id} are not in ascending buckets of "
            f"[{task.bucket_start}, {task.bucket_end})"
        )
    if result.vectors is not None and len(result.vectors) != 2 * len(buckets) * result.dimension:
        raise ValueError(
            f"task {task.id} has {len(result.vectors)} bytes of vectors for {len(buckets)} samples "
            f"of dimension {result.dimension}"
        )


class _Interval(Protocol):
    @property
    def start_us(self) -> int: ...
    @property
    def end_us(self) -> int: ...


def _tile(intervals: Iterable[_Interval], start_us: int, end_us: int) -> bool:
    at_us = start_us
    for one in sorted(intervals, key=lambda one: one.start_us):
        if one.start_us != at_us or one.end_us <= at_us:
            return False
        at_us = one.end_us
    return at_us == end_us


def _write_rows(connection: Connection, task: _Row, result: RangeResult) -> None:
    of_video = {"job_id": task.job_id, "video_id": task.video_id}
    upsert(
        connection,
        sample_rows,
        [
            {
                **of_video,
                "bucket": sample.bucket,
                "t_us": sample.t_us,
                "start_us": sample.start_us,
                "end_us": sample.end_us,
                "reused_from": sample.reused_from,
                "audit_of": sample.audit_of,
            }
            for sample in result.samples
        ],
    )
    # Not an upsert: the many rows of a range take a quarter of its time like this.
    connection.execute(
        delete(predictions).where(
            predictions.c.job_id == task.job_id,
            predictions.c.video_id == task.video_id,
            predictions.c.bucket >= task.bucket_start,
            predictions.c.bucket < task.bucket_end,
        )
    )
    rows = [
        (sample.bucket, rank, one.label, one.similarity, one.confidence)
        for sample in result.samples
        for rank, one in enumerate(sample.predictions)
    ]
    if rows:
        names = ("bucket", "rank", "label", "similarity", "confidence")
        columns = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
        insert_columns(connection, predictions, {**of_video, **columns})
    upsert(
        connection,
        gaps,
        [
            {
                **of_video,
                "start_us": gap.start_us,
                "end_us": gap.end_us,
                "kind": gap.kind,
                "detail": one_line(gap.detail),
                "task_id": task.id,
            }
            for gap in result.gaps
        ],
    )
    _write_usage(connection, task.job_id, task.id, task.fence, result.usage)


def record_usage(engine: Engine, job_id: int, task_id: int, fence: int, spent: Usage) -> None:
    """Keep what an attempt at a task has cost that ended without a commit; a job that was purged
    meanwhile keeps nothing."""
    with writing(engine) as connection:
        if connection.scalar(select(tasks.c.id).where(tasks.c.id == task_id)) is not None:
            _write_usage(connection, job_id, task_id, fence, spent)


def _write_usage(
    connection: Connection, job_id: int, task_id: int, fence: int, spent: Usage
) -> None:
    key = {"job_id": job_id, "task_id": task_id, "fence": fence}
    upsert(connection, usage, [key | dataclasses.asdict(spent)])


def _write_vectors(connection: Connection, task: _Row, result: RangeResult) -> None:
    job = connection.execute(
        select(jobs.c.sampling, jobs.c.fit, jobs.c.model).where(jobs.c.id == task.job_id)
    ).one()
    times = [(one.bucket, one.t_us, one.start_us, one.end_us) for one in result.samples]
    key = {
        "video_id": task.video_id,
        "sampling": job.sampling,
        "fit": job.fit,
        "model": job.model,
        "bucket_start": task.bucket_start,
        "bucket_end": task.bucket_end,
    }
    found = {
        "dimension": result.dimension,
        "times": np.array(times, dtype="<i8").tobytes(),
        "vectors": result.vectors,
        "duplicates": _packed_duplicates(result.samples),
        "gaps": json.dumps(
            [[gap.start_us, gap.end_us, gap.kind, one_line(gap.detail)] for gap in result.gaps]
        ),
    }
    connection.execute(
        insert(connection, embeddings)
        .values(**key, **found)
        .on_conflict_do_update(index_elements=list(key), set_=found)
    )


def _packed_duplicates(found: Sequence[SampleResult]) -> bytes | None:
    pairs = [(one.reused_from, one.audit_of) for one in found]
    if all(pair == (None, None) for pair in pairs):
        return None
    numbers = [[-1 if bucket is None else bucket for bucket in pair] for pair in pairs]
    return np.array(numbers, dtype="<i8").tobytes()


def _duplicates(packed: bytes | None, count: int) -> npt.NDArray[np.object_]:
    """Samples x (reused_from, audit_of), None for none."""
    found = np.full((count, 2), None, dtype=object)
    if packed is not None:
        numbers = np.frombuffer(packed, dtype="<i8").reshape(count, 2)
        found[numbers >= 0] = numbers[numbers >= 0].tolist()
    return found


def stored_vectors(  # noqa: PLR0917
    engine: Engine,
    video_id: int,
    sampling: Sampling,
    fit: Fit,
    model: str,
    frame_range: FrameRange,
) -> StoredRange | None:
    """The range as any job has embedded it before, ready to be scored against other labels; None
    where that is missing or incomplete, so that the range must be decoded.

    Ranges that were cut elsewhere are put together. A gap counts as known where it lies in the
    content; any other may have been bad luck and is worth another reading.
    """
    bucket_start, bucket_end = frame_range.bucket_start, frame_range.bucket_end
    with reading(engine) as connection:
        rows = connection.execute(
            select(
                embeddings.c.dimension,
                embeddings.c.times,
                embeddings.c.vectors,
                embeddings.c.duplicates,
                embeddings.c.gaps,
            )
            .where(
                embeddings.c.video_id == video_id,
                embeddings.c.sampling == str(sampling),
                embeddings.c.fit == fit,
                embeddings.c.model == model,
                embeddings.c.bucket_start < bucket_end,
                embeddings.c.bucket_end > bucket_start,
            )
            .order_by(embeddings.c.bucket_start, embeddings.c.bucket_end)
        ).all()
    times: list[SampleTimes] = []
    vectors: list[npt.NDArray[np.float16]] = []
    lasting: dict[tuple[int, int], Gap] = {}
    for row in rows:
        of_row = np.frombuffer(row.times, dtype="<i8").reshape(-1, 4)
        after = times[-1].bucket + 1 if times else bucket_start
        chosen = (of_row[:, 0] >= after) & (of_row[:, 0] < bucket_end)
        sources = _duplicates(row.duplicates, len(of_row))[chosen].tolist()
        of_range = zip(of_row[chosen].tolist(), sources, strict=True)
        times += [SampleTimes(*one, *source) for one, source in of_range]
        matrix = np.frombuffer(row.vectors, dtype="<f2").reshape(-1, row.dimension)
        vectors.append(matrix[chosen])
        for start_us, end_us, kind, detail in json.loads(row.gaps):
            start, end = max(start_us, frame_range.start_us), min(end_us, frame_range.end_us)
            if start < end and kind in LASTING_GAPS:
                lasting[start, end] = Gap(start, end, GapKind(kind), detail)
    known = sorted(lasting.values(), key=lambda gap: gap.start_us)
    if not times or not _tile([*times, *known], frame_range.start_us, frame_range.end_us):
        return None
    return StoredRange(tuple(times), tuple(known), np.concatenate(vectors))


def label_set(engine: Engine, label_set_id: int) -> LabelSet:
    """The label set of this number, with its example pictures."""
    with reading(engine) as connection:
        name = connection.scalars(
            select(label_sets.c.name).where(label_sets.c.id == label_set_id)
        ).one()
        rows = connection.execute(
            select(labels).where(labels.c.label_set_id == label_set_id).order_by(labels.c.position)
        ).all()
        pictures = connection.execute(
            select(label_examples.c.label, label_examples.c.picture)
            .where(label_examples.c.label_set_id == label_set_id)
            .order_by(label_examples.c.label, label_examples.c.position)
        ).all()
    examples: dict[int, list[bytes]] = {}
    for label, picture in pictures:
        examples.setdefault(label, []).append(picture)
    return LabelSet(name, tuple(_label(row, examples.get(row.position, ())) for row in rows))


def labels_in(connection: Connection, job_id: int) -> list[Label]:
    """The job's labels in order, without their example pictures."""
    rows = connection.execute(
        select(labels)
        .join(jobs, jobs.c.label_set_id == labels.c.label_set_id)
        .where(jobs.c.id == job_id)
        .order_by(labels.c.position)
    ).all()
    return [_label(row, ()) for row in rows]


def _label(row: _Row, examples: Sequence[bytes]) -> Label:
    prompts, samples = tuple(json.loads(row.prompts)), tuple(json.loads(row.samples))
    return Label(row.name, prompts, tuple(examples), row.threshold, row.flag, samples)


def label_vectors(engine: Engine, label_set_id: int, model: str) -> npt.NDArray[np.float32] | None:
    """The label set's vectors as this model gives them, labels x dimension; None if not stored."""
    with reading(engine) as connection:
        row = connection.execute(
            select(label_vector_rows.c.dimension, label_vector_rows.c.vectors).where(
                label_vector_rows.c.label_set_id == label_set_id,
                label_vector_rows.c.model == model,
            )
        ).first()
    if row is None:
        return None
    return np.frombuffer(row.vectors, dtype="<f4").reshape(-1, row.dimension)


def vectors_of_labels(
    engine: Engine, wanted: LabelSet, model: str
) -> npt.NDArray[np.float32] | None:
    """The same of labels of which it is not known whether they are stored."""
    with reading(engine) as connection:
        known = connection.scalar(
            select(label_sets.c.id).where(label_sets.c.digest == wanted.digest)
        )
    return None if known is None else label_vectors(engine, known, model)


def store_label_vectors(
    engine: Engine, label_set_id: int, model: str, vectors: npt.NDArray[np.float32]
) -> None:
    """Keep the label set's vectors, labels x dimension. Of several that come, the first is kept:
    all workers must score with the same numbers."""
    with writing(engine) as connection:
        connection.execute(
            insert(connection, label_vector_rows)
            .values(
                label_set_id=label_set_id,
                model=model,
                dimension=vectors.shape[1],
                vectors=vectors.astype("<f4").tobytes(),
            )
            .on_conflict_do_nothing(index_elements=["label_set_id", "model"])
        )


def samples(engine: Engine, job_id: int, video_id: int) -> list[SampleResult]:
    """The job's samples of one video with their best labels, in order of time."""
    with reading(engine) as connection:
        return samples_in(connection, job_id, video_id)


def samples_in(connection: Connection, job_id: int, video_id: int) -> list[SampleResult]:
    """The same within a transaction."""
    best: dict[int, list[Prediction]] = {}
    for bucket, label, similarity, confidence in connection.execute(
        select(
            predictions.c.bucket,
            predictions.c.label,
            predictions.c.similarity,
            predictions.c.confidence,
        )
        .where(predictions.c.job_id == job_id, predictions.c.video_id == video_id)
        .order_by(predictions.c.bucket, predictions.c.rank)
    ):
        best.setdefault(bucket, []).append(Prediction(label, similarity, confidence))
    rows = connection.execute(
        select(
            sample_rows.c.bucket,
            sample_rows.c.t_us,
            sample_rows.c.start_us,
            sample_rows.c.end_us,
            sample_rows.c.reused_from,
            sample_rows.c.audit_of,
        )
        .where(sample_rows.c.job_id == job_id, sample_rows.c.video_id == video_id)
        .order_by(sample_rows.c.bucket)
    )
    return [
        SampleResult(
            bucket, t_us, start_us, end_us, tuple(best.get(bucket, ())), reused_from, audit_of
        )
        for bucket, t_us, start_us, end_us, reused_from, audit_of in rows
    ]


def gaps_in(connection: Connection, job_id: int, video_id: int) -> list[Gap]:
    """The job's gaps of one video so far, in order of time."""
    rows = connection.execute(
        select(gaps.c.start_us, gaps.c.end_us, gaps.c.kind, gaps.c.detail)
        .where(gaps.c.job_id == job_id, gaps.c.video_id == video_id)
        .order_by(gaps.c.start_us)
    )
    return [Gap(start, end, GapKind(kind), detail) for start, end, kind, detail in rows]
