"""`nightreel purge`: delete what is known of a job or a video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nightreel.cli.jobs import confirm, yes_option
from nightreel.cli.options import JOB_ID, LONGEST_NUMBER, database_option
from nightreel.cli.output import counted, say
from storage.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Engine

    from storage.purge import Loss


@click.command(
    epilog="""\b
Examples:
  nightreel purge 3                   job 3; its embeddings stay for other labels and searches
  nightreel purge 3 --embeddings      job 3, and embeddings that only it needs
  nightreel purge holiday.mp4 --yes   a video, in all jobs: labels, embeddings, file names
  nightreel purge ./7                 a video whose file is called 7"""
)
@click.argument("what", metavar="VIDEO|JOB")
@click.option(
    "--embeddings",
    "with_embeddings",
    is_flag=True,
    help="Delete the embeddings that no other job needs, too: they cost image calls.",
)
@yes_option
@database_option
def purge(what: str, with_embeddings: bool, yes: bool, database_url: str) -> int:
    """Delete all that the database holds of a job or a video. It cannot be undone.

    A number is a JOB; anything else is a VIDEO: a path, a file name or a content id. The files of
    the archive are left alone. What somebody works on is not deleted: `nightreel cancel` ends that.
    """
    from storage import database
    from storage.purge import find_video, job_loss, purge_job, purge_video, video_loss

    engine = database.connect(database_url)
    click.get_current_context().call_on_close(engine.dispose)
    database.check(engine)
    if what.isascii() and what.isdigit() and len(what) < LONGEST_NUMBER:
        job_id = JOB_ID.convert(int(what), None, None)
        loss = job_loss(engine, job_id, with_embeddings=with_embeddings)
        kept = "" if with_embeddings else "; embeddings stay (--embeddings deletes them, too)"
        confirm(f"delete job {job_id}: {_lost(loss)}{kept}?", yes=yes)
        deleted = purge_job(engine, job_id, with_embeddings=with_embeddings)
        say(f"job {job_id} is deleted: {_rows(deleted)}")
    else:
        video = find_video(engine, what)
        loss = video_loss(engine, video.video_id)
        place = video.paths[0] if video.paths else video.content_id
        of_jobs = counted(len(video.jobs), "job")
        confirm(f"delete {place} from {of_jobs}: {_lost(loss)}?", yes=yes)
        deleted = purge_video(engine, video.video_id)
        say(f"{place} is deleted from {of_jobs}: {_rows(deleted)}")
        if video.label_sets:
            say(
                f"note: labels of {', '.join(video.label_sets)} were made from moments of it; "
                "they go with the jobs that use them"
            )
    _say_space(engine)
    return ExitCode.OK


def _lost(loss: Loss) -> str:
    calls = counted(loss.image_calls, "image call") if loss.image_calls else "no image call"
    waiting = f"; {counted(loss.undelivered, 'notification')} not delivered" * bool(
        loss.undelivered
    )
    return (
        f"{_rows(loss.rows)}, {counted(loss.samples, 'frame')}; {calls} to get that back{waiting}"
    )


def _rows(rows: Mapping[str, int]) -> str:
    return f"{counted(sum(rows.values()), 'row')} of {counted(len(rows), 'table')}"


def _say_space(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        say(
            f"{engine.url.database} keeps its size, and its free space is used again; "
            "SQLite's VACUUM makes it smaller"
        )
