"""Flags: labels that reached their threshold, where, how surely, and the reason they raise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, exists, select

from storage.columns import Curves, SampleColumns, columns_in
from storage.database import reading
from storage.dialect import among
from storage.exits import ExitCode
from storage.labels import labels_in
from storage.records import Label
from storage.schema import flags, job_videos, jobs, label_sets
from storage.schema import labels as label_rows

JOIN_US = 2_000_000
"""Flagged samples that stand no further apart are one range: a moment's doubt cuts it no more than
it cuts a scene."""
_NAMED = 5
"""Jobs that an error names at most."""


class NothingWatched(Exception):
    """No label of the job has a flag to raise: that none is raised says nothing."""

    code = ExitCode.USAGE


@dataclass(frozen=True, slots=True)
class FlaggedRange:
    """Interval [start_us, end_us) of a video in which samples raise a flag."""

    video_id: int
    start_us: int
    end_us: int
    label: str
    reason: str
    confidence: float
    """Mean of the label's confidence over the samples that raise it."""
    peak: float
    samples: int
    """How many raise it."""


def flagged(
    engine: Engine, job_id: int, video_ids: Collection[int] | None = None
) -> list[FlaggedRange]:
    """What the job's closed videos raise, or some of them: the worst first, which is the highest
    peak, then the longest. Raises NothingWatched, naming jobs that would do."""
    query = select(flags.c.video_id).distinct().where(flags.c.job_id == job_id)
    found: list[FlaggedRange] = []
    with reading(engine) as connection:
        if video_ids is not None:
            query = query.where(among(connection, flags.c.video_id, video_ids))
        labels = labels_in(connection, job_id)
        if all(label.flag is None for label in labels):
            raise NothingWatched(_nothing_watched(connection, job_id, video_ids))
        for video_id in connection.scalars(query).all():
            found += _ranges(video_id, columns_in(connection, job_id, video_id), labels)
    return sorted(
        found,
        key=lambda one: (-one.peak, one.start_us - one.end_us, one.video_id, one.start_us),
    )


def watches(engine: Engine, job_id: int) -> bool:
    """Whether some label of the job has a flag to raise."""
    with reading(engine) as connection:
        return any(label.flag is not None for label in labels_in(connection, job_id))


def _nothing_watched(connection: Connection, job_id: int, video_ids: Collection[int] | None) -> str:
    """What is wrong, and the latest jobs that can answer instead: those that have all of these
    videos, or all of the job's."""
    theirs = job_videos.alias()
    meant = select(job_videos).where(job_videos.c.job_id == job_id)
    if video_ids is not None:
        meant = meant.where(among(connection, job_videos.c.video_id, video_ids))
    held = exists().where(theirs.c.job_id == jobs.c.id, theirs.c.video_id == job_videos.c.video_id)
    lacking = meant.where(~held.correlate(jobs, job_videos)).correlate(jobs)
    query = (
        select(jobs.c.id, label_sets.c.name)
        .join(label_sets, label_sets.c.id == jobs.c.label_set_id)
        .where(
            jobs.c.label_set_id.in_(
                select(label_rows.c.label_set_id).where(label_rows.c.flag.is_not(None))
            )
        )
        .where(meant.exists(), ~lacking.exists())
    )
    others = connection.execute(query.order_by(jobs.c.id.desc()).limit(_NAMED)).all()
    able = ", ".join(f"`--job {number}` ({name})" for number, name in others)
    remedy = (
        f"ask one that can: {able}"
        if able
        else f"give it others with `nightreel relabel {job_id} --labels FILE`"
    )
    return f"job {job_id} cannot flag anything, as none of its labels has a `threshold`; {remedy}"


def flag_rows(samples: SampleColumns | Curves, labels: Sequence[Label]) -> list[dict[str, Any]]:
    """The rows of `flags` for one video: one for each label that some sample raises."""
    return [
        {
            "label": position,
            "samples": len(hits),
            "first_us": int(samples.t_us[hits[0]]),
            "last_us": int(samples.t_us[hits[-1]]),
            "peak": float(samples.curve(position)[hits].max()),
        }
        for position, hits in _raised(samples, labels)
    ]


def _raised(
    samples: SampleColumns | Curves, labels: Sequence[Label]
) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """Each flagged label with the samples that raise it: by its threshold, or where it has none, by
    being the sample's best label."""
    for position, label in enumerate(labels):
        if label.flag is None or not len(samples):
            continue
        if label.threshold is None:
            raising = samples.best == position
        else:
            raising = samples.curve(position) >= label.threshold
        if raising.any():
            yield position, np.flatnonzero(raising)


def _ranges(
    video_id: int, samples: SampleColumns, labels: Sequence[Label]
) -> Iterator[FlaggedRange]:
    for position, hits in _raised(samples, labels):
        apart_us = samples.start_us[hits[1:]] - samples.end_us[hits[:-1]]
        for run in np.split(hits, np.flatnonzero(apart_us > JOIN_US) + 1):
            confidence = samples.curve(position)[run]
            label = labels[position]
            yield FlaggedRange(
                video_id=video_id,
                start_us=int(samples.start_us[run[0]]),
                end_us=int(samples.end_us[run[-1]]),
                label=label.name,
                reason=label.flag or "",
                confidence=float(confidence.mean()),
                peak=float(confidence.max()),
                samples=len(run),
            )
