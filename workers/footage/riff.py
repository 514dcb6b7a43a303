"""What lies in an AVI file: its chunks, and the index that it has of them, which FFmpeg does not
find where bytes were cut out. (Chunks and `idx1`: RIFF, Microsoft's AVI RIFF File Reference; `indx`
and `ix`: OpenDML AVI File Format Extensions 1.02.)"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.footage.sample import Flags, Ints

HEAD_BYTES = 8
INDEX = b"idx1"
"""The name of the index at the end."""
_LISTS = (b"RIFF", b"LIST")
_LIST_NAME_BYTES = 4
_NAMES = re.compile(rb"\d\d(dc|db|wb|pc|tx|sb)|ix\d\d|RIFF|LIST|JUNK|idx1")
"""Pictures, packed or not, sound, palettes, texts by the number of their stream, and the rest."""
_MOST_CHUNKS = 2**20
_HEADER_BYTES = 2**20
"""Bytes at the beginning of a file that hold its header."""
_SEARCHED_BYTES = (2**20, 2**26)
"""Bytes at the end of a file in which its index is looked for, first and last: four million chunks
take the more."""
_MOVED_BYTES = 2**26
"""Bytes before its place in which a part of an index is looked for."""
_ENTRY = np.dtype([("name", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")])
_IS_KEYFRAME = 0x10
_MOST_COMPARED = 2**12
_PART = np.dtype([("offset", "<u8"), ("size", "<u4"), ("slots", "<u4")])
_PART_ENTRY = np.dtype([("offset", "<u4"), ("size", "<u4")])
_NOT_KEYFRAME = 1 << 31
_PARTS_BYTES = _PART_BYTES = 24
"""Bytes that come before the entries of such indexes, behind their heads."""
_OF_PARTS, _OF_CHUNKS = b"\4\0\0\0", b"\2\0\0\1"
"""How they begin: the 32-bit words of an entry, and of what it tells."""


class Chunk(NamedTuple):
    """One chunk of a file, by its head."""

    at: int
    """The offset of its head."""
    name: bytes
    size: int
    """Bytes behind the head."""

    @property
    def end(self) -> int:
        """Where the next one begins: chunks fill an even number of bytes, lists are entered."""
        if self.name in _LISTS:
            return self.at + HEAD_BYTES + _LIST_NAME_BYTES
        return self.at + HEAD_BYTES + self.size + self.size % 2

    @property
    def is_plausible(self) -> bool:
        """Whether chunks have such names."""
        return _NAMES.fullmatch(self.name) is not None

    def is_picture(self, stream_index: int) -> bool:
        """Whether it holds a picture of the stream, or its slot if it is empty."""
        return self.name in _picture_names(stream_index)


def _picture_names(stream_index: int) -> tuple[bytes, bytes]:
    number = b"%02d" % stream_index
    return number + b"dc", number + b"db"


def chunks(descriptor: int, at: int) -> Iterator[Chunk]:
    """The chunks of an open file from an offset on, one leading to the next; a million at most.
    Raises OSError."""
    for _ in range(_MOST_CHUNKS):
        head = os.pread(descriptor, HEAD_BYTES, at)
        if len(head) < HEAD_BYTES:
            return
        chunk = Chunk(at, head[:4], int.from_bytes(head[4:], "little"))
        yield chunk
        at = chunk.end


def empty_slots(path: str, at: int, stream_index: int) -> int:
    """How many empty chunks of a stream lie behind a byte offset at which a chunk ends: they repeat
    the picture before, and demuxers pass over them.

    Looks at a million chunks at most. Raises OSError.
    """
    with open(path, "rb", buffering=0) as file:
        found = chunks(file.fileno(), at + at % 2)
        return sum(not chunk.size and chunk.is_picture(stream_index) for chunk in found)


class Table(NamedTuple):
    """The chunks of a stream by the index of a file: where they lay when it was written."""

    positions: Ints
    """Offsets of their heads, ascending."""
    sizes: Ints
    """Bytes behind the heads."""
    slots: Ints
    keyframes: Flags

    @classmethod
    def of(cls, positions: Ints, sizes: Ints, slots: Ints, keyframes: Flags) -> Table:
        """A table of chunks in any order: without those that are empty, of those at one place the
        first."""
        there = np.flatnonzero(sizes > 0)
        positions, first = np.unique(positions[there], return_index=True)
        there = there[first]
        return cls(positions, sizes[there], slots[there], keyframes[there])


def read_table(path: str, stream_index: int) -> Table | None:
    """The index that a file has of a stream, wherever it lies in the file by now; None without one.

    Raises OSError.
    """
    with open(path, "rb", buffering=0) as file:
        found = (_at_end(file.fileno(), stream_index), _in_parts(file.fileno(), stream_index))
    tables = [table for table in found if table is not None]
    return max(tables, key=lambda table: len(table.positions), default=None)


def _at_end(descriptor: int, stream_index: int) -> Table | None:
    """`idx1`, which tells of the first gigabyte at most."""
    movie = next((one for one in chunks(descriptor, 0) if _begins_movie(descriptor, one)), None)
    end, at, tail = os.fstat(descriptor).st_size, -1, b""
    for searched in _SEARCHED_BYTES:
        if movie is not None and at < 0:
            tail = os.pread(descriptor, searched, max(0, end - searched))
            at = tail.rfind(INDEX)
    if movie is None or at < 0:
        return None
    at += HEAD_BYTES
    length = min(int.from_bytes(tail[at - 4 : at], "little"), len(tail) - at)
    entries = np.frombuffer(tail, _ENTRY, max(0, length) // _ENTRY.itemsize, at)
    base = _base(descriptor, movie, entries)
    entries = entries[np.isin(entries["name"], _picture_names(stream_index))]
    if base is None:
        return None
    return Table.of(
        entries["offset"].astype(np.int64) + base,
        entries["size"].astype(np.int64),
        np.arange(len(entries), dtype=np.int64),
        (entries["flags"] & _IS_KEYFRAME) > 0,
    )


def _begins_movie(descriptor: int, chunk: Chunk) -> bool:
    name = os.pread(descriptor, _LIST_NAME_BYTES, chunk.at + HEAD_BYTES)
    return chunk.name == b"LIST" and name == b"movi"


def _base(descriptor: int, movie: Chunk, entries: NDArray[np.void]) -> int | None:
    """What offsets are counted from: the name of the list that holds the pictures, or the file."""
    for entry in entries[:_MOST_COMPARED]:
        head = entry["name"] + int(entry["size"]).to_bytes(4, "little")
        for base in (movie.at + HEAD_BYTES, 0):
            if os.pread(descriptor, HEAD_BYTES, int(entry["offset"]) + base) == head:
                return base
    return None


def _in_parts(descriptor: int, stream_index: int) -> Table | None:
    """`ix`, of whose parts `indx` in the header tells: one for each gigabyte."""
    header, at = os.pread(descriptor, _HEADER_BYTES, 0), -1
    while (at := header.find(b"indx", at + 1)) >= 0:
        begin = at + HEAD_BYTES + _PARTS_BYTES
        told = header[at + HEAD_BYTES : begin]
        if told[:4] == _OF_PARTS and told[8:12] in _picture_names(stream_index):
            break
    else:
        return None
    most = max(0, len(header) - begin) // _PART.itemsize
    count, slot = min(int.from_bytes(told[4:8], "little"), most), 0
    columns: list[tuple[Ints, Ints, Ints]] = []
    for part in np.frombuffer(header, _PART, count, begin):
        entries, base = _part(descriptor, part, told[8:12])
        offsets, sizes = entries["offset"].astype(np.int64), entries["size"].astype(np.int64)
        columns.append((offsets + base, sizes, slot + np.arange(len(entries), dtype=np.int64)))
        slot += len(entries) or int(part["slots"])
    if not columns:
        return None
    positions, sizes, slots = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Table.of(positions, sizes & ~_NOT_KEYFRAME, slots, (sizes & _NOT_KEYFRAME) == 0)


def _part(descriptor: int, part: np.void, name: bytes) -> tuple[NDArray[np.void], int]:
    """One part's entries, none if it is not found, and what their offsets are counted from. It lies
    nearer where bytes were cut out before it."""
    expected, size = int(part["offset"]), int(part["size"])
    begin = max(0, expected - _MOVED_BYTES)
    around = os.pread(descriptor, expected + size - begin, begin) if expected < 2**62 else b""
    head = re.compile(rb"ix\d\d(?s:.{4})%b(?s:.{4})%b" % (_OF_CHUNKS, re.escape(name)))
    for match in reversed([*head.finditer(around)]):
        chunk = around[match.start() : match.start() + HEAD_BYTES + size]
        length, count = (int.from_bytes(chunk[at : at + 4], "little") for at in (4, 12))
        told = HEAD_BYTES + _PART_BYTES
        if length + HEAD_BYTES in (size, size + HEAD_BYTES):
            count = min(count, (len(chunk) - told) // _PART_ENTRY.itemsize)
            base = int.from_bytes(chunk[20:28], "little", signed=True) - HEAD_BYTES
            return np.frombuffer(chunk, _PART_ENTRY, max(0, count), told), base
    return np.empty(0, _PART_ENTRY), 0
