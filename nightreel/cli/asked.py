"""What commands that ask the database begin with: the job, and the videos that a person means."""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction
from typing import TYPE_CHECKING

import click

from nightreel.cli.options import Duration
from nightreel.cli.output import counted

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.ledger import Job

SECOND_US = 1e6
CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")


def job_asked(database_url: str, job_id: int | None) -> tuple[Engine, Job]:
    """The database, which must be of this release, and the job: the latest unless one is named."""
    from storage import database, ledger

    engine = database.connect(database_url)
    click.get_current_context().call_on_close(engine.dispose)
    database.check(engine)
    job = ledger.latest_job(engine) if job_id is None else ledger.get_job(engine, job_id)
    return engine, job


def videos_asked(engine: Engine, job: Job, video: str | None) -> frozenset[int] | None:
    """The videos that a person's word means; None means all. Raises NoSuchVideo."""
    from storage.summaries import find_videos

    return None if video is None else frozenset(find_videos(engine, job.id, video))


def one_video(engine: Engine, job: Job, video: str) -> int:
    """The one video that a person's word means. Raises NoSuchVideo, SeveralVideos."""
    from storage.summaries import find_video

    return find_video(engine, job.id, video)


def unseen(engine: Engine, job: Job, only: Collection[int] | None = None) -> list[str]:
    """What must be said beside an answer that something of the job, or of these of its videos, has
    no full part in; nothing where all have. Asked before the answer itself, which then holds
    whatever is done meanwhile."""
    from storage.coverage import lacking

    unread = not_all_read(engine, job)
    number = lacking(engine, job.id, only)
    if not number:
        return unread
    are = "is" if number == 1 else "are"
    return [
        *unread,
        f"{number} of the job's videos {are} not all analysed: see "
        f"`nightreel coverage --job {job.id}`",
    ]


def not_all_read(engine: Engine, job: Job) -> list[str]:
    """What must be said of a job that does not have all its videos, or all the rows of their
    samples: any of them may be missing in an answer. Nothing is said of one that does."""
    from storage.coverage import listing
    from storage.ledger import JobState

    known = listing(engine, job.id)
    if known.complete:
        return []
    files = counted(known.unread, "file")
    if known.job_state == JobState.CLOSED:
        return [f"{files} of the job never read: `nightreel retry {job.id}` tries again"]
    if known.unread:
        return [f"{files} still to be read; job {job.id} is {known.job_state}"]
    return [f"job {job.id} is {known.job_state}, and not all of its videos and frames are here yet"]


def microseconds(text: str) -> int:
    """A place in a video: `0:12:03.5`, `2:05`, `83`, `83s` or `1min`. Raises UsageError."""
    found = CLOCK.fullmatch(text.strip())
    if found is not None:
        hours, minutes, seconds = found.groups()
        whole = 3600 * int(hours or 0) + 60 * int(minutes) + Fraction(seconds)
    elif text.strip() in ("0", "0s"):
        whole = Fraction(0)
    else:
        try:
            whole = Duration().convert(text, None, None)
        except click.BadParameter:
            raise click.UsageError(
                f"{text!r} is no place in a video: write 0:12:03.5, 2:05 or 83s."
            ) from None
    return round(whole * 1_000_000)
