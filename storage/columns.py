"""A job's samples of one video in columns: what scenes, flags and curves are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, select

from storage.records import SampleResult
from storage.schema import predictions, samples

NONE = -1
"""Stands for a label where a sample has fewer than others."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class SampleColumns:
    """Samples of one video in order of time, with their best labels, best first."""

    bucket: Ints
    t_us: Ints
    start_us: Ints
    end_us: Ints
    label: Ints
    """Samples x ranks: positions of labels, NONE where a sample has fewer."""
    similarity: Floats
    confidence: Floats
    """Samples x ranks; 0 where there is no label."""

    def __len__(self) -> int:
        return len(self.bucket)

    @classmethod
    def of(cls, found: Sequence[SampleResult]) -> SampleColumns:
        """The same samples in columns."""
        times = [(one.bucket, one.t_us, one.start_us, one.end_us) for one in found]
        rows = [
            (at, rank, one.label, one.similarity, one.confidence)
            for at, sample in enumerate(found)
            for rank, one in enumerate(sample.predictions)
        ]
        return _assembled(times, rows)

    def curve(self, label: int) -> Floats:
        """The label's confidence in each sample; 0 where it is not among the best."""
        return np.asarray((self.confidence * (self.label == label)).sum(axis=1))

    def shares(self, label_count: int) -> Floats:
        """Samples x labels; what the best labels leave over is shared evenly among the others."""
        given = self.label != NONE
        others = label_count - given.sum(axis=1)
        left = np.maximum(1.0 - self.confidence.sum(axis=1), 0.0)
        each = np.divide(left, others, out=np.zeros(len(self)), where=others > 0)
        # What is not given is written into a column more, and left out.
        found = np.repeat(each[:, np.newaxis], label_count + 1, axis=1)
        np.put_along_axis(found, self.label, self.confidence, axis=1)
        return found[:, :label_count]


def columns_in(connection: Connection, job_id: int, video_id: int) -> SampleColumns:
    """The job's samples of one video, within a transaction."""
    times = connection.execute(
        select(samples.c.bucket, samples.c.t_us, samples.c.start_us, samples.c.end_us)
        .where(samples.c.job_id == job_id, samples.c.video_id == video_id)
        .order_by(samples.c.bucket)
    ).all()
    rows = connection.execute(
        select(
            predictions.c.bucket,
            predictions.c.rank,
            predictions.c.label,
            predictions.c.similarity,
            predictions.c.confidence,
        ).where(predictions.c.job_id == job_id, predictions.c.video_id == video_id)
    ).all()
    position = {bucket: at for at, (bucket, *_) in enumerate(times)}
    return _assembled(times, [(position[row[0]], *row[1:]) for row in rows])


def _assembled(
    times: Sequence[Sequence[int]], rows: Sequence[tuple[int, int, int, float, float]]
) -> SampleColumns:
    bucket, t_us, start_us, end_us = np.array(times, dtype=np.int64).reshape(-1, 4).T
    ranks = 1 + max((row[1] for row in rows), default=0)
    label = np.full((len(times), ranks), NONE, dtype=np.int64)
    similarity, confidence = np.zeros((2, len(times), ranks))
    if rows:
        at, rank, labels, cosines, confidences = zip(*rows, strict=True)
        label[at, rank] = labels
        similarity[at, rank] = cosines
        confidence[at, rank] = confidences
    return SampleColumns(bucket, t_us, start_us, end_us, label, similarity, confidence)
