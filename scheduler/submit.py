"""Job and plans into the ledger. Loads no decoder, no HTTP client and no model by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from scheduler.archive import Unreadable
from scheduler.probing import Probed, probe_all
from storage import ledger
from storage.records import ArchiveFile, Fit, JobSpec, LabelSet, Sampling, VideoState

MICROSECONDS = 1_000_000


def job_spec(
    *,
    names: Sequence[str],
    sampling: Sampling,
    fit: Fit,
    top_n: int,
    labels: LabelSet,
    model: str,
    notice: str | None,
) -> JobSpec:
    """Return the job that these settings ask for.

    Its key is a digest of all that decides its results and of the names as given (folders, globs,
    manifests), so that the same command finds its job again and another command is another job.
    """
    asked = [list(names), str(sampling), str(fit), top_n, labels.digest, model]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return JobSpec(key, labels.name, sampling, fit, top_n, labels, model, notice)


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of one file."""

    file: ArchiveFile | Unreadable
    video_id: int | None
    """None for a file that could not even be looked at."""
    known: bool
    """It was in the job already, unchanged: nothing was read."""
    reason: str = ""
    """Why it was rejected; empty where it was planned."""


def submit(
    engine: Engine,
    job_id: int,
    sampling: Sampling,
    files: Iterable[ArchiveFile | Unreadable],
    *,
    task_seconds: int,
    processes: int,
) -> Iterator[Submitted]:
    """Bring each file into the job: yield it once it is planned or rejected in the ledger.

    A file whose path, size and modification time are those of a video of the job is not read
    again. Files are planned while earlier ones are worked on; nothing is planned twice, whatever
    interrupts this.
    """
    unknown: list[ArchiveFile] = []
    for file in files:
        if isinstance(file, Unreadable):
            yield Submitted(file, None, False, file.reason)
            continue
        video_id = ledger.known_video(engine, file)
        if video_id is not None and ledger.video_in_job(engine, job_id, video_id) is not None:
            yield Submitted(file, video_id, True)
        else:
            unknown.append(file)
    task_us = task_seconds * MICROSECONDS
    for probed in probe_all(unknown, sampling, task_us, processes):
        yield _record(engine, job_id, probed)


def _record(engine: Engine, job_id: int, probed: Probed) -> Submitted:
    video_id = ledger.register_file(engine, probed.file, probed.content_id)
    if probed.info is None:
        ledger.reject_video(engine, job_id, video_id, probed.kind, probed.reason)
        return Submitted(probed.file, video_id, False, probed.reason)
    if ledger.video_in_job(engine, job_id, video_id) in (None, VideoState.REJECTED):
        ledger.plan_video(engine, job_id, video_id, probed.info, probed.ranges)
    return Submitted(probed.file, video_id, False)
