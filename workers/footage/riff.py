"""What lies in an AVI file: its chunks, and the index that it has of them, which FFmpeg does not
find where bytes were cut out. (Chunks and `idx1`: RIFF, Microsoft's AVI RIFF File Reference; `indx`
and `ix`: OpenDML AVI File Format Extensions 1.02.)"""

from __future__ import annotations

import itertools
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.footage.sample import Flags, Ints

HEAD_BYTES = 8
INDEX = b"idx1"
"""The name of the index at the end."""
_LISTS = (b"RIFF", b"LIST")
_LIST_NAME_BYTES = 4
_NAME = re.compile(rb"[ -~]{4}")
_COMMON_NAME = re.compile(rb"\d\d(dc|db|iv|wb|pc|tx|sb)|ix\d\d|RIFF|LIST|JUNK|idx1")
"""Pictures, packed or not, sound, palettes, texts by the number of their stream, and the rest."""
_MOST_CHUNKS = 2**20
_HEADER_BYTES = 2**20
"""Bytes at the beginning of a file that hold its header."""
_LEAST_SEARCHED, _SEARCHED_A_FRAME, _MOST_SEARCHED = 2**20, 2**7, 2**26
"""Bytes at the end of a file in which its index is looked for, by the frames of which it tells: it
takes 16 for each chunk, of whichever stream."""
_MOVED_BYTES = 2**26
"""Bytes before and behind its place in which a part of an index is looked for."""
_ENTRY = np.dtype([("name", "S4"), ("flags", "<u4"), ("offset", "<u4"), ("size", "<u4")])
_IS_KEYFRAME = 0x10
_MOST_COMPARED = 2**12
_PART = np.dtype([("offset", "<u8"), ("size", "<u4"), ("slots", "<u4")])
_PART_ENTRY = np.dtype([("offset", "<u4"), ("size", "<u4")])
_NOT_KEYFRAME = 1 << 31
_LARGEST_FILE = 2**62
"""Offsets from here on are damage."""
_LONGEST_PART = 2**24
"""Bytes of a part at most: it tells of a gigabyte."""
_PARTS_BYTES, _PART_HEAD_BYTES = 24, 32
"""Bytes before the entries of such indexes: behind their heads, and with it."""
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
        """Whether chunks have such names: recorders have some of their own, which can be read."""
        return _NAME.fullmatch(self.name) is not None

    @property
    def is_common(self) -> bool:
        """Whether it is sure to be a chunk by its name."""
        return _COMMON_NAME.fullmatch(self.name) is not None

    def is_picture(self, stream_index: int) -> bool:
        """Whether it holds a picture of the stream, or its slot if it is empty."""
        return self.name in _picture_names(stream_index)


def _picture_names(stream_index: int) -> tuple[bytes, ...]:
    return tuple(b"%02d%b" % (stream_index, kind) for kind in (b"dc", b"db", b"iv"))


def chunks(descriptor: int, at: int) -> Iterator[Chunk]:
    """The chunks of an open file from an offset on, one leading to the next; a million at most.
    Raises OSError."""
    padded = False
    for _ in range(_MOST_CHUNKS):
        chunk = _chunk(descriptor, at)
        if padded and not (chunk and chunk.is_common):
            # Some muxers do not fill up chunks of an odd size.
            unpadded = _chunk(descriptor, at - 1)
            plausible = chunk is not None and chunk.is_plausible
            if unpadded and (unpadded.is_common or (unpadded.is_plausible and not plausible)):
                chunk = unpadded
        if chunk is None:
            return
        yield chunk
        at, padded = chunk.end, bool(chunk.size % 2)


def _chunk(descriptor: int, at: int) -> Chunk | None:
    head = os.pread(descriptor, HEAD_BYTES, at)
    if len(head) < HEAD_BYTES:
        return None
    return Chunk(at, head[:4], int.from_bytes(head[4:], "little"))


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
    moved: Sequence[tuple[int, int]] = ()
    """Where parts of the index lie, ascending, and how far before their place that is."""
    untold: Sequence[range] = ()
    """Slots of which parts of the index told that are not there."""

    @classmethod
    def of(
        cls,
        positions: Ints,
        sizes: Ints,
        slots: Ints,
        keyframes: Flags,
    ) -> Table:
        """A table of chunks in any order: without those that are empty, of those at one place the
        first."""
        there = np.flatnonzero(sizes > 0)
        positions, first = np.unique(positions[there], return_index=True)
        there = there[first]
        return cls(positions, sizes[there], slots[there], keyframes[there])


def read_table(path: str, stream_index: int, frames: int) -> Table | None:
    """The index that a file has of a stream, wherever it lies in the file by now; None without one.
    `frames` are those of its header.

    Raises OSError.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        found = (
            _at_end(descriptor, stream_index, frames),
            _in_parts(descriptor, stream_index, frames),
        )
    tables = [table for table in found if table is not None]
    return max(tables, key=lambda table: len(table.positions), default=None)


def _at_end(descriptor: int, stream_index: int, frames: int) -> Table | None:
    """`idx1`, which tells of the first gigabyte at most."""
    movie = _movie(descriptor)
    searched = min(_LEAST_SEARCHED + frames * _SEARCHED_A_FRAME, _MOST_SEARCHED)
    begin = max(0, os.fstat(descriptor).st_size - searched)
    tail = os.pread(descriptor, searched, begin)
    at = tail.rfind(INDEX)
    if movie is None or at < 0:
        return None
    length, told = int.from_bytes(tail[at + 4 : at + HEAD_BYTES], "little"), tail[at + HEAD_BYTES :]
    entries = np.frombuffer(told, _ENTRY, min(length, len(told)) // _ENTRY.itemsize)
    base = _base(descriptor, movie, entries)
    moved = movie.at + HEAD_BYTES + movie.size - (begin + at)
    entries = entries[np.isin(entries["name"], _picture_names(stream_index))]
    if base is None:
        return None
    return Table.of(
        entries["offset"].astype(np.int64) + base,
        entries["size"].astype(np.int64),
        np.arange(len(entries), dtype=np.int64),
        (entries["flags"] & _IS_KEYFRAME) > 0,
    )._replace(moved=[(begin + at, moved)])


def _movie(descriptor: int) -> Chunk | None:
    """The list that holds the pictures, the first of them."""
    lists = (chunk for chunk in chunks(descriptor, 0) if chunk.name == b"LIST")
    return next((one for one in lists if _list_name(descriptor, one) == b"movi"), None)


def _list_name(descriptor: int, chunk: Chunk) -> bytes:
    return os.pread(descriptor, _LIST_NAME_BYTES, chunk.at + HEAD_BYTES)


def _base(descriptor: int, movie: Chunk, entries: NDArray[np.void]) -> int | None:
    """What offsets are counted from: the name of the list that holds the pictures, or the file."""
    for entry in entries[:_MOST_COMPARED]:
        head = entry["name"] + int(entry["size"]).to_bytes(4, "little")
        for base in (movie.at + HEAD_BYTES, 0):
            if os.pread(descriptor, HEAD_BYTES, int(entry["offset"]) + base) == head:
                return base
    return None


def _in_parts(descriptor: int, stream_index: int, frames: int) -> Table | None:
    """`ix`, of whose parts `indx` in the header tells: one for each gigabyte."""
    header, at = os.pread(descriptor, _HEADER_BYTES, 0), -1
    while (at := header.find(b"indx", at + 1)) >= 0:
        begin = at + HEAD_BYTES + _PARTS_BYTES
        told = header[at + HEAD_BYTES : begin]
        if told[:4] == _OF_PARTS and told[8:12] in _picture_names(stream_index):
            break
    else:
        return None
    entries = header[begin:]
    count = min(int.from_bytes(told[4:8], "little"), len(entries) // _PART.itemsize)
    told_parts = np.frombuffer(entries, _PART, count)
    told_parts = np.sort(told_parts[told_parts["offset"] < _LARGEST_FILE], order="offset")
    offsets = told_parts["offset"].tolist()
    parts = _parts(descriptor, offsets, told[8:12])
    columns: list[tuple[Ints, Ints, Ints]] = []
    moved: list[tuple[int, int]] = []
    untold: list[range] = []
    slot = 0
    for number, told_slots in enumerate(told_parts["slots"].tolist()):
        if number in parts:
            at, positions, sizes = parts[number]
            columns.append((positions, sizes, slot + np.arange(len(sizes), dtype=np.int64)))
            moved.append((at, offsets[number] - at))
            slot += len(sizes)
        elif 0 < told_slots <= frames:
            untold.append(range(slot, slot + told_slots))
            slot += told_slots
        else:
            break  # Nothing tells how many are missing.
    if not columns:
        return None
    positions, sizes, slots = (np.concatenate(column) for column in zip(*columns, strict=True))
    keyframes = (sizes & _NOT_KEYFRAME) == 0
    table = Table.of(positions, sizes & ~_NOT_KEYFRAME, slots, keyframes)
    return table._replace(moved=sorted(moved), untold=untold)


class _Part(NamedTuple):
    """A part of an index."""

    at: int
    """Where it lies."""
    positions: Ints
    sizes: Ints

    @property
    def end(self) -> int:
        """Where what comes behind it lies."""
        return self.at + _PART_HEAD_BYTES + len(self.sizes) * _PART_ENTRY.itemsize


def _parts(descriptor: int, offsets: list[int], name: bytes) -> dict[int, _Part]:
    """The parts of an index that are there, by their number. What was cut out or put in has moved
    them, but not what they tell."""
    there: dict[int, _Part] = {}
    end = 0
    for number, offset in enumerate(offsets):
        part = _part_at(descriptor, offset, name) if offset >= end else None
        if part is not None:
            there[number] = part
            end = part.end
    if len(there) == len(offsets):
        return there
    head = re.compile(rb"ix\d\d(?s:.{4})%b(?s:.{4})%b" % (_OF_CHUNKS, re.escape(name)))
    size, searched = os.fstat(descriptor).st_size, 0
    moved = []
    for number, offset in enumerate(offsets):
        if number in there or offset + _MOVED_BYTES < searched + _LONGEST_PART or searched == size:
            continue
        begin = min(max(0, offset - _MOVED_BYTES, searched - _LONGEST_PART), size)
        around = os.pread(descriptor, min(offset + _MOVED_BYTES, size) - begin, begin)
        searched, at = begin + len(around), 0
        while match := head.search(around, at):
            part = _part_at(descriptor, begin + match.start(), name)
            at = match.end() if part is None else part.end - begin
            moved += [] if part is None else [part]
    known = {part.at for part in there.values()}
    # They follow what they tell of, or come before it.
    first = _first_picture(descriptor, name)
    ahead = first is not None and first > offsets[0]
    found = {
        bisect_left(offsets, int(part.positions[0])) - ahead: part
        for part in moved
        if part.at not in known
    }
    return {number: part for number, part in found.items() if 0 <= number < len(offsets)} | there


def _first_picture(descriptor: int, name: bytes) -> int | None:
    """Where the first picture of that name lies; None if chunks do not lead to it."""
    movie = _movie(descriptor)
    within = chunks(descriptor, movie.end) if movie else iter(())
    plausible = itertools.takewhile(lambda chunk: chunk.is_plausible, within)
    return next((chunk.at for chunk in plausible if chunk.name == name), None)


def _part_at(descriptor: int, at: int, name: bytes) -> _Part | None:
    head = os.pread(descriptor, _PART_HEAD_BYTES, at)
    count = int.from_bytes(head[12:16], "little")
    base = int.from_bytes(head[20:28], "little")
    length = count * _PART_ENTRY.itemsize
    if head[8:12] != _OF_CHUNKS or head[16:20] != name or base >= _LARGEST_FILE:
        return None
    told = os.pread(descriptor, min(length, _LONGEST_PART), at + _PART_HEAD_BYTES)
    if not count or len(told) < length:
        return None
    entries = np.frombuffer(told, _PART_ENTRY)
    positions = entries["offset"].astype(np.int64) + base - HEAD_BYTES
    return _Part(at, positions, entries["size"].astype(np.int64))
