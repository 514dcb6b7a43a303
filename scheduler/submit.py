"""Job and plans into the ledger. Loads no decoder, no HTTP client and no model by itself."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from scheduler.archive import Unreadable
from scheduler.probing import Asked, Probed, probe_all
from storage import ledger
from storage.database import with_retries
from storage.records import ArchiveFile, Fit, JobSpec, LabelSet, Sampling

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
            yield _reject_unread(engine, job_id, file.path, "unreadable", file.reason)
            continue
        found = _from_the_database(engine, job_id, sampling, file)
        if isinstance(found, Submitted):
            yield found
        else:
            unknown.append(found)
    task_us = task_seconds * MICROSECONDS
    for probed in probe_all(unknown, sampling, task_us, processes=processes, stop=stop):
        yield _record(engine, job_id, probed)


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
        return _reject_unread(engine, job_id, probed.file.path, probed.kind, probed.reason)
    video_id = with_retries(lambda: ledger.register_file(engine, probed.file, identity))
    _forget_where_it_was(engine, video_id)
    if info is None:
        with_retries(
            lambda: ledger.reject_video(engine, job_id, video_id, probed.kind, probed.reason)
        )
    else:
        with_retries(lambda: ledger.plan_video(engine, job_id, video_id, info, probed.ranges))
    return Submitted(video_id, False)


def _forget_where_it_was(engine: Engine, video_id: int) -> None:
    """A moved file lies at one place: the name it had before is no copy."""
    known = with_retries(lambda: ledger.places(engine, video_id))
    gone = [name for name in known if not os.path.lexists(name)]
    if gone and len(gone) < len(known):
        with_retries(lambda: ledger.forget_places(engine, video_id, gone))


def _reject_unread(engine: Engine, job_id: int, path: str, kind: str, reason: str) -> Submitted:
    """Reject a file whose content, and so its identity, is unknown. It stands under its name, with
    a size no file has, so that every run looks at it anew."""
    file = ArchiveFile(path, -1, -1)
    named = hashlib.sha256(file.path_raw).hexdigest()
    video_id = with_retries(lambda: ledger.register_file(engine, file, f"unread:{named}"))
    with_retries(lambda: ledger.reject_video(engine, job_id, video_id, kind, reason))
    return Submitted(video_id, False)
