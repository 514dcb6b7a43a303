"""`nightreel totals`: all videos together, by month or day of recording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import SECOND_US, job_asked, unseen
from nightreel.cli.options import database_option, format_option, job_option
from nightreel.cli.originals import spare_originals
from nightreel.cli.output import Column, duration, percent, say, write_rows
from storage.exits import ExitCode

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.ledger import Job
    from storage.totals import PeriodTotal

TOTALS = (
    Column("period", "Period"),
    Column("label", "Label"),
    Column("share", "Share", percent, "right"),
    Column("total_s", "Time", duration, "right"),
    Column("scenes", "Scenes", justify="right"),
    Column("videos", "Videos", justify="right"),
    Column("period_videos", "of", justify="right"),
    Column("dated_from", "Dated from", lambda v: ", ".join(f"{k} {n}" for k, n in v.items())),
)


@click.command(
    epilog="""\b
Examples:
  nightreel totals
  nightreel totals --by month --plot seasons.svg
  nightreel totals --by day --format csv > weather.csv"""
)
@click.option(
    "--by",
    type=click.Choice(["all", "month", "day"]),
    default="all",
    show_default=True,
    help="Group videos by their day of recording.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the shares into this file too: .png or .svg.",
)
@job_option
@database_option
@format_option
def totals(by: str, plot: Path | None, job_id: int | None, database_url: str, form: str) -> int:
    """One row a label (and period): its share of the time, scenes, videos.

    The day of recording is the container's, else a date in the file's name, else the file's
    modification time; which of them is said beside it.
    """
    from storage.totals import Period
    from storage.totals import totals as stored

    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise click.UsageError(f"--plot {plot}: name a file that ends with .png or .svg.")
    engine, job = job_asked(database_url, job_id)
    if plot is not None:
        spare_originals(engine, plot)
    lacking = unseen(engine, job)
    periods = stored(engine, job.id, Period(by))
    rows = [
        {
            "period": period.period,
            "label": one.label,
            "share": round(one.share, 4),
            "total_s": one.total_us / SECOND_US,
            "scenes": one.scenes,
            "videos": one.videos,
            "period_videos": period.videos,
            "dated_from": period.dated_from,
        }
        for period in periods
        for one in period.labels
    ]
    if plot is not None:
        _draw(engine, job, periods, plot)
    write_rows(rows, TOTALS, form, [job.notice, *lacking])
    return ExitCode.OK


def _draw(engine: Engine, job: Job, periods: list[PeriodTotal], path: Path) -> None:
    from nightreel.cli.extras import needs
    from nightreel.reports.plots import draw_shares
    from storage.database import reading
    from storage.labels import labels_in
    from storage.whole_files import whole

    needs("matplotlib")
    with reading(engine) as connection:
        labels = [label.name for label in labels_in(connection, job.id)]
    plot = draw_shares(
        periods,
        labels,
        "svg" if path.suffix.lower() == ".svg" else "png",
        title=f"{job.name}: share of time",
        notice=job.notice,
    )
    try:
        with whole(path) as part:
            part.write_bytes(plot.data)
    except OSError as error:
        raise click.UsageError(f"--plot {path} cannot be written ({error.strerror}).") from None
    if plot.boxed:
        say(f"note: the font has no {plot.boxed}: boxes stand for them; an .svg keeps the text")
