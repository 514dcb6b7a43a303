"""One file on its way into a job: what it is, what it holds, how it is cut into ranges.

Loads no decoder by itself, so that whoever lists an archive need not have one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from sqlalchemy import Engine

from storage import ledger
from storage.database import outlasting
from storage.ledger import ProbeClaim
from storage.records import (
    ArchiveFile,
    FrameRange,
    Sampling,
    VideoInfo,
    VideoState,
    shown_path,
)
from workers.footage.skim import tables_extent
from workers.footage.watchdog import Stalled, watched

log = logging.getLogger(__name__)

UNREADABLE = "unreadable"
"""Kind of a file whose bytes cannot be had: a fault of the place, not of the file."""
UNEXPECTED = "unexpected"
"""Kind of a file that met a fault of this program."""

STALL_S = 120.0
"""Seconds without any progress after which a probe ends: more than the minute that FFmpeg may look
for a header."""

_HASHED_WHOLE_BYTES = 64 * 2**20
"""Up to here an MP4 is hashed whole."""
_BLOCKS, _BLOCK_BYTES = 512, 2**15
"""How many blocks of a larger one are hashed, evenly spaced, and how long each is."""
_SAMPLED = b"size, tables and 512 blocks"
_READ_BYTES = 2**18


class FileUnreadable(Exception):
    """The file cannot be read here and now; another worker, or a later try, may read it."""

    def __init__(self, reason: str, path: str | None) -> None:
        super().__init__(reason)
        self.folder_missing = path is not None and not os.path.isdir(os.path.dirname(path))
        """Not the file alone: the archive may not be mounted on this host."""


class FileReplaced(FileUnreadable):
    """Other files lie wherever the video was seen, and no later try will find it."""

    def __init__(self) -> None:
        super().__init__(
            "another file lies where the video was seen last; run or submit it again", None
        )


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


def content_id(path: str, beat: Callable[[], None] = lambda: None) -> str:
    """Return a SHA-256 in hex, the identity of a video wherever it lies, from its bytes alone.

    Of all its bytes, because results are kept for years under this name; but of an MP4 above
    64 MiB whose index is read without its pictures, of its size, its tables and evenly spaced
    blocks, its ends among them. `beat` is called at every step. Raises OSError.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        tables = tables_extent(path) if size > _HASHED_WHOLE_BYTES else None
        digest = hashlib.sha256()
        extents = [(0, size)]
        if tables is not None:
            # What is said of some bytes is never what is said of all.
            digest.update(b"%b\0%d\0%d\0" % (_SAMPLED, size, tables[1] - tables[0]))
            last = size - _BLOCK_BYTES
            starts = (last * number // (_BLOCKS - 1) for number in range(_BLOCKS))
            extents = [tables, *((start, start + _BLOCK_BYTES) for start in starts)]
            if hasattr(os, "posix_fadvise"):
                # Reading ahead would bring what is not needed.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for piece in _pieces(descriptor, extents):
            beat()
            digest.update(piece)
    return digest.hexdigest()


def archive_file(path: str) -> ArchiveFile:
    """The file as it is now. Raises OSError."""
    found = os.stat(path)
    return ArchiveFile(path, found.st_size, found.st_mtime_ns)


def _pieces(descriptor: int, extents: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    for start, end in extents:
        at = start
        while at < end and (piece := os.pread(descriptor, min(end - at, _READ_BYTES), at)):
            yield piece
            at += len(piece)


def probe_and_plan(
    asked: Asked, sampling: Sampling, task_us: int, *, stall_s: float = STALL_S
) -> Probed:
    """Hash, index and plan one file. Never raises for what the file is, and ends where its storage
    or FFmpeg makes no progress for `stall_s` seconds."""
    # What follows loads FFmpeg.
    from workers.footage.plan import plan  # noqa: PLC0415
    from workers.footage.probe import Rejected, probe  # noqa: PLC0415

    file, identity = asked.file, asked.content_id

    def found(beat: Callable[[], None]) -> Iterator[Probed]:
        nonlocal file, identity
        try:
            if identity is None:
                # It may have been listed hours ago; what is hashed is what lies there now.
                file = archive_file(file.path)
                identity = content_id(file.path, beat)
            info, index = probe(file.path, beat)
            yield Probed(file, identity, info, tuple(plan(info, index, sampling, task_us)))
        except Rejected as error:
            yield Probed(file, identity, None, (), str(error.kind), str(error))
        except OSError as error:
            yield Probed(file, identity, None, (), UNREADABLE, f"cannot be read: {error.strerror}")
        except Exception as error:  # A hostile file finds what nobody foresaw; the run goes on.
            log.exception("%s: unexpected", shown_path(os.fsencode(file.path)))
            reason = f"unexpected {type(error).__name__}: {error}"
            yield Probed(file, identity, None, (), UNEXPECTED, reason)

    try:
        with closing(watched(found, stall_s)) as results:
            return next(results)
    except Stalled:
        reason = f"reading made no progress for {stall_s:g} s; check the storage"
        return Probed(file, identity, None, (), UNREADABLE, reason)


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
