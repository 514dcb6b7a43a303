"""Commands about one label: find, flags, highlights."""

from __future__ import annotations

from fractions import Fraction

import click

from nightreel.cli.asked import SECOND_US, job_asked, unseen, videos_asked
from nightreel.cli.numbers import NUMBER, numbered
from nightreel.cli.options import Duration, FiniteFloat, database_option, format_option, job_option
from nightreel.cli.output import Column, clock, duration, percent, say, write_rows
from storage.exits import ExitCode


def _share(value: float) -> str:
    return f"{value:.2f}"


FIND = (
    NUMBER,
    Column("video", "Video"),
    Column("label", "Label"),
    Column("first_s", "Begins", clock, "right"),
    Column("last_s", "Ends", clock, "right"),
    Column("total_s", "Lasts", duration, "right"),
    Column("share", "Share", percent, "right"),
    Column("scenes", "Scenes", justify="right"),
    Column("longest_s", "Longest", duration, "right"),
    Column("peak", "Peak", _share, "right"),
)
FLAGS = (
    NUMBER,
    Column("video", "Video"),
    Column("start_s", "Start", clock, "right"),
    Column("end_s", "End", clock, "right"),
    Column("reason", "Reason"),
    Column("label", "Label"),
    Column("peak", "Peak", _share, "right"),
    Column("confidence", "Mean", _share, "right"),
    Column("samples", "Frames", justify="right"),
)
HIGHLIGHTS = (
    Column("rank", "Rank", justify="right"),
    NUMBER,
    Column("video", "Video"),
    Column("start_s", "Start", clock, "right"),
    Column("end_s", "End", clock, "right"),
    Column("peak_s", "Peak at", clock, "right"),
    Column("peak", "Peak", _share, "right"),
    Column("confidence", "Mean", _share, "right"),
)


@click.command(
    epilog="""\b
Examples:
  nightreel find "construction site" --min 3s
  nightreel find "Winter Season" --top 10
  nightreel find "goal celebration" --format csv > goals.csv"""
)
@click.argument("label")
@click.option("--min", "shortest", type=Duration(), help="Count scenes of at least this length.")
@click.option("--top", type=click.IntRange(1), help="Only the videos that show it most.")
@job_option
@database_option
@format_option
def find(  # noqa: PLR0917 - one parameter an option
    label: str,
    shortest: Fraction | None,
    top: int | None,
    job_id: int | None,
    database_url: str,
    form: str,
) -> int:
    """Which videos show LABEL, when it begins, how long it lasts; those with most of it first.

    LABEL is a label of the job, in any case, or `unknown` for time in which no label leads.
    """
    from storage.occurrences import occurrences
    from storage.summaries import places

    engine, job = job_asked(database_url, job_id)
    lacking = unseen(engine, job)
    found = occurrences(engine, job.id, label, min_length_us=int((shortest or 0) * 1_000_000))[:top]
    paths = places(engine, job.id)
    rows = [
        {
            "video_id": one.video_id,
            "video": paths[one.video_id],
            "label": one.label,
            "first_s": one.first_us / SECOND_US,
            "last_s": one.last_us / SECOND_US,
            "total_s": one.total_us / SECOND_US,
            "share": round(one.share, 4),
            "scenes": one.scenes,
            "longest_s": one.longest_us / SECOND_US,
            "peak": round(one.peak, 4),
        }
        for one in found
    ]
    write_rows(rows, numbered(FIND, rows, form), form, [job.notice, *lacking])
    if not rows:
        say(f"no video of job {job.id} shows it")
    return ExitCode.OK


@click.command(
    epilog="""\b
Examples:
  nightreel flags
  nightreel flags upload.mp4 --job 1 && publish upload.mp4
  nightreel flags --format jsonl > review.jsonl

Ends with 4 where anything is flagged, with 3 where nothing is and some video was not all analysed
or some file not read yet, with 0 where everything was analysed and nothing is flagged. A job
without a label that can raise a flag ends with 2. The latest job may be one of other labels
(`relabel`): a script names its job with --job."""
)
@click.argument("video", required=False)
@job_option
@database_option
@format_option
def flags(video: str | None, job_id: int | None, database_url: str, form: str) -> int:
    """What labels with a threshold have raised: time range, reason, confidence; worst first.

    VIDEO is a path, a file name or an id; without it all videos are asked about.
    """
    from storage.flags import flagged
    from storage.summaries import places

    engine, job = job_asked(database_url, job_id)
    only = videos_asked(engine, job, video)
    lacking = unseen(engine, job, only)
    paths = places(engine, job.id)
    rows = [
        {
            "video_id": one.video_id,
            "video": paths[one.video_id],
            "start_s": one.start_us / SECOND_US,
            "end_s": one.end_us / SECOND_US,
            "reason": one.reason,
            "label": one.label,
            "peak": round(one.peak, 4),
            "confidence": round(one.confidence, 4),
            "samples": one.samples,
        }
        for one in flagged(engine, job.id, only)
    ]
    write_rows(rows, numbered(FLAGS, rows, form), form, [job.notice, *lacking])
    if rows:
        return ExitCode.FLAGGED
    say("nothing is flagged" + " in what was seen" * bool(lacking))
    return ExitCode.INCOMPLETE if lacking else ExitCode.OK


@click.command(
    epilog="""\b
Examples:
  nightreel highlights --label "goal celebration" --top 10 --pad 2s
  nightreel highlights match.mp4 --label goal --least 0.8 --format csv"""
)
@click.argument("video", required=False)
@click.option("--label", required=True, metavar="TEXT", help="The label whose peaks are wanted.")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="How many cuts.")
@click.option("--pad", type=Duration(), help="Time added before and after each cut.")
@click.option(
    "--least",
    type=FiniteFloat(0, 1),
    default=0.5,
    show_default=True,
    help="Only cuts with at least this confidence at their peak.",
)
@job_option
@database_option
@format_option
def highlights(  # noqa: PLR0917 - one parameter an option
    video: str | None,
    label: str,
    top: int,
    pad: Fraction | None,
    least: float,
    job_id: int | None,
    database_url: str,
    form: str,
) -> int:
    """The best moments of a label as cuts, the surest first; cuts that touch are one.

    VIDEO is a path, a file name or an id; without it the best of all videos are taken.
    """
    from storage.highlights import highlights as stored
    from storage.summaries import places

    engine, job = job_asked(database_url, job_id)
    only = videos_asked(engine, job, video)
    lacking = unseen(engine, job, only)
    pad_us = int((pad or 0) * 1_000_000)
    cuts = stored(engine, job.id, label, top=top, pad_us=pad_us, least=least, video_ids=only)
    paths = places(engine, job.id)
    rows = [
        {
            "rank": rank,
            "video_id": cut.video_id,
            "video": paths[cut.video_id],
            "start_s": cut.start_us / SECOND_US,
            "end_s": cut.end_us / SECOND_US,
            "peak_s": cut.peak_us / SECOND_US,
            "peak": round(cut.peak, 4),
            "confidence": round(cut.confidence, 4),
        }
        for rank, cut in enumerate(cuts, 1)
    ]
    write_rows(rows, numbered(HIGHLIGHTS, rows, form), form, [job.notice, *lacking])
    if not rows:
        best = stored(engine, job.id, label, top=1, least=0, video_ids=only)
        peak = f"its highest is {_share(best[0].peak)}" if best else "no frame shows it"
        say(f"no peak reaches a confidence of {_share(least)}: {peak}")
    return ExitCode.OK
