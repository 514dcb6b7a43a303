"""Highlights: the peaks of a label's confidence over time, as cuts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from sqlalchemy import Engine, select

from storage.columns import Floats, SampleColumns, columns_in, without_rows
from storage.database import reading
from storage.dialect import among
from storage.occurrences import NoSuchLabel, label_named
from storage.scenes import UNKNOWN
from storage.schema import job_videos, predictions

SLOPE = 0.5
"""A peak reaches on both sides as far as the label keeps this share of its height."""

LEAST = 0.5
"""Peaks below this confidence are no highlights: other labels together are likelier there."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Interval [start_us, end_us) of a video, worth seeing for a label."""

    video_id: int
    start_us: int
    end_us: int
    peak_us: int
    """Time of the sample in which the label is surest."""
    peak: float
    """Its confidence there."""
    confidence: float
    """Mean over the samples between the slopes, before padding."""


def highlights(
    engine: Engine,
    job_id: int,
    label: str,
    *,
    top: int = 10,
    pad_us: int = 0,
    least: float = LEAST,
    video_ids: Collection[int] | None = None,
) -> list[Cut]:
    """The label's best cuts in the job's videos, or in some of them: the highest peak first, and of
    equal peaks the one with the higher mean. Peaks below a confidence of `least` are left out.

    Each is widened by `pad_us` on both sides, within its video; cuts that then touch are one.
    Raises NoSuchLabel, also for `unknown`, and ValueError for numbers without sense.
    """
    if top < 1:
        raise ValueError(f"top={top}: ask for one cut or more")
    if pad_us < 0:
        raise ValueError(f"pad_us={pad_us}: cuts are widened, so give 0 or more")
    if not 0 <= least <= 1:
        raise ValueError(f"least={least}: a confidence is from 0 to 1")
    with reading(engine) as connection:
        position, _ = label_named(connection, job_id, label)
        if position == UNKNOWN:
            raise NoSuchLabel(
                "`unknown` is where no label leads: it has scenes (`nightreel find unknown`), but "
                "no confidence of its own and so no peaks"
            )
        # A video that has the label in no sample's best has no peak of it.
        asked = select(predictions.c.video_id).where(
            predictions.c.job_id == job_id, predictions.c.label == position
        )
        videos = select(job_videos.c.video_id, job_videos.c.duration_us).where(
            job_videos.c.job_id == job_id,
            job_videos.c.video_id.in_(asked) | without_rows(job_id, job_videos.c.video_id),
        )
        if video_ids is not None:
            videos = videos.where(among(connection, job_videos.c.video_id, video_ids))
        found: list[Cut] = []
        for video_id, duration_us in connection.execute(videos).all():
            samples = columns_in(connection, job_id, video_id)
            padded = (
                replace(
                    cut,
                    start_us=max(cut.start_us - pad_us, 0),
                    end_us=min(cut.end_us + pad_us, duration_us),
                )
                for cut in _peaks(video_id, samples, samples.curve(position))
                if cut.peak >= least
            )
            found += _merged(padded)
    found.sort(key=lambda cut: (-cut.peak, -cut.confidence, cut.video_id, cut.start_us))
    return found[:top]


def _peaks(video_id: int, samples: SampleColumns, curve: Floats) -> Iterator[Cut]:
    """Every peak of one video: a sample that no neighbour exceeds, and its slopes; higher peaks
    take theirs first."""
    apart = np.concatenate([[True], samples.end_us[:-1] != samples.start_us[1:], [True]])
    before = np.where(apart[:-1], 0.0, np.roll(curve, 1))
    after = np.where(apart[1:], 0.0, np.roll(curve, -1))
    tops = np.flatnonzero((curve > 0) & (curve >= before) & (curve >= after))
    taken = np.zeros(len(curve), dtype=bool)
    for top in tops[np.argsort(-curve[tops], kind="stable")]:
        if taken[top]:
            continue
        floor = SLOPE * curve[top]
        free = ~taken & (curve >= floor)
        first, end = int(top), int(top) + 1
        while not apart[first] and free[first - 1]:
            first -= 1
        while not apart[end] and free[end]:
            end += 1
        taken[first:end] = True
        yield Cut(
            video_id=video_id,
            start_us=int(samples.start_us[first]),
            end_us=int(samples.end_us[end - 1]),
            peak_us=int(samples.t_us[top]),
            peak=float(curve[top]),
            confidence=float(curve[first:end].mean()),
        )


def _merged(cuts: Iterable[Cut]) -> list[Cut]:
    """Cuts of one video that touch or overlap made one, which keeps the higher peak."""
    found: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: cut.start_us):
        if found and cut.start_us <= found[-1].end_us:
            before = found[-1]
            better = max(before, cut, key=lambda one: (one.peak, one.confidence))
            end_us = max(before.end_us, cut.end_us)
            found[-1] = replace(better, start_us=before.start_us, end_us=end_us)
        else:
            found.append(cut)
    return found
