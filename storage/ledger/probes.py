"""Files on their way to become videos of a submitted job: probed by workers, under lease as tasks
are, and planned in the transaction that ends the probe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, exists, select, update

from storage.database import reading, writing
from storage.dialect import Now
from storage.ledger.job import JobState, finish_planning_in, lock_job
from storage.ledger.leases import readable, take
from storage.ledger.planning import plan_in, reject_in, reject_unread_in
from storage.records import ArchiveFile, FrameRange, Sampling, TaskState, VideoInfo
from storage.schema import held, jobs, probes, still_open


@dataclass(frozen=True, slots=True)
class ProbeClaim:
    """A probe under lease: all that a worker needs to plan the file."""

    probe_id: int
    fence: int
    attempts: int
    """Attempts spent, this one included."""
    job_id: int
    file: ArchiveFile
    sampling: Sampling
    task_us: int


def claim_probe(engine: Engine, probe_id: int, worker: str, lease_s: float) -> ProbeClaim | None:
    """Lease the probe to this worker; None where the ledger has no use for that.

    Raises IncompatiblePlan, and leaves the probe for a worker that can read it."""
    with writing(engine) as connection:
        fence = take(connection, probes, probe_id, worker, lease_s)
        if fence is None:
            return None
        row = connection.execute(
            select(probes, jobs.c.sampling, jobs.c.task_us, jobs.c.version)
            .join(jobs, jobs.c.id == probes.c.job_id)
            .where(probes.c.id == probe_id)
        ).one()
    with readable(engine, probe_id, fence, row.version, probes):
        return ProbeClaim(
            probe_id=probe_id,
            fence=fence,
            attempts=row.attempts,
            job_id=row.job_id,
            file=ArchiveFile(os.fsdecode(row.path_raw), row.size_bytes, row.mtime_ns),
            sampling=Sampling.parse(row.sampling),
            task_us=row.task_us,
        )


def plan_probed(
    engine: Engine,
    claim: ProbeClaim,
    video_id: int,
    info: VideoInfo,
    ranges: Sequence[FrameRange],
) -> bool:
    """End the probe with the video's plan; False, and nothing is written, where the claim no
    longer holds."""
    with writing(engine) as connection:
        if not _end(connection, claim):
            return False
        plan_in(connection, claim.job_id, video_id, info, ranges)
    return True


def reject_probed(
    engine: Engine, claim: ProbeClaim, video_id: int | None, kind: str, reason: str
) -> bool:
    """End the probe with the reason why the file is none of the job's videos; `video_id` None where
    its content could not be read. False where the claim no longer holds."""
    with writing(engine) as connection:
        if not _end(connection, claim):
            return False
        if video_id is None:
            reject_unread_in(connection, claim.job_id, claim.file.path_raw, kind, reason)
        else:
            reject_in(connection, claim.job_id, video_id, kind, reason)
    return True


def end_probe(engine: Engine, claim: ProbeClaim) -> bool:
    """End the probe of a file that is in the job already; False where the claim no longer holds."""
    with writing(engine) as connection:
        return _end(connection, claim)


def _end(connection: Connection, claim: ProbeClaim) -> bool:
    ended = connection.execute(
        update(probes)
        .where(held(claim.probe_id, claim.fence, probes))
        .values(
            state=TaskState.DONE, lease_until_ms=None, done_ms=Now(), error_kind=None, error=None
        )
    )
    return ended.rowcount == 1


def finish_probed(engine: Engine) -> list[int]:
    """Finish the planning of submitted jobs of which no probe is open, and return their numbers.

    Files whose probes failed for good are rejected with the reason.
    """
    waits = exists().where(still_open(probes), probes.c.job_id == jobs.c.id)
    with reading(engine) as connection:
        found = connection.scalars(
            select(jobs.c.id).where(
                jobs.c.submitted,
                ~jobs.c.planning_finished,
                jobs.c.state == JobState.RUNNING,
                ~waits,
            )
        ).all()
    return [job_id for job_id in found if _finish(engine, job_id)]


def _finish(engine: Engine, job_id: int) -> bool:
    """Finish the job's planning unless files were added to it meanwhile."""
    with writing(engine) as connection:
        lock_job(connection, job_id)
        added = exists().where(still_open(probes), probes.c.job_id == job_id)
        if connection.scalar(select(added)):
            return False
        failed = connection.execute(
            select(probes.c.path_raw, probes.c.error_kind, probes.c.error).where(
                probes.c.job_id == job_id, probes.c.state == TaskState.FAILED
            )
        ).all()
        for row in failed:
            reject_unread_in(connection, job_id, row.path_raw, row.error_kind, row.error)
        finish_planning_in(connection, job_id)
    return True
