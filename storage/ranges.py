"""Embeddings of one range: kept when it is committed, found again by later jobs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, Row, select

from storage.database import reading
from storage.dialect import insert, one_line
from storage.records import (
    Fit,
    FrameRange,
    Gap,
    GapKind,
    RangeResult,
    SampleResult,
    Sampling,
)
from storage.schema import embeddings, jobs

LASTING_GAPS = frozenset({GapKind.TRUNCATED, GapKind.DAMAGED, GapKind.API_REFUSED_FRAME})
"""Gaps that lie in the content: another reading would find them again."""


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


def store_range(connection: Connection, task: Row[*tuple[Any, ...]], result: RangeResult) -> None:
    """Keep the vectors of a task's range, with times and gaps, for whichever job asks next."""
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


def stored_range(  # noqa: PLR0917
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
    if not times or not tiles([*times, *known], frame_range.start_us, frame_range.end_us):
        return None
    return StoredRange(tuple(times), tuple(known), np.concatenate(vectors))


class _Interval(Protocol):
    @property
    def start_us(self) -> int: ...
    @property
    def end_us(self) -> int: ...


def tiles(intervals: Iterable[_Interval], start_us: int, end_us: int) -> bool:
    """Whether the intervals, in any order, fill [start_us, end_us) without overlapping."""
    at_us = start_us
    for one in sorted(intervals, key=lambda one: one.start_us):
        if one.start_us != at_us or one.end_us <= at_us:
            return False
        at_us = one.end_us
    return at_us == end_us
