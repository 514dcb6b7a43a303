"""`nightreel status`: how one job stands."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from nightreel.cli.asked import SECOND_US, job_asked
from nightreel.cli.options import JOB_ID, database_option, format_option, job_option
from nightreel.cli.output import (
    Column,
    console,
    counted,
    duration,
    moment,
    percent,
    say,
    to_standard_output,
    utc,
    write_rows,
)
from storage.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Engine

    from storage.ledger import JobStatus

POLL_S = 0.5
POLL_SHARE = 20
"""Asking how a large job stands takes a while: at most a twentieth of the time is spent on it."""


@click.command(
    epilog="""\b
Examples:
  nightreel status                    the latest job
  nightreel status 3 --wait           until job 3 is done; the exit code says how it ended
  nightreel status 3 --json | jq .eta_s"""
)
@click.argument("number", type=JOB_ID, required=False, metavar="[JOB]")
@click.option("--wait", is_flag=True, help="Wait until the job is done, and show it moving.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; the same as --format json.")
@job_option
@database_option
@format_option
def status(  # noqa: PLR0917 - one parameter an option
    number: int | None,
    wait: bool,
    as_json: bool,
    job_id: int | None,
    database_url: str,
    form: str,
) -> int:
    """How JOB stands: videos, tasks, time, speed, calls, and what it waits for.

    With --wait the command ends when the job does: with 0 if all of it is analysed, 3 if something
    is not or its budget is spent, 12 if it is held because the API refuses. It waits on while
    somebody has paused the job. Interrupted, it ends with 130, and the job goes on.
    """
    from storage import ledger

    if None not in (number, job_id) and number != job_id:
        raise click.UsageError(f"JOB {number} beside --job {job_id}: give one of them.")
    engine, job = job_asked(database_url, number or job_id)
    code = _wait(engine, job.id) if wait else ExitCode.OK
    if code == ExitCode.INTERRUPTED:
        say(f"not waiting any more; job {job.id} goes on")
        return code
    stands = ledger.status(engine, job.id)
    form = "json" if as_json else form
    if form == "table":
        _write_card(stands)
        return code
    row = _row(stands)
    if form == "json":
        with to_standard_output():
            json.dump(row, sys.stdout, ensure_ascii=False, indent=2)
            sys.stdout.write("\n")
    else:
        write_rows([row], [Column(key, key) for key in row], form)
    return code


def _wait(engine: Engine, job_id: int) -> ExitCode:
    """Wait until the job is closed, or held by what will not pass by itself."""
    from nightreel.progress import ProgressDisplay, Snapshot
    from storage import ledger
    from storage.database import with_retries

    with ProgressDisplay() as display:
        while True:
            try:
                start = time.monotonic()
                stands = with_retries(lambda: ledger.status(engine, job_id))
                asked_s = time.monotonic() - start
                code = _end(stands)
                if code is not None:
                    return code
                display.show(
                    Snapshot(
                        stands.closed_videos,
                        stands.videos,
                        stands.closed_tasks,
                        stands.tasks,
                        stands.samples,
                        stands.covered_us,
                        stands.duration_us,
                        not stands.job.planning_finished,
                    )
                )
                time.sleep(max(POLL_S, POLL_SHARE * asked_s))
            except KeyboardInterrupt:
                return ExitCode.INTERRUPTED


def _end(stands: JobStatus) -> ExitCode | None:
    """The code that waiting for the job ends with; None as long as it goes on."""
    from storage.ledger import BUDGET_SPENT
    from storage.ledger.progress import BY_HAND

    if stands.finished:
        return ExitCode.OK if stands.complete else ExitCode.INCOMPLETE
    # What is paid for is finished and kept, and a person who paused will go on.
    if stands.held is None or stands.job.pause_kind == BY_HAND:
        return None
    if stands.workers:
        return None
    return ExitCode.INCOMPLETE if stands.job.pause_kind == BUDGET_SPENT else ExitCode.API


def _row(stands: JobStatus) -> dict[str, Any]:
    job, usage, recent = stands.job, stands.usage, stands.recent
    moving = not stands.finished
    return {
        "job": job.id,
        "name": job.name,
        "tag": job.tag,
        "priority": job.priority,
        "state": str(job.state),
        "held": stands.held,
        "held_kind": job.pause_kind,
        "planning": not job.planning_finished,
        "files_open": stands.open_probes,
        "videos": stands.videos,
        **{f"videos_{state}": count for state, count in stands.videos_by_state.items()},
        "tasks": stands.tasks,
        **{f"tasks_{state}": count for state, count in stands.tasks_by_state.items()},
        "samples": stands.samples,
        "duration_s": stands.duration_us / SECOND_US,
        "analysed_s": stands.analysed_us / SECOND_US,
        "gaps_s": stands.gap_us / SECOND_US,
        "analysed": stands.analysed_us / stands.duration_us if stands.duration_us else None,
        "times_real": round(recent.times_real, 3) if moving else None,
        "frames_per_s": round(recent.samples_per_s, 3) if moving else None,
        "tasks_per_s": round(recent.tasks_per_s, 3) if moving else None,
        "eta_s": None if stands.eta_s is None else round(stands.eta_s, 1),
        "waiting": dict(stands.waiting),
        "workers": list(stands.workers),
        "scheduler": stands.led,
        "image_calls": usage.image_calls,
        "text_calls": usage.text_calls,
        "bytes_sent": usage.bytes_sent,
        "api_s": usage.api_seconds,
        "decode_s": usage.decode_seconds,
        "max_calls": stands.max_calls,
        "calls_left": stands.calls_left,
        "model": job.model,
        "sampling": job.sampling_text,
        "fit": job.fit_text,
        "unreadable": job.unreadable,
        "created": utc(job.created_ms),
        "opened": utc(job.opened_ms),
        "closed": utc(job.closed_ms),
        "notice": job.notice,
    }


def _write_card(stands: JobStatus) -> None:
    from rich.table import Table
    from rich.text import Text

    card = Table.grid(padding=(0, 2))
    card.add_column(style="dim")
    card.add_column(overflow="fold")
    for title, text in _lines(stands):
        card.add_row(title, Text(text))
    with to_standard_output():
        shown = console()
        shown.print(Text(_headline(stands), style="bold"))
        shown.print(card)
        if stands.job.notice:
            shown.print(Text(f"NOTE: {stands.job.notice}", style="bold yellow"))


def _headline(stands: JobStatus) -> str:
    job = stands.job
    tagged = f", tag {job.tag}" if job.tag else ""
    first = f", priority {job.priority}" if job.priority else ""
    return f"Job {job.id}: {job.name}, {job.state}{tagged}{first}"


def _lines(stands: JobStatus) -> Iterator[tuple[str, str]]:
    job, usage, recent = stands.job, stands.usage, stands.recent
    if stands.held is not None:
        yield "Held", stands.held
    if job.unreadable is not None:
        yield "Unreadable", job.unreadable
    if stands.open_probes or not job.planning_finished:
        yield "Planning", f"{counted(stands.open_probes, 'file')} still to be read"
    yield "Videos", _counts(stands.closed_videos, stands.videos, stands.videos_by_state)
    yield "Tasks", _counts(stands.closed_tasks, stands.tasks, stands.tasks_by_state)
    yield "Time", _time(stands)
    if not stands.finished:
        left = "" if stands.eta_s is None else f"; {duration(stands.eta_s)} left"
        yield (
            "Speed",
            f"{recent.times_real:,.1f}x real time, {recent.samples_per_s:,.1f} frames/s, "
            f"{recent.tasks_per_s:,.2f} tasks/s{left}",
        )
        names = ", ".join(stands.workers[:5]) + (", ..." if len(stands.workers) > 5 else "")
        yield "Workers", f"{len(stands.workers)} at work{': ' if names else ''}{names}"
        if job.submitted and not stands.led:
            yield "Scheduler", "none is running: start `nightreel scheduler`"
    if stands.waiting:
        yield "Waiting for", ", ".join(f"{kind} ({n:,})" for kind, n in stands.waiting.items())
    left = "" if stands.calls_left is None else f"; {stands.calls_left:,} of the budget left"
    yield (
        "API",
        f"{usage.image_calls:,} image calls, {usage.text_calls:,} text calls, "
        f"{usage.bytes_sent / 1e6:,.1f} MB sent{left}",
    )
    yield "Frames", f"{stands.samples:,} by {job.sampling_text}, {job.fit_text}, {job.model}"
    closed = f", closed {moment(utc(job.closed_ms))}" if job.closed_ms else ""
    yield "Since", f"{moment(utc(job.created_ms))}{closed}"


def _counts(closed: int, every: int, by_state: Mapping[Any, int]) -> str:
    states = ", ".join(f"{count:,} {state}" for state, count in by_state.items() if count)
    return f"{closed:,} of {every:,} closed" + (f": {states}" if states else "")


def _time(stands: JobStatus) -> str:
    if not stands.duration_us:
        return "none yet"
    total_s, gaps_s = stands.duration_us / SECOND_US, stands.gap_us / SECOND_US
    text = f"{percent(stands.analysed_us / stands.duration_us)} of {duration(total_s)} analysed"
    return f"{text}, {duration(gaps_s)} given up" if gaps_s else text
