"""`nightreel search`: the moments of the archive nearest to any text."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import SECOND_US, job_asked, unseen
from nightreel.cli.numbers import NUMBER, numbered
from nightreel.cli.options import (
    Duration,
    api_options,
    database_option,
    format_option,
    job_option,
)
from nightreel.cli.output import Column, clock, say, write_rows
from storage.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from storage.vectors import VideoVectors

SEARCH = (
    Column("rank", "Rank", justify="right"),
    NUMBER,
    Column("video", "Video"),
    Column("time_s", "Time", clock, "right"),
    Column("score", "Score", lambda value: f"{value:.3f}", "right"),
)


@click.command(
    epilog="""\b
Examples:
  nightreel search "goal celebration" --top 20
  nightreel search "a red tractor in snow" --api http://gpu-box:9001
  nightreel search --like match.mp4@0:12:03 --apart 1min"""
)
@click.argument("text", required=False)
@click.option("--like", metavar="VIDEO@TIME", help="What resembles this moment, instead of a text.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="How many.")
@click.option(
    "--apart",
    type=Duration(),
    default="5s",
    show_default=True,
    help="Nearer moments of one video are one; the best of them is shown.",
)
@api_options
@job_option
@database_option
@format_option
def search(  # noqa: PLR0917 - one parameter an option
    text: str | None,
    like: str | None,
    top: int,
    apart: Fraction,
    api_url: str | None,
    engine: str,
    job_id: int | None,
    database_url: str,
    form: str,
) -> int:
    """The moments nearest to TEXT among everything that the job's model has embedded, whichever
    job sampled it, or with --job among that job's videos. The score is the cosine.

    A text is sent to the API once and then remembered; no picture is sent.
    """
    import numpy as np

    from nightreel.cli.likes import sample_like
    from scheduler.labels import check_text
    from storage import vectors
    from storage.database import reading
    from storage.embedded import why_not_embedded
    from storage.search import search as nearest
    from storage.summaries import known_places, nowhere

    if (text is None) == (like is None):
        raise click.UsageError("give a TEXT, or --like VIDEO@TIME.")
    if text is not None and not text.strip():
        raise click.UsageError("an empty TEXT resembles nothing: say what to look for.")
    if text is not None:
        check_text(text.strip(), "text")
    results, job = job_asked(database_url, job_id)
    lacking = unseen(results, job)

    def stored(connection: Connection) -> Iterator[VideoVectors]:
        if job_id is None:
            return vectors.of_model(connection, job.model)
        return vectors.of_job(connection, job.id, job.sampling, job.fit, job.model)

    with reading(results) as connection:
        # No API need be asked, nor a moment be blamed, where there is nothing to compare with.
        empty = next(stored(connection), None) is None
    if empty:
        write_rows([], SEARCH, form, [job.notice, *lacking])
        say(f"nothing of model {job.model} is embedded: {why_not_embedded(results, job)}")
        return ExitCode.INCOMPLETE
    if like is not None:
        query = np.asarray(sample_like(results, job, like).vector, dtype=np.float32)
    else:
        from nightreel.asking import SameApi

        with SameApi(job.model, api_url, engine) as api:
            query = api.text_vector(results, str(text).strip())
    with reading(results) as connection:
        hits = nearest(stored(connection), query, top=top, apart_us=int(apart * 1_000_000))
    paths = known_places(results, [hit.video_id for hit in hits])
    rows = [
        {
            "rank": rank,
            "video_id": hit.video_id,
            "video": paths.get(hit.video_id) or nowhere(hit.video_id),
            "time_s": hit.t_us / SECOND_US,
            "score": hit.score,
        }
        for rank, hit in enumerate(hits, 1)
    ]
    write_rows(rows, numbered(SEARCH, rows, form), form, [job.notice, *lacking])
    return ExitCode.OK
