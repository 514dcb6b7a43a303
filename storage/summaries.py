"""What each video of a job shows, in a few numbers; and which video a person means."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Engine, func, or_, select

from storage.coverage import coverage
from storage.database import reading
from storage.dialect import among
from storage.exits import ExitCode
from storage.records import Scene, VideoState, shown_path
from storage.scenes import scenes
from storage.schema import files, flags, job_videos, jobs, labels, videos

_NAMED = 10
"""Videos that an error names at most."""


class NoSuchVideo(Exception):
    """The job holds no such video."""


class SeveralVideos(ValueError):
    """The text names several videos of the job where one is asked for."""

    code = ExitCode.USAGE


@dataclass(frozen=True, slots=True)
class LabelShare:
    """A label's part in a video, by its scenes."""

    label: str
    share: float
    """Of the analysed time, in (0, 1]."""
    first_us: int
    """Start of its first scene."""
    last_us: int
    """End of its last scene."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A label that reached its threshold, and the reason that it raises."""

    label: str
    reason: str
    samples: int
    first_us: int
    last_us: int
    """Time of its last sample."""
    peak: float
    """Highest confidence."""


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """A video of a job. What scenes and flags say is there once the video is closed."""

    video_id: int
    paths: tuple[str, ...]
    """Every place that it was seen at, printable, the latest first."""
    state: VideoState
    reason: str | None
    """Why it is not complete."""
    duration_us: int
    analysed_us: int
    gap_us: int
    scenes: int
    labels: tuple[LabelShare, ...]
    """By share, the largest first."""
    longest: Scene | None
    flags: tuple[Flag, ...]

    @property
    def path(self) -> str:
        """The place that it was seen at last, or what stands for it."""
        return self.paths[0] if self.paths else nowhere(self.video_id)


def summaries(engine: Engine, job_id: int, video: int | None = None) -> list[VideoSummary]:
    """The summary of each video of the job, or of number `video`, by path."""
    covered = coverage(engine, job_id, video)
    found = scenes(engine, job_id, video)
    stand_at = _paths(engine, job_id, video)
    raised = _flags(engine, job_id, video)
    rows = [
        VideoSummary(
            video_id=one.video_id,
            paths=tuple(stand_at[one.video_id]),
            state=one.state,
            reason=_reason(one.reason_kind, one.reason),
            duration_us=one.duration_us,
            analysed_us=one.analysed_us,
            gap_us=one.gap_us,
            scenes=len(found.get(one.video_id, ())),
            labels=shares_of(found.get(one.video_id, ())),
            longest=max(
                found.get(one.video_id, ()),
                key=lambda scene: scene.end_us - scene.start_us,
                default=None,
            ),
            flags=tuple(raised[one.video_id]),
        )
        for one in covered
    ]
    return sorted(rows, key=lambda row: (row.path, row.video_id))


def _reason(kind: str | None, reason: str | None) -> str | None:
    return ": ".join(part for part in (kind, reason) if part) or None


def shares_of(of_video: Sequence[Scene]) -> tuple[LabelShare, ...]:
    """Each label's share of the time in these scenes of one video, the largest first."""
    by_label: defaultdict[str, list[Scene]] = defaultdict(list)
    for scene in of_video:
        by_label[scene.label].append(scene)
    total_us = sum(scene.end_us - scene.start_us for scene in of_video)
    shares = [
        LabelShare(
            label,
            sum(scene.end_us - scene.start_us for scene in runs) / total_us,
            runs[0].start_us,
            runs[-1].end_us,
        )
        for label, runs in by_label.items()
    ]
    return tuple(sorted(shares, key=lambda one: (-one.share, one.first_us)))


def nowhere(video_id: int) -> str:
    """What stands for the path of a video whose file was replaced by another."""
    return f"(video {video_id}, replaced)"


def places(engine: Engine, job_id: int) -> dict[int, str]:
    """Where each video of the job was seen last, printable."""
    with reading(engine) as connection:
        every = connection.scalars(
            select(job_videos.c.video_id).where(job_videos.c.job_id == job_id)
        ).all()
    found = _paths(engine, job_id, None)
    return {one: found[one][0] if found[one] else nowhere(one) for one in every}


def _paths(engine: Engine, job_id: int, video: int | None) -> defaultdict[int, list[str]]:
    query = (
        select(files.c.video_id, files.c.path)
        .join(job_videos, job_videos.c.video_id == files.c.video_id)
        .where(job_videos.c.job_id == job_id)
        .order_by(files.c.video_id, files.c.seen_ms.desc(), files.c.id.desc())
    )
    if video is not None:
        query = query.where(files.c.video_id == video)
    found: defaultdict[int, list[str]] = defaultdict(list)
    with reading(engine) as connection:
        for video_id, path in connection.execute(query):
            found[video_id].append(path)
    return found


def _flags(engine: Engine, job_id: int, video: int | None) -> defaultdict[int, list[Flag]]:
    query = (
        select(flags, labels.c.name, labels.c.flag)
        .join(jobs, jobs.c.id == flags.c.job_id)
        .join(
            labels,
            (labels.c.label_set_id == jobs.c.label_set_id) & (labels.c.position == flags.c.label),
        )
        .where(flags.c.job_id == job_id)
        .order_by(flags.c.video_id, flags.c.label)
    )
    if video is not None:
        query = query.where(flags.c.video_id == video)
    found: defaultdict[int, list[Flag]] = defaultdict(list)
    with reading(engine) as connection:
        for row in connection.execute(query):
            found[row.video_id].append(
                Flag(row.name, row.flag, row.samples, row.first_us, row.last_us, row.peak)
            )
    return found


def find_videos(engine: Engine, job_id: int, text: str) -> list[int]:
    """The job's videos that the text names (`videos_named`), in order of number.

    Raises NoSuchVideo where it names none.
    """
    in_job = videos.c.id.in_(select(job_videos.c.video_id).where(job_videos.c.job_id == job_id))
    with reading(engine) as connection:
        found = videos_named(connection, text, in_job)
    if not found:
        raise NoSuchVideo(
            f"job {job_id} has no video {shown_path(os.fsencode(text))!r}: "
            "give a path, a file name, or a number (`video_id` of "
            f"`nightreel summary --job {job_id} --format csv`)"
        )
    return found


def find_video(engine: Engine, job_id: int, text: str) -> int:
    """The job's one video that the text names (`videos_named`).

    Raises NoSuchVideo, and SeveralVideos with the number and path of each, of ten at most.
    """
    found = find_videos(engine, job_id, text)
    if len(found) == 1:
        return found[0]
    paths = known_places(engine, found[:_NAMED])
    listed = "; ".join(f"{one}: {paths.get(one) or nowhere(one)}" for one in found[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise SeveralVideos(
        f"{shown_path(os.fsencode(text))!r} names {len(found)} videos: give more of the path, or "
        f"the number of one ({listed}{more})"
    )


def videos_named(connection: Connection, text: str, *among_those: ColumnElement[bool]) -> list[int]:
    """The videos that the text names, of those that the conditions on `videos` leave, in order of
    number: by path as a shell completes it, or by content id; else by the path's end (a file name,
    or some folders and a file name), or by number."""
    given, full = (shown_path(os.fsencode(one)) for one in (text, os.path.abspath(text)))
    ending = f"/{os.path.normpath(given)}"
    tail = func.substr(files.c.path, func.length(files.c.path) - len(ending) + 1)
    exactly = or_(files.c.path.in_([given, full]), videos.c.content_id == given)
    loosely = tail == ending
    if text.isascii() and text.isdigit() and len(text) < 19:
        loosely |= videos.c.id == int(text)
    for named in (exactly, loosely):
        found = connection.scalars(
            select(videos.c.id)
            .distinct()
            .outerjoin(files, files.c.video_id == videos.c.id)
            .where(named, *among_those)
            .order_by(videos.c.id)
        ).all()
        if found:
            return list(found)
    return []


def known_places(engine: Engine, video_ids: Iterable[int]) -> dict[int, str]:
    """Where each of these videos was seen last, of whichever job; without those that no file
    holds."""
    with reading(engine) as connection:
        rows = connection.execute(
            select(files.c.video_id, files.c.path)
            .where(among(connection, files.c.video_id, video_ids))
            .order_by(files.c.seen_ms, files.c.id)
        ).all()
    return {row.video_id: row.path for row in rows}
