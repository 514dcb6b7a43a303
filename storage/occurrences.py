"""Where a label occurs: in which videos, from when on, for how long."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Engine, func, select

from storage.database import reading
from storage.labels import labels_in
from storage.scenes import UNKNOWN, UNKNOWN_NAME
from storage.schema import job_videos, scenes


class NoSuchLabel(Exception):
    """The job does not know the label."""


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A label's scenes in one video, taken together."""

    video_id: int
    label: str
    first_us: int
    """Start of the first scene."""
    last_us: int
    """End of the last scene."""
    total_us: int
    share: float
    """Of the video's analysed time, in (0, 1]."""
    scenes: int
    longest_us: int
    peak: float
    """Highest confidence of the label in these scenes."""


def occurrences(
    engine: Engine, job_id: int, label: str, *, min_length_us: int = 0
) -> list[Occurrence]:
    """The job's closed videos that show the label in scenes of at least `min_length_us`; those
    that show it most come first. Raises NoSuchLabel."""
    length_us = scenes.c.end_us - scenes.c.start_us
    with reading(engine) as connection:
        position, name = label_named(connection, job_id, label)
        rows = connection.execute(
            select(
                scenes.c.video_id,
                func.min(scenes.c.start_us),
                func.max(scenes.c.end_us),
                func.sum(length_us),
                job_videos.c.analysed_us,
                func.count(),
                func.max(length_us),
                func.max(scenes.c.peak),
            )
            .join(
                job_videos,
                (job_videos.c.job_id == scenes.c.job_id)
                & (job_videos.c.video_id == scenes.c.video_id),
            )
            .where(
                scenes.c.job_id == job_id,
                scenes.c.label == position,
                length_us >= min_length_us,
            )
            .group_by(scenes.c.video_id, job_videos.c.analysed_us)
        ).all()
    found = [
        Occurrence(
            video_id,
            name,
            first,
            last,
            int(total),
            # Scenes end with their last sample's interval and cover no gap, so this is at most 1.
            int(total) / analysed,
            count,
            longest,
            peak,
        )
        for video_id, first, last, total, analysed, count, longest, peak in rows
    ]
    return sorted(found, key=lambda one: (-one.total_us, one.video_id))


def label_named(connection: Connection, job_id: int, text: str) -> tuple[int, str]:
    """Position and name of the job's label of this name, in whatever case; `unknown` is the one of
    scenes in which no label leads. Raises NoSuchLabel, naming those that there are."""
    names = [label.name for label in labels_in(connection, job_id)]
    asked = text.strip()
    for same in (str, str.casefold):
        for position, name in enumerate(names):
            if same(name) == same(asked):
                return position, name
    if asked.casefold() == UNKNOWN_NAME:
        return UNKNOWN, UNKNOWN_NAME
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise NoSuchLabel(
        f"job {job_id} has no label {asked!r}, only: {shown}; ask for anything else with "
        "`nightreel search`, or give the job new labels with `nightreel relabel`"
    )
