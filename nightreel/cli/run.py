"""`nightreel run`: the whole job on one machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from nightreel.cli.options import FiniteFloat, database_option, format_option
from nightreel.cli.request import Request, request_options
from storage.exits import ExitCode

if TYPE_CHECKING:
    from storage.records import JobSpec


@click.command(
    epilog="""\b
Examples:
  nightreel run ~/Videos
  nightreel run a.mp4 b.mkv --label "construction site" --label "open field" --every 2s
  nightreel run archive/ --labels labels.yaml --db postgresql://me@db/nightreel
  find /archive -name '*.mp4' -print0 | nightreel run -

The same command resumes what was interrupted and adds new and changed files only.""",
)
@request_options
@click.option(
    "--top",
    "top_n",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Labels kept for each frame, best first.",
)
@database_option
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=None,
    help="Worker processes.  [default: one a core]",
)
@click.option(
    "--max-rps",
    envvar="NIGHTREEL_API_MAX_RPS",
    type=FiniteFloat(0.1, 100_000),
    default=None,
    help="Most requests a second to the API, of all workers together.",
)
@click.option(
    "--max-calls",
    type=click.IntRange(1),
    default=None,
    help="Calls that the API may bill for this run; then it stops, and the same command goes on.",
)
@format_option
def run(  # noqa: PLR0917 - one parameter an option
    request: Request,
    top_n: int,
    database_url: str,
    workers: int | None,
    max_rps: float | None,
    max_calls: int | None,
    form: str,
) -> int:
    """Classify the scenes of videos on this machine.

    PATH is a folder, a file, a glob, @FILE (a manifest, one path a line) or - (a manifest on
    standard input). Broker, API, workers and scheduler are started for the run and ended with it.
    Prints one row a video: duration, analysed, scenes, top labels with their share of time.
    """
    from nightreel.cli.answers import write_summary
    from nightreel.cli.output import say
    from nightreel.running import BudgetReached, Run
    from scheduler.submit import job_spec
    from storage import database, duplicates, ledger
    from storage.records import Fit
    from workers.settings import QueueSettings

    sampling = request.sampling()
    served = request.served()
    labels = request.labels(served.input_size)
    files = request.files()
    request.check_labels(labels)
    results = database.connect(database_url)
    for revision in database.upgrade(results):
        say(f"database: schema {revision} applied")
    spec = job_spec(
        names=request.names,
        sampling=sampling,
        fit=Fit(request.fit),
        top_n=top_n,
        labels=labels,
        model=served.model,
        notice=served.notice,
    )
    job = ledger.open_job(results, spec)
    ledger.set_budget(results, job.id, max_calls)
    say(_opening(job.id, job.created, len(files), spec))
    if served.notice:
        say(f"NOTE: {served.notice}")
    one_run = Run(
        engine=results,
        job_id=job.id,
        sampling=sampling,
        database_url=database.absolute_url(results),
        workers=_workers(workers, max_rps),
        api_engine=served.engine,
        api_url=request.api_url,
        max_rps=max_rps,
        broker_url=QueueSettings().address() if os.environ.get("NIGHTREEL_BROKER_URL") else None,
    )
    try:
        one_run.carry_out(files)
    except BudgetReached as reached:
        say(str(reached))
        write_summary(results, job, form, one_run.video_ids)
        return ExitCode.INCOMPLETE
    if sampling.skip_duplicates:
        say(str(duplicates.skipped(results, job.id)))
    return write_summary(results, job, form, one_run.video_ids)


def _workers(asked: int | None, max_rps: float | None) -> int:
    """Workers that share a slow rate would each take too long for one range: a call a second is the
    least that one is worth."""
    workers = asked or os.cpu_count() or 1
    return workers if max_rps is None else max(1, min(workers, int(max_rps)))


def _opening(job_id: int, created: bool, files: int, spec: JobSpec) -> str:
    verb = "new" if created else "known"
    return (
        f"job {job_id} ({verb}): {files} file{'s' * (files != 1)}, labels {spec.labels.name} "
        f"({len(spec.labels.labels)}), sampling {spec.sampling}, model {spec.model}"
    )
