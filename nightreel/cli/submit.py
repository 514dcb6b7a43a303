"""`nightreel submit`: a job for the workers of many machines."""

from __future__ import annotations

import os

import click

from nightreel.cli.options import database_option, format_option
from nightreel.cli.output import Column, say, write_rows
from nightreel.cli.request import Request, farm_request_options
from storage.exits import ExitCode

SUBMITTED = (
    Column("job", "Job", justify="right"),
    Column("name", "Name"),
    Column("tag", "Tag"),
    Column("priority", "Priority", justify="right"),
    Column("new", "New", lambda new: "yes" if new else "no"),
    Column("files", "Files", justify="right"),
    Column("model", "Model"),
)


def _one_line(_: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is not None and not text.isprintable():
        raise click.BadParameter("printable characters on one line are expected.", param=option)
    return text


@click.command(
    epilog="""\b
Examples:
  nightreel submit /archive/2024 --labels weather.yaml --every 2s --tag seasons
  nightreel submit /archive/incoming --labels moderation.yaml --priority 5 \\
      --idempotency-key nightly-2024-11-22 --notify https://example.org/hooks/nightreel
  nightreel status --wait

The same command again, or the same key, is the same job: it adds new and changed files only.""",
)
@farm_request_options
@click.option(
    "--top",
    "top_n",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Labels kept for each frame, best first.",
)
@click.option(
    "--name",
    metavar="TEXT",
    callback=_one_line,
    help="Name of the job.  [default: that of its labels]",
)
@click.option(
    "--tag",
    metavar="TEXT",
    callback=_one_line,
    help="A word to find the job by: a project, a client.",
)
@click.option(
    "--priority",
    type=click.IntRange(-9, 9),
    default=None,
    help="Each step doubles the job's share of the workers; no job starves.  [default: 0]",
)
@click.option(
    "--idempotency-key",
    metavar="TEXT",
    help="Submitting twice under one key is one job, whatever was lost in between.",
)
@click.option(
    "--notify",
    "notify_url",
    metavar="URL",
    help="Address that is sent a signed JSON message when the job ends.",
)
@click.option(
    "--max-calls",
    type=click.IntRange(1),
    default=None,
    help="Calls that the API may bill from now on; then the job pauses until it is resumed.",
)
@database_option
@format_option
def submit(  # noqa: PLR0917 - one parameter an option
    request: Request,
    top_n: int,
    name: str | None,
    tag: str | None,
    priority: int | None,
    idempotency_key: str | None,
    notify_url: str | None,
    max_calls: int | None,
    database_url: str,
    form: str,
) -> int:
    """Record a job for the workers of a farm and return at once.

    PATH is a folder, a file, a glob, @FILE (a manifest, one path a line) or - (a manifest on
    standard input), named as the workers see it. Workers read and plan the files; the scheduler
    (`nightreel scheduler`) feeds them. Prints the job.
    """
    from scheduler.archive import Unreadable
    from scheduler.settings import SchedulerSettings
    from scheduler.submit import MICROSECONDS, job_spec
    from storage import database, ledger
    from storage.records import ArchiveFile, Fit

    if idempotency_key is not None and not idempotency_key.strip():
        raise click.BadParameter(
            "a blank one is no key: an unset variable of a script would make all its jobs one.",
            param_hint="--idempotency-key",
        )
    if notify_url is not None:
        _check_address(notify_url)
    sampling = request.sampling()
    results = database.connect(database_url)
    database.check(results)
    served = request.served()
    labels = request.labels(served.input_size)
    files = request.files()
    request.check_labels(labels)
    spec = job_spec(
        names=request.names,
        sampling=sampling,
        fit=Fit(request.fit),
        top_n=top_n,
        labels=labels,
        model=served.model,
        notice=served.notice,
        name=name,
        idempotency_key=idempotency_key,
    )
    listed = [file for file in files if isinstance(file, ArchiveFile)]
    unreadable = {
        os.fsencode(file.path): file.reason for file in files if isinstance(file, Unreadable)
    }
    task_us = SchedulerSettings().task_seconds * MICROSECONDS
    job = database.with_retries(
        lambda: ledger.open_job(
            results,
            spec,
            priority=priority,
            tag=tag,
            notify_url=notify_url,
            task_us=task_us,
            max_calls=max_calls,
            files=listed,
            unreadable=unreadable,
        )
    )
    row = {
        "job": job.id,
        "name": job.name,
        "tag": job.tag,
        "priority": job.priority,
        "new": job.created,
        "files": len(files),
        "model": job.model,
    }
    write_rows([row], SUBMITTED, form)
    if job.state is ledger.JobState.PAUSED:
        more = " --max-calls N" if job.pause_kind == ledger.BUDGET_SPENT else ""
        say(f"job {job.id} is paused ({job.pause_kind}): `nightreel resume {job.id}{more}` goes on")
    return ExitCode.OK


def _check_address(url: str) -> None:
    from scheduler.notify import check_url

    try:
        check_url(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--notify") from None
