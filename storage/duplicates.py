"""What skipping duplicates has spared a job, and how often it was wrong."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, FromClause, and_, func, select

from storage.database import reading
from storage.schema import predictions, samples


@dataclass(frozen=True, slots=True)
class Skipped:
    """The duplicates among a job's samples."""

    samples: int
    reused: int
    """Samples that took over the result of one before."""
    audited: int
    """Duplicates that were sent all the same."""
    differing: int
    """Of those, whose best label is not that of the sample they would have taken over."""

    def __str__(self) -> str:
        text = f"duplicates: {self.reused} of {self.samples} frames not sent"
        if self.audited:
            text += f"; of {self.audited} sent for audit, {self.differing} have another best label"
        return text


def skipped(engine: Engine, job_id: int) -> Skipped:
    """The job's duplicates so far."""
    best, source_best = predictions.alias(), predictions.alias()
    of_job = select(
        func.count(), func.count(samples.c.reused_from), func.count(samples.c.audit_of)
    ).where(samples.c.job_id == job_id)
    differing = (
        select(func.count())
        .select_from(samples)
        .join(best, _is_best(best, samples.c.bucket))
        .join(source_best, _is_best(source_best, samples.c.audit_of))
        .where(samples.c.job_id == job_id, best.c.label != source_best.c.label)
    )
    with reading(engine) as connection:
        count, reused, audited = connection.execute(of_job).one()
        return Skipped(count, reused, audited, connection.scalar(differing) or 0)


def _is_best(best: FromClause, bucket: ColumnElement[int]) -> ColumnElement[bool]:
    return and_(
        best.c.job_id == samples.c.job_id,
        best.c.video_id == samples.c.video_id,
        best.c.bucket == bucket,
        best.c.rank == 0,
    )
