"""`nightreel failures`: the dead letters of a job."""

from __future__ import annotations

import click

from nightreel.cli.asked import SECOND_US, job_asked
from nightreel.cli.options import database_option, format_option, job_option
from nightreel.cli.output import Column, clock, moment, say, utc, write_rows
from storage.exits import ExitCode

COLUMNS = (
    Column("video", "Video"),
    Column("lost", "What"),
    Column("start_s", "Start", clock, "right"),
    Column("end_s", "End", clock, "right"),
    Column("kind", "Kind"),
    Column("error", "Error"),
    Column("attempts", "Tries", justify="right"),
    Column("worker", "Worker"),
    Column("ended", "Given up", moment),
)


@click.command(
    epilog="""\b
Examples:
  nightreel failures                          all that the latest job has given up
  nightreel failures --reason worker-lost     ranges that have outlived their workers
  nightreel retry 3 --reason worker-lost      and another try for those"""
)
@job_option
@click.option("--reason", "kind", metavar="KIND", help="Only what was given up for this reason.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=100, show_default=True, help="Most rows."
)
@database_option
@format_option
def failures(job_id: int | None, kind: str | None, limit: int, database_url: str, form: str) -> int:
    """What a job has given up, and why: files that could not be probed, videos that were rejected
    or failed, and ranges that have spent all their tries.

    Ends with 0 whether there are rows or not; `nightreel retry` gives them another try.
    """
    from storage.failures import failures as stored

    engine, job = job_asked(database_url, job_id)
    found, more = stored(engine, job.id, kind=kind, limit=limit)
    rows = [
        {
            "video": one.path,
            "lost": str(one.lost),
            "start_s": None if one.start_us is None else one.start_us / SECOND_US,
            "end_s": None if one.end_us is None else one.end_us / SECOND_US,
            "kind": one.kind,
            "error": one.error,
            "attempts": one.attempts,
            "worker": one.worker,
            "ended": utc(one.ended_ms),
        }
        for one in found
    ]
    if not rows:
        say(f"job {job.id}: nothing failed" + (f" for {kind}" if kind else ""))
    if rows or form != "table":
        write_rows(rows, COLUMNS, form)
    if more:
        say(f"the first {limit}; there are more: --limit shows them")
    return ExitCode.OK
