"""Job and plans into the ledger. Loads no decoder, no HTTP client and no model by itself."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from scheduler.archive import Unreadable
from scheduler.labels import check_flags
from scheduler.probing import probe_all
from storage import ledger
from storage.database import DatabaseError, with_retries
from storage.records import ArchiveFile, Fit, JobSpec, LabelSet, Sampling
from workers.probing import UNEXPECTED, Asked, Probed, register

log = logging.getLogger(__name__)

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
    name: str | None = None,
    idempotency_key: str | None = None,
) -> JobSpec:
    """Return the job that these settings ask for.

    Its key is a digest of all that decides its results and of the names as given (folders, globs,
    manifests), so that the same command finds its job again and another command is another job. An
    `idempotency_key` stands for it where it is given. Raises LabelsError where a flag could stay
    unseen with so few labels kept of a frame.
    """
    check_flags(labels, top_n)
    asked = [list(names), str(sampling), str(fit), top_n, labels.digest, model]
    request = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    key = request
    if idempotency_key is not None:
        key = f"chosen:{hashlib.sha256(idempotency_key.encode()).hexdigest()}"
    name = name or labels.name
    return JobSpec(key, name, sampling, fit, top_n, labels, model, notice, request)


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of one file."""

    video_id: int
    known: bool
    """It was in the job already, unchanged: nothing was read."""


def submit(
    engine: Engine,
    job_id: int,
    sampling: Sampling,
    files: Iterable[ArchiveFile | Unreadable],
    *,
    task_seconds: int,
    processes: int,
    stop: threading.Event,
) -> Generator[Submitted]:
    """Bring each file into the job: yield it once it is planned or rejected in the ledger.

    A file whose path, size and modification time are those of a known video is not read again,
    unless it was never sampled this way. Files are planned while earlier ones are worked on;
    nothing is planned twice, whatever interrupts this. Ends early once `stop` is set.
    """
    unknown: list[Asked] = []
    for file in files:
        if stop.is_set():
            return
        if isinstance(file, Unreadable):
            yield _reject(engine, job_id, file)
            continue
        found = _from_the_database(engine, job_id, sampling, file)
        if isinstance(found, Submitted):
            yield found
        else:
            unknown.append(found)
    task_us = task_seconds * MICROSECONDS
    for probed in probe_all(unknown, sampling, task_us, processes=processes, stop=stop):
        yield _record(engine, job_id, probed)


def _reject(engine: Engine, job_id: int, file: Unreadable) -> Submitted:
    path_raw = os.fsencode(file.path)
    return Submitted(
        with_retries(
            lambda: ledger.reject_unread(engine, job_id, path_raw, "unreadable", file.reason)
        ),
        False,
    )


def _from_the_database(
    engine: Engine, job_id: int, sampling: Sampling, file: ArchiveFile
) -> Submitted | Asked:
    """Bring a file into the job without reading it, if it is unchanged and the database knows it:
    from this job, or from another one that sampled it the same way. Else say what is to be read."""
    video_id = with_retries(lambda: ledger.known_video(engine, file))
    if video_id is None:
        return Asked(file, None)
    if with_retries(lambda: ledger.video_in_job(engine, job_id, video_id)) is not None:
        return Submitted(video_id, True)
    known = with_retries(lambda: ledger.known_plan(engine, video_id, sampling))
    if known is None:
        return Asked(file, with_retries(lambda: ledger.content_id(engine, video_id)))
    info, ranges = known
    with_retries(lambda: ledger.plan_video(engine, job_id, video_id, info, ranges))
    return Submitted(video_id, False)


def _record(engine: Engine, job_id: int, probed: Probed) -> Submitted:
    identity, info = probed.content_id, probed.info
    if identity is None:
        path_raw, kind, reason = probed.file.path_raw, probed.kind, probed.reason
        return Submitted(
            with_retries(lambda: ledger.reject_unread(engine, job_id, path_raw, kind, reason)),
            False,
        )
    video_id = register(engine, probed.file, identity)
    kind, reason = probed.kind, probed.reason
    if info is not None:
        try:
            with_retries(lambda: ledger.plan_video(engine, job_id, video_id, info, probed.ranges))
            return Submitted(video_id, False)
        except DatabaseError:
            raise
        except Exception as error:  # A plan that the ledger refuses; the run goes on.
            log.exception("%s: unexpected", probed.file.shown)
            kind, reason = UNEXPECTED, f"unexpected {type(error).__name__}: {error}"
    with_retries(lambda: ledger.reject_video(engine, job_id, video_id, kind, reason))
    return Submitted(video_id, False)
