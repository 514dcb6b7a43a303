"""Commands about jobs: status."""

from __future__ import annotations

import click

from nightreel.cli.options import database_option, format_option, job_option
from nightreel.cli.output import Column, duration, percent, write_rows
from storage.exits import ExitCode

STATUS = (
    Column("job", "Job", justify="right"),
    Column("name", "Labels"),
    Column("state", "State"),
    Column("model", "Model"),
    Column("sampling", "Sampling"),
    Column("videos", "Videos", justify="right"),
    Column("complete", "Complete", justify="right"),
    Column("partial", "Partial", justify="right"),
    Column("rejected", "Rejected", justify="right"),
    Column("failed", "Failed", justify="right"),
    Column("tasks", "Tasks", justify="right"),
    Column("tasks_done", "Done", justify="right"),
    Column("samples", "Frames", justify="right"),
    Column("duration_s", "Duration", duration, "right"),
    Column("analysed", "Analysed", percent, "right"),
    Column("image_calls", "Image calls", justify="right"),
    Column("held", "Held because"),
)


@click.command()
@job_option
@database_option
@format_option
def status(job_id: int | None, database_url: str, form: str) -> int:
    """Show how jobs stand: one row a job, newest first, or the one job asked for."""
    from storage import database, ledger
    from storage.records import VideoState

    engine = database.connect(database_url)
    database.check(engine)
    jobs = ledger.jobs(engine) if job_id is None else [ledger.get_job(engine, job_id)]
    shown = (VideoState.COMPLETE, VideoState.PARTIAL, VideoState.REJECTED, VideoState.FAILED)
    rows = []
    for job in jobs:
        stands = ledger.status(engine, job.id)
        rows.append(
            {
                "job": job.id,
                "name": job.name,
                "state": str(job.state),
                "model": job.model,
                "sampling": str(job.sampling),
                "videos": stands.videos,
                **{str(state): stands.videos_by_state[state] for state in shown},
                "tasks": stands.tasks,
                "tasks_done": stands.closed_tasks,
                "samples": stands.samples,
                "duration_s": stands.duration_us / 1e6,
                "analysed": stands.analysed_us / stands.duration_us if stands.duration_us else None,
                "image_calls": stands.usage.image_calls,
                "held": stands.held,
            }
        )
    columns = [
        c for c in STATUS if form != "table" or c.key != "held" or any(r["held"] for r in rows)
    ]
    write_rows(rows, columns, form, [job.notice for job in jobs])
    return ExitCode.OK
