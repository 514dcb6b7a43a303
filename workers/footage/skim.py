"""MP4 and QuickTime files read without their pictures.

Such a file's tables tell all about its packets but what is in them. So the demuxer is given a file
whose media data are zeros that cost no reading, and gives the very packets that it gives otherwise,
with the same timestamps, durations, marks and sizes: planning a video on network storage transfers
its tables and a few kilobytes a keyframe. (Box layout: ISO/IEC 14496-12, 4.2 and 8.1.)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.index import IndexEntries

Extent = tuple[int, int]
"""Offsets [start, end) of bytes in a file."""

BUFFER_BYTES = 2**18
"""Bytes that the demuxer asks for at a time; zeros cost less by the large piece."""

_FIRST_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"))
_MOST_BOXES = 4096
_LARGEST_PACKET = 2**29
"""Bytes above which a size in a table is damage and promises nothing: those of an uncompressed
picture of the largest size that is opened, with four channels of 16 bits."""
_OPEN_END = 2**61
_ENTRIES_A_BEAT = 100_000
_NEVER = -(2**63)
_LATE, _LATE_BYTES = 1024, 2**30
"""Entries at the end of a table, and their bytes, among which the last one that is presented is."""
_ZEROS = bytes(BUFFER_BYTES)


def media_extents(path: str) -> list[Extent] | None:
    """Where the media data of an MP4 or QuickTime file lie, ascending, or would if it were whole.

    None for other files, and for those whose tables do not stand in one whole `moov` box:
    fragmented and damaged ones. Raises OSError.
    """
    extents = _extents(path)
    return None if extents is None else extents[1]


def tables_extent(path: str) -> Extent | None:
    """Where the tables of a file lie whose media data `media_extents` finds; None for others.

    Raises OSError.
    """
    extents = _extents(path)
    return None if extents is None else extents[0]


def lacks_tables(path: str) -> bool:
    """Whether the tables of a file go on beyond its end. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return any(kind == b"moov" and end > size for kind, _start, end in _outer_boxes(file))


def _extents(path: str) -> tuple[Extent, list[Extent]] | None:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        boxes = _outer_boxes(file)
        kinds = [kind for kind, _start, _end in boxes]
        if kinds.count(b"moov") != 1 or b"moof" in kinds:
            return None
        _kind, start, end = boxes[kinds.index(b"moov")]
        inside = _boxes(file.fileno(), start, end) if end <= size else []
        if not inside or any(kind == b"mvex" for kind, _start, _end in inside):
            return None
        media = [(start, end) for kind, start, end in boxes if kind == b"mdat"]
        return (start, end), media


def _outer_boxes(file: FileIO) -> list[tuple[bytes, int, int]]:
    if os.pread(file.fileno(), 8, 0)[4:] not in _FIRST_BOXES:
        return []
    return _boxes(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _boxes(descriptor: int, at: int, end: int) -> list[tuple[bytes, int, int]]:
    """Kind and content of the boxes that follow each other there; none where they do not."""
    boxes: list[tuple[bytes, int, int]] = []
    while at + 8 <= end:
        head = os.pread(descriptor, 16, at)
        length, kind, content = int.from_bytes(head[:4], "big"), head[4:8], at + 8
        if length == 1:
            length, content = int.from_bytes(head[8:16], "big"), at + 16
        elif length == 0:
            # Up to the end of the file, which of one that is cut off nothing tells.
            length = (_OPEN_END if kind == b"mdat" else end) - at
        if at + length < content or len(boxes) == _MOST_BOXES:
            return []
        boxes.append((kind, content, at + length))
        at += length
    return boxes


@dataclass(frozen=True, slots=True)
class Promise:
    """What a stream's table tells of its packets, be they in the file or beyond its end."""

    end: int = 0
    """Offset at which the last of them in the file's order ends."""
    held_until: int = _NEVER
    """Decoding timestamp of the latest one that the file holds."""
    between: int = 0
    """Bytes of those beyond the end that are followed by one that the file holds."""
    late: int = 0
    """Decoding timestamp of one of the last."""


def promised(table: IndexEntries, size: int, beat: Callable[[], None]) -> Promise:
    """What a table promises of a file of that size; `beat` is called now and then."""
    end, until, between, row = 0, _NEVER, 0, 0
    for number, entry in enumerate(table):
        if number % _ENTRIES_A_BEAT == 0:
            beat()
        if entry.size > _LARGEST_PACKET:
            continue
        reach = entry.pos + entry.size
        end = max(end, reach)
        if reach <= size:
            until = max(until, entry.timestamp)
            between, row = between + row, 0
        else:
            row += entry.size
    return Promise(end, until, between, _late(table))


def _late(table: IndexEntries) -> int:
    late = total = 0
    for entry in reversed(table[-_LATE:]):
        total += entry.size
        if total > _LATE_BYTES:
            break
        late = entry.timestamp
    return late


class SkimmedFile:
    """A file as PyAV reads one: all of it, until `skip` says what of it is not needed."""

    name = "skimmed"

    def __init__(self, path: str, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called for every read. Raises OSError."""
        self.promised: Callable[[], int] = lambda: 0
        """Gives the offset up to which a file that is cut off goes on as zeros; it is asked where
        reading comes to the file's end."""
        self._beat = beat
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 -- closed by `close`
        self._descriptor = self._file.fileno()
        self._size = os.fstat(self._descriptor).st_size
        self._at = 0
        self._real: list[Extent] = [(0, self._size)]
        self._starts = [0]

    def skip(self, media: Iterable[Extent], but: Iterable[Extent]) -> None:
        """From now on, give zeros for the media data except for the extents `but`."""
        real = list(but)
        at = 0
        for start, end in media:
            real.append((at, start))
            at = end
        real.append((at, self._size))
        self._real = sorted(extent for extent in real if extent[0] < extent[1])
        self._starts = [start for start, _end in self._real]
        if hasattr(os, "posix_fadvise"):
            # Reading ahead would bring what is not needed.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, count: int) -> bytes:
        """At most `count` of the next bytes, real or zeros; none at the end."""
        try:
            self._beat()
        except BaseException as stop:
            # FFmpeg calls this, and PyAV hands on no other exceptions.
            raise InterruptedError("nobody waits for it any more") from stop
        start = self._at
        size = self._size if start < self._size else self._promised_size()
        end = self._at = max(start, min(start + min(count, BUFFER_BYTES), size))
        first = max(0, bisect_right(self._starts, start) - 1)
        parts: dict[int, bytes] = {}
        for real_start, real_end in self._real[first:]:
            if real_start >= end:
                break
            low, high = max(start, real_start), min(end, real_end)
            if low < high:
                parts[low] = os.pread(self._descriptor, high - low, low)
        if not parts:
            return _ZEROS[: end - start]
        if len(parts) == 1 and len(parts.get(start, b"")) == end - start:
            return parts[start]
        piece = bytearray(end - start)
        for low, data in parts.items():
            piece[low - start : low - start + len(data)] = data
        return bytes(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence)
        if base is None:
            base = self._promised_size()
        if base + offset < 0:
            raise ValueError("before the beginning of the file")
        self._at = base + offset
        return self._at

    def _promised_size(self) -> int:
        return max(self._size, self.promised())

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._at

    def close(self) -> None:
        """Give the file back."""
        # Whoever answers holds this file, and with it a decoder's pictures.
        self.promised = lambda: 0
        self._file.close()
