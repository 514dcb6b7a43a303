"""Where a video's file lies, and that it is still the file that was planned.

Results are kept for years under a video's content, so a name alone is not believed: by the time
that a range of it is read, another file may lie there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from storage.records import ArchiveFile
from workers.footage.watchdog import Stalled, watched
from workers.probing import STALL_S, FileUnreadable, archive_file, content_id

_UNSEEN = -1
"""Size in the ledger of a file that could not be read when it was listed last."""

_CLOCK_STEPS_NS = (100, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000)
"""How coarsely file systems keep and pass on the time of a change: NTFS and SMB, then those of
micro-, milli- and whole seconds, and FAT."""


def place_of(seen: Sequence[ArchiveFile], identity: str) -> ArchiveFile:
    """The file among the places where the video of this content identity was seen that still holds
    it, as it is now: of the size and modification time it was seen with, else of the same content.

    Raises FileUnreadable where it is gone from all of them, or another file lies there.
    """
    there = [(file, found) for file in seen if (found := _look(file.path)) is not None]
    for file, found in there:
        if file.size_bytes == found.size_bytes and _same_moment(file.mtime_ns, found.mtime_ns):
            return found
    # Copied, restored or touched, or seen otherwise from another host: its content tells. One of
    # another size is another, which spares hashing a recording that goes on again and again.
    for file, found in there:
        if file.size_bytes in {found.size_bytes, _UNSEEN} and _content_of(found) == identity:
            return found
    if there:
        reason = "the file changed since it was planned; run or submit it again"
        raise FileUnreadable(reason, there[0][1].path)
    latest = seen[0].path if seen else None
    raise FileUnreadable("the file is gone from every place it was known at", latest)


def _look(path: str) -> ArchiveFile | None:
    try:
        return archive_file(path)
    except OSError:
        return None


def _same_moment(one_ns: int, other_ns: int) -> bool:
    """Whether two times are one, as far as the coarser of two clocks tells."""
    return one_ns == other_ns or any(
        0 in {one_ns % step, other_ns % step} and one_ns // step == other_ns // step
        for step in _CLOCK_STEPS_NS
    )


@functools.lru_cache(maxsize=1024)  # A file of many ranges is compared once.
def _content_of(file: ArchiveFile) -> str:
    def hashed(beat: Callable[[], None]) -> Iterator[str]:
        yield content_id(file.path, beat)

    try:
        with closing(watched(hashed, STALL_S)) as results:
            return next(results)
    except OSError as error:
        raise FileUnreadable(f"cannot be read: {error.strerror}", file.path) from error
    except Stalled:
        reason = f"reading made no progress for {STALL_S:g} s; check the storage"
        raise FileUnreadable(reason, file.path) from None
