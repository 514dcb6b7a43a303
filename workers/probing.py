"""One file on its way into a job: what it is, what it holds, how it is cut into ranges.

Loads no decoder by itself, so that whoever lists an archive need not have one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from sqlalchemy import Engine

from storage import ledger
from storage.database import outlasting
from storage.ledger import ProbeClaim
from storage.records import ArchiveFile, FrameRange, Sampling, VideoInfo, VideoState

UNREADABLE = "unreadable"
"""Kind of a file whose bytes cannot be had: a fault of the place, not of the file."""


class FileUnreadable(Exception):
    """The file cannot be read here and now; another worker, or a later try, may read it."""

    def __init__(self, reason: str, path: str) -> None:
        super().__init__(reason)
        self.folder_missing = not os.path.isdir(os.path.dirname(path))
        """Not the file alone: the archive may not be mounted on this host."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A file to probe."""

    file: ArchiveFile
    content_id: str | None
    """Its identity where that is known, so that it need not be hashed again."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A file's content identity, and its plan or the reason why it has none."""

    file: ArchiveFile
    content_id: str | None
    """None where the file's bytes could not be read."""
    info: VideoInfo | None
    ranges: tuple[FrameRange, ...]
    kind: str = ""
    reason: str = ""


def content_id(path: str) -> str:
    """Return the SHA-256 of the file's bytes, in hex: the identity of a video, wherever it lies.

    The whole file is hashed, because results are kept for years under this name and a sampled
    hash would take a repaired file for the damaged one. Raises OSError.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe_and_plan(asked: Asked, sampling: Sampling, task_us: int) -> Probed:
    """Hash, index and plan one file. Never raises for what the file is."""
    from workers.footage.plan import plan  # noqa: PLC0415 - what follows loads FFmpeg
    from workers.footage.probe import Rejected, probe  # noqa: PLC0415

    file, identity = asked.file, asked.content_id
    try:
        identity = identity or content_id(file.path)
        info, index = probe(file.path)
        return Probed(file, identity, info, tuple(plan(info, index, sampling, task_us)))
    except Rejected as error:
        return Probed(file, identity, None, (), str(error.kind), str(error))
    except OSError as error:
        return Probed(file, identity, None, (), UNREADABLE, f"cannot be read: {error.strerror}")


def register(engine: Engine, file: ArchiveFile, identity: str) -> int:
    """The number of the video that the file holds. A moved file lies at one place: the name it had
    before is no copy. Names below folders that this host does not have are left: another may."""
    video_id = outlasting(lambda: ledger.register_file(engine, file, identity))
    known = outlasting(lambda: ledger.places(engine, video_id))
    gone = [
        name for name in known if not os.path.lexists(name) and os.path.isdir(os.path.dirname(name))
    ]
    if gone and len(gone) < len(known):
        outlasting(lambda: ledger.forget_places(engine, video_id, gone))
    return video_id


def plan_file(engine: Engine, claim: ProbeClaim) -> bool:
    """Bring the claimed probe's file into its job, or reject it there; False where the claim was
    lost meanwhile. Raises FileUnreadable.

    A file whose path, size and modification time are those of a known video is not read again,
    unless it was rejected, or never sampled this way.
    """
    file = claim.file
    identity: str | None = None
    video_id = outlasting(lambda: ledger.known_video(engine, file))
    if video_id is not None:
        stands = outlasting(lambda: ledger.video_in_job(engine, claim.job_id, video_id))
        if stands not in (None, VideoState.REJECTED):
            return outlasting(lambda: ledger.end_probe(engine, claim))
        known = outlasting(lambda: ledger.known_plan(engine, video_id, claim.sampling))
        if known is not None:
            return outlasting(lambda: ledger.plan_probed(engine, claim, video_id, *known))
        identity = outlasting(lambda: ledger.content_id(engine, video_id))
    probed = probe_and_plan(Asked(file, identity), claim.sampling, claim.task_us)
    if probed.kind == UNREADABLE:
        raise FileUnreadable(probed.reason, file.path)
    info, kind, reason = probed.info, probed.kind, probed.reason
    found = None if probed.content_id is None else register(engine, file, probed.content_id)
    if found is None or info is None:
        return outlasting(lambda: ledger.reject_probed(engine, claim, found, kind, reason))
    ranges = probed.ranges
    return outlasting(lambda: ledger.plan_probed(engine, claim, found, info, ranges))
