"""Commands that list jobs and steer them: jobs, pause, resume, cancel, retry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import SECOND_US, job_asked, one_video
from nightreel.cli.options import JOB_ID, database_option, format_option
from nightreel.cli.output import Column, counted, duration, moment, percent, say, utc, write_rows
from storage.exits import ExitCode

if TYPE_CHECKING:
    from storage.ledger import Job

JOBS = (
    Column("job", "Job", justify="right"),
    Column("name", "Name"),
    Column("tag", "Tag"),
    Column("priority", "Priority", justify="right"),
    Column("state", "State"),
    Column("videos", "Videos", justify="right"),
    Column("duration_s", "Duration", duration, "right"),
    Column("done", "Done", percent, "right"),
    Column("created", "Created", moment),
    Column("closed", "Closed", moment),
    Column("held", "Held because"),
    Column("unreadable", "Unreadable because"),
)

job_argument = click.argument("number", type=JOB_ID, metavar="JOB")
yes_option = click.option("--yes", is_flag=True, help="Do not ask whether that is meant.")


@click.command(
    epilog="""\b
Examples:
  nightreel jobs --state running
  nightreel jobs --tag nightly --format jsonl"""
)
@click.option("--tag", help="Only jobs of this tag.")
@click.option(
    "--state", type=click.Choice(["running", "paused", "closed"]), help="Only jobs in this state."
)
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Most rows."
)
@database_option
@format_option
def jobs(tag: str | None, state: str | None, limit: int, database_url: str, form: str) -> int:
    """The jobs of this database, newest first: videos, and how much of their time is done.

    What of it is analysed and what was given up, `nightreel status JOB` tells.
    """
    from storage import database, ledger
    from storage.ledger.progress import list_jobs

    engine = database.connect(database_url)
    click.get_current_context().call_on_close(engine.dispose)
    database.check(engine)
    found, every = list_jobs(
        engine, tag=tag, state=None if state is None else ledger.JobState(state), limit=limit
    )
    rows = [
        {
            "job": one.job.id,
            "name": one.job.name,
            "tag": one.job.tag,
            "priority": one.job.priority,
            "state": str(one.job.state),
            "videos": one.videos,
            "duration_s": one.duration_us / SECOND_US,
            "done": one.done,
            "created": utc(one.job.created_ms),
            "closed": utc(one.job.closed_ms),
            "held": one.job.pause_reason or one.job.pause_kind,
            "unreadable": one.job.unreadable,
        }
        for one in found
    ]
    optional = ("tag", "priority", "held", "unreadable")
    columns = [
        column
        for column in JOBS
        if form != "table" or column.key not in optional or any(row[column.key] for row in rows)
    ]
    write_rows(rows, columns, form, [one.job.notice for one in found])
    if every > len(rows):
        say(f"{len(rows)} of {every} jobs: --limit shows more")
    return ExitCode.OK


@click.command()
@job_argument
@database_option
def pause(number: int, database_url: str) -> int:
    """Start no more work of JOB until it is resumed; what workers have begun, they end."""
    from storage import ledger
    from storage.database import with_retries
    from storage.ledger import JobState
    from storage.ledger.progress import BY_HAND

    engine, job = job_asked(database_url, number)
    if job.state is JobState.PAUSED:
        say(f"job {job.id} is paused already: {job.pause_reason}")
    elif job.state is not JobState.RUNNING:
        say(f"job {job.id} is {job.state}: there is nothing to pause")
    else:
        with_retries(lambda: ledger.pause_job(engine, job.id, BY_HAND, "paused by hand"))
        say(f"job {job.id} is paused: `nightreel resume {job.id}` goes on")
    return ExitCode.OK


@click.command()
@job_argument
@click.option(
    "--max-calls",
    type=click.IntRange(1),
    default=None,
    help="Calls that the API may bill from now on.",
)
@database_option
def resume(number: int, max_calls: int | None, database_url: str) -> int:
    """Go on with a JOB that is paused: by hand, for its budget, or because the API refused.

    With --max-calls one that runs is given that budget too.
    """
    from storage import ledger
    from storage.database import with_retries
    from storage.ledger import BUDGET_SPENT, JobState

    engine, job = job_asked(database_url, number)
    if job.state is not JobState.PAUSED:
        if max_calls is None:
            say(f"job {job.id} is {job.state}: there is nothing to resume")
        elif job.state is JobState.RUNNING:
            with_retries(lambda: ledger.set_budget(engine, job.id, max_calls))
            say(f"job {job.id} is running: {counted(max_calls, 'call')} may be billed from now on")
        else:
            raise click.UsageError(f"job {job.id} is {job.state}: it is given no calls.")
        return ExitCode.OK
    if job.pause_kind == BUDGET_SPENT and max_calls is None:
        raise click.UsageError(f"job {job.id} has spent its budget: give it more with --max-calls.")
    if max_calls is not None:
        with_retries(lambda: ledger.set_budget(engine, job.id, max_calls))
    with_retries(lambda: ledger.resume_job(engine, job.id))
    stands = ledger.status(engine, job.id)
    work = _work(stands.open_tasks, stands.open_probes)
    say(f"job {job.id} goes on: {work} open{_feeder(job)}")
    return ExitCode.OK


@click.command()
@job_argument
@yes_option
@database_option
def cancel(number: int, yes: bool, database_url: str) -> int:
    """Give up what of JOB is not done; what is done stays, and the rest becomes gaps.

    `nightreel retry JOB` opens it again.
    """
    from storage import ledger
    from storage.database import with_retries

    engine, job = job_asked(database_url, number)
    stands = ledger.status(engine, job.id)
    if stands.finished:
        say(f"job {job.id} is closed: there is nothing to cancel")
        return ExitCode.OK
    work = _work(stands.open_tasks, stands.open_probes)
    confirm(f"job {job.id}: give up {work}?", yes=yes)
    given_up = with_retries(lambda: ledger.cancel_job(engine, job.id))
    # No scheduler may be running that would do it.
    with_retries(lambda: ledger.close_finished(engine, job.id))
    say(
        f"job {job.id} is cancelled: {_work(given_up.tasks, given_up.files)} given up; what was "
        f"done stays, and `nightreel retry {job.id}` opens the rest again"
    )
    return ExitCode.OK


@click.command(
    epilog="""\b
Examples:
  nightreel retry 3
  nightreel retry 3 --reason worker-lost
  nightreel retry 3 --video holiday.mp4"""
)
@job_argument
@click.option("--reason", "kind", metavar="KIND", help="Only what failed for this reason.")
@click.option("--video", metavar="VIDEO", help="Only of this video: a path, a file name, an id.")
@database_option
def retry(number: int, kind: str | None, video: str | None, database_url: str) -> int:
    """Give what of JOB has failed or was cancelled all its tries again.

    `nightreel failures` tells what has failed and for which reason.
    """
    from storage import ledger
    from storage.database import with_retries

    engine, job = job_asked(database_url, number)
    video_id = None if video is None else one_video(engine, job, video)
    kind = kind or None  # an empty one is a script's unset variable
    again = with_retries(lambda: ledger.retry_job(engine, job.id, kind=kind, video_id=video_id))
    if again.tasks or again.files:
        say(f"job {job.id}: {_work(again.tasks, again.files)} open again{_feeder(job)}")
    else:
        chosen = f" for {kind}" * (kind is not None) + f" of {video}" * (video is not None)
        say(
            f"job {job.id}: nothing{chosen} has failed or was cancelled; "
            "what a damaged file lacks, no retry brings"
        )
    return ExitCode.OK


def confirm(question: str, *, yes: bool) -> None:
    """Return if that is meant; raise Exit if the person at the terminal says no, and UsageError
    where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: say --yes.")
    if not click.confirm(question, err=True):
        say("nothing was done")
        raise click.exceptions.Exit(ExitCode.INTERRUPTED)


def _work(tasks: int, files: int) -> str:
    """Units of work in words."""
    unread = counted(files, "unread file")
    if not files:
        return counted(tasks, "task")
    return f"{counted(tasks, 'task')} and {unread}" if tasks else unread


def _feeder(job: Job) -> str:
    """Who does the work, where no service does."""
    return "" if job.submitted else "; the `nightreel run` that began it does them"
