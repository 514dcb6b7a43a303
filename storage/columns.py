"""A job's samples of one video in columns: what scenes, flags and curves are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, literal, select

from storage import vectors
from storage.labels import label_vectors_in
from storage.records import SampleResult
from storage.schema import jobs, predictions, samples, tasks
from storage.scoring import LEFT_OUT, Half, Single, best_labels, similarities

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

    @classmethod
    def scored(cls, times: Ints, vectors: Half, labels: Single, top_n: int) -> SampleColumns:
        """Samples as a worker scores them: samples x (bucket, t_us, start_us, end_us), their
        vectors, and those of all labels."""
        label, similarity, confidence = best_labels(similarities(vectors, labels), top_n)
        bucket, t_us, start_us, end_us = times.T
        return cls(
            bucket,
            t_us,
            start_us,
            end_us,
            label.astype(np.int64),
            similarity.astype(np.float64),
            confidence.astype(np.float64),
        )

    def curve(self, label: int) -> Floats:
        """The label's confidence in each sample; 0 where it is not among the best."""
        return np.asarray((self.confidence * (self.label == label)).sum(axis=1))

    @property
    def best(self) -> Ints:
        """Each sample's best label."""
        return self.label[:, 0]

    def curves(self, label_count: int) -> Curves:
        """The same by label."""
        # What is not given is written into a column more, and left out.
        kept = np.full((len(self), label_count + 1), LEFT_OUT, dtype=np.float32)
        np.put_along_axis(kept, self.label, self.confidence, axis=1)
        by_label = np.ascontiguousarray(kept[:, :label_count].T)
        return Curves(self.t_us, self.start_us, self.end_us, self.best, by_label)


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Samples of one video in order of time, with the confidence of every label."""

    t_us: Ints
    start_us: Ints
    end_us: Ints
    best: Ints
    """Each sample's best label, or NONE."""
    kept: Single
    """Labels x samples: confidence of the best labels, LEFT_OUT for the others."""

    def __len__(self) -> int:
        return len(self.t_us)

    def curve(self, label: int) -> Floats:
        """The label's confidence in each sample; 0 where it is not among the best."""
        return np.asarray(np.maximum(self.kept[label], 0.0), dtype=np.float64)

    def shares(self) -> Single:
        """Labels x samples; what the best labels leave over is shared evenly among the others."""
        given, others = np.maximum(self.kept, np.float32(0)), self.kept < 0
        count = others.sum(axis=0, dtype=np.float32)
        left = np.maximum(np.float32(1) - given.sum(axis=0), np.float32(0))
        each = np.divide(left, count, out=np.zeros_like(left), where=count > 0)
        return np.asarray(given + others * each, dtype=np.float32)


def columns_in(connection: Connection, job_id: int, video_id: int) -> SampleColumns:
    """The job's samples of one video, within a transaction; of a video that a relabelling has
    answered for, before their rows are written too."""
    times = connection.execute(
        select(samples.c.bucket, samples.c.t_us, samples.c.start_us, samples.c.end_us)
        .where(samples.c.job_id == job_id, samples.c.video_id == video_id)
        .order_by(samples.c.bucket)
    ).all()
    if not times:
        return _unwritten(connection, job_id, video_id)
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


def without_rows(job_id: int, video_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether a relabelling has answered for the video and not written its samples yet."""
    done = select(tasks.c.samples).where(
        tasks.c.job_id == job_id, tasks.c.video_id == video_id, tasks.c.samples > 0
    )
    return done.limit(1).scalar_subquery().is_not(None) & ~with_rows(job_id, video_id)


def with_rows(job_id: int, video_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether the job has rows of samples of the video."""
    of_video = select(samples.c.bucket).where(
        samples.c.job_id == job_id, samples.c.video_id == video_id
    )
    # Not EXISTS: PostgreSQL may make a join of that, and read all the rows of the job for it.
    return of_video.limit(1).scalar_subquery().is_not(None)


def _unwritten(connection: Connection, job_id: int, video_id: int) -> SampleColumns:
    """Samples without rows, by their vectors: the numbers are the same to the last bit."""
    job = connection.execute(
        select(jobs.c.sampling, jobs.c.fit, jobs.c.model, jobs.c.label_set_id, jobs.c.top_n).where(
            jobs.c.id == job_id, without_rows(job_id, literal(video_id))
        )
    ).first()
    matrix = None if job is None else label_vectors_in(connection, job.label_set_id, job.model)
    if job is None or matrix is None:
        return _assembled([], [])
    of_job = job_id, job.sampling, job.fit, job.model
    for one in vectors.of_job(connection, *of_job, [video_id]):
        return SampleColumns.scored(one.times, one.vectors, matrix, job.top_n)
    return _assembled([], [])


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
