"""Flags: labels that reached their threshold, where, how surely, and the reason they raise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, select

from storage.columns import Curves, SampleColumns, columns_in
from storage.database import reading
from storage.dialect import among
from storage.labels import labels_in
from storage.records import Label
from storage.schema import flags

JOIN_US = 2_000_000
"""Flagged samples that stand no further apart are one range: a moment's doubt cuts it no more than
it cuts a scene."""


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
    peak, then the longest."""
    query = select(flags.c.video_id).distinct().where(flags.c.job_id == job_id)
    found: list[FlaggedRange] = []
    with reading(engine) as connection:
        if video_ids is not None:
            query = query.where(among(connection, flags.c.video_id, video_ids))
        labels = labels_in(connection, job_id)
        for video_id in connection.scalars(query).all():
            found += _ranges(video_id, columns_in(connection, job_id, video_id), labels)
    return sorted(
        found,
        key=lambda one: (-one.peak, one.start_us - one.end_us, one.video_id, one.start_us),
    )


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
