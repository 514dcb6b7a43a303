"""What a whole job shows, in all or by month or day of recording."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, Engine, func, literal, select

from storage.database import reading
from storage.labels import labels_in
from storage.scenes import UNKNOWN_NAME
from storage.schema import job_videos, scenes, videos


class Period(StrEnum):
    """How videos are grouped by their day of recording."""

    ALL = "all"
    MONTH = "month"
    DAY = "day"


UNDATED = "undated"
"""Period of videos whose day of recording is unknown."""

_DIGITS = {Period.MONTH: len("2024-07"), Period.DAY: len("2024-07-01")}


@dataclass(frozen=True, slots=True)
class LabelTotal:
    """A label's scenes in all videos of a period."""

    label: str
    total_us: int
    share: float
    """Of the time that is in scenes."""
    scenes: int
    videos: int
    """How many show it."""


@dataclass(frozen=True, slots=True)
class PeriodTotal:
    """The closed videos of one period."""

    period: str
    """`2024-07`, `2024-07-01`, `all` or `undated`."""
    videos: int
    duration_us: int
    analysed_us: int
    dated_from: dict[str, int]
    """How many videos' days were taken from the container, the file name, the modification time."""
    labels: tuple[LabelTotal, ...]
    """By share, the largest first."""


def totals(engine: Engine, job_id: int, by: Period = Period.ALL) -> list[PeriodTotal]:
    """The job's closed videos by period of recording, the earliest first and the undated last."""
    period = _period(by)
    # PostgreSQL groups by no constant.
    groups = () if by is Period.ALL else (period,)
    with reading(engine) as connection:
        names = [label.name for label in labels_in(connection, job_id)]
        counted = connection.execute(
            select(
                period,
                videos.c.recorded_from,
                func.count(),
                func.sum(job_videos.c.duration_us),
                func.sum(job_videos.c.analysed_us),
            )
            .join(videos, videos.c.id == job_videos.c.video_id)
            .where(job_videos.c.job_id == job_id, job_videos.c.closed_ms.is_not(None))
            .group_by(*groups, videos.c.recorded_from)
        ).all()
        shown = connection.execute(
            select(
                period,
                scenes.c.label,
                func.sum(scenes.c.end_us - scenes.c.start_us),
                func.count(),
                func.count(scenes.c.video_id.distinct()),
            )
            .join(videos, videos.c.id == scenes.c.video_id)
            .where(scenes.c.job_id == job_id)
            .group_by(*groups, scenes.c.label)
        ).all()
    time_of: defaultdict[str, int] = defaultdict(int)
    for name, _, total_us, _, _ in shown:
        time_of[name] += int(total_us)
    labels: defaultdict[str, list[LabelTotal]] = defaultdict(list)
    for name, label, total_us, count, of_videos in shown:
        labels[name].append(
            LabelTotal(
                names[label] if label >= 0 else UNKNOWN_NAME,
                int(total_us),
                int(total_us) / time_of[name],
                count,
                of_videos,
            )
        )
    found: dict[str, PeriodTotal] = {}
    for name, source, count, duration_us, analysed_us in counted:
        before = found.get(name) or PeriodTotal(name, 0, 0, 0, {}, ())
        found[name] = PeriodTotal(
            name,
            before.videos + count,
            before.duration_us + int(duration_us),
            before.analysed_us + int(analysed_us),
            before.dated_from | ({source: count} if source is not None else {}),
            tuple(sorted(labels[name], key=lambda one: (-one.total_us, one.label))),
        )
    return sorted(found.values(), key=lambda one: (one.period == UNDATED, one.period))


def _period(by: Period) -> ColumnElement[str]:
    if by is Period.ALL:
        return literal(str(by), literal_execute=True)
    day = func.substr(videos.c.recorded_on, 1, literal(_DIGITS[by], literal_execute=True))
    return func.coalesce(day, literal(UNDATED, literal_execute=True))
