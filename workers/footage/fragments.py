"""What the tables of a fragmented MP4 tell and FFmpeg does not hand on: fragments that are missing,
that come again, or that lie behind missing bytes.

Each fragment has a number, greater by one than the one before, and the time at which its samples
begin. (Box layout: ISO/IEC 14496-12, 8.8.)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from zlib import crc32

from av.packet import Packet
from av.stream import Stream

from workers.footage.rejection import rejection

_PIECE_BYTES = 2**20
_LARGEST_HEAD = 2**24
"""Bytes of a fragment's tables at most."""
_MOST_DAMAGED = 2**10
"""Damaged tables after which the search for fragments ends."""
_HEAD_BYTES, _LONG_HEAD_BYTES = 8, 16
_COMPARED = 4096
"""Fragments among which one that comes again is looked for, and twice as many are remembered."""


@dataclass(frozen=True, slots=True)
class _Fragment:
    begin: int
    """Offset of its tables."""
    number: int
    checksum: int
    """Of its tables, which hold the size of every sample."""
    step: int
    """By how much the number is greater than the one before in the file."""
    follows_damage: bool
    """Whether the tables of this one or one before it, of any track, are damaged."""


class Fragments:
    """The fragments of one track in the order of the file, read up to where they are asked for.

    `beat` is called for each of them. Its methods raise Rejected where the storage fails.
    """

    def __init__(self, path: str, track: int, beat: Callable[[], None]) -> None:
        self.passed_over = 0
        """Packets of fragments that are copies or out of order."""
        self._path = path
        self._track = track
        self._beat = beat
        self._walked = 0
        self._whole = False
        self._number = 0
        self._step = 0
        self._damaged = False
        self._decided: tuple[_Fragment, bool] | None = None
        self._usual_step, self._judged_until = 1, 0
        self._known: list[_Fragment] = []

    def lack_between(self, earlier: int, later: int) -> bool:
        """Whether fragments are missing between those that hold these two offsets, between which
        time passes. Steps of the numbers that come where none does are usual in the file: of a
        track that was taken out of a file with others, say."""
        self._read_past(later)
        for fragment in self._known[self._at(self._judged_until) + 1 : self._at(earlier) + 1]:
            self._usual_step = max(self._usual_step, fragment.step)
        self._judged_until = max(self._judged_until, later)
        if not self._known or earlier < self._known[0].begin:
            return False
        between = self._known[self._at(earlier) + 1 : self._at(later) + 1]
        return any(one.follows_damage or one.step > self._usual_step for one in between)

    def follow_others(self, offset: int) -> bool:
        """Whether a fragment that is not the first holds an offset."""
        self._read_past(offset)
        return self._at(offset) > 0

    def are_passed_over(self, offset: int) -> bool:
        """Whether the fragment that holds an offset, and is not the first, is a copy of one before
        or out of order: its number is missing among those before."""
        self._read_past(offset)
        at = self._at(offset)
        fragment = self._known[at]
        if self._decided is None or self._decided[0] is not fragment:
            before = self._known[max(0, at - _COMPARED) : at]
            numbers = {one.number for one in before}
            copied = any(one.checksum == fragment.checksum for one in before)
            within = min(numbers) < fragment.number < max(numbers)
            self._decided = fragment, copied or (within and fragment.number not in numbers)
        return self._decided[1]

    def last_behind(self, offset: int) -> int | None:
        """When the samples of the last fragment behind an offset begin, in ticks of the track;
        None where there is none. Demuxers go from box to box, so behind missing bytes they find
        nothing any more; this reads all that is there."""
        last, searched, damaged = None, 0, 0
        try:
            with open(self._path, "rb", buffering=0) as file:
                descriptor = file.fileno()
                for at in _found(descriptor, b"moof", offset, self._beat):
                    if at < searched or os.pread(descriptor, 4, at + _HEAD_BYTES) != b"mfhd":
                        continue
                    self._beat()
                    end = at - 4 + int.from_bytes(os.pread(descriptor, 4, at - 4), "big")
                    head = _content(descriptor, at + 4, end)
                    last = max(filter(None, (last, _start(head, self._track))), default=last)
                    if not _is_damaged(head):
                        searched = end
                    elif (damaged := damaged + 1) > _MOST_DAMAGED:
                        break
        except OSError as error:
            raise rejection(self._path, error) from error
        return last

    def _at(self, offset: int) -> int:
        """The number of the fragment that holds an offset; -1 before the first."""
        return bisect_right(self._known, offset, key=lambda fragment: fragment.begin) - 1

    def _read_past(self, offset: int) -> None:
        """Read until the next fragment behind an offset is known too."""
        if self._whole or (self._known and self._known[-1].begin > offset):
            return
        try:
            with open(self._path, "rb", buffering=0) as file:
                for kind, begin, content, end in _outer(file.fileno(), self._walked):
                    self._walked = end
                    if kind == b"moof":
                        self._beat()
                        self._add(begin, _content(file.fileno(), content, end))
                        if self._known and self._known[-1].begin > offset:
                            return
                        if len(self._known) > 2 * _COMPARED:
                            del self._known[:-_COMPARED]
        except OSError as error:
            raise rejection(self._path, error) from error
        self._whole = True

    def _add(self, begin: int, head: bytes) -> None:
        number = _number(head)
        if self._number:
            self._step = max(self._step, number - self._number)
        self._number = number or self._number
        self._damaged |= _is_damaged(head)
        if _start(head, self._track) is not None:
            fragment = _Fragment(begin, number, crc32(head), self._step, self._damaged)
            self._known.append(fragment)
            self._step, self._damaged = 0, False


def with_other_recordings(
    packets: Iterable[Packet[Stream]], stream: Stream, fragments: Fragments
) -> Iterator[Packet[Stream]]:
    """The same packets, but for those of fragments that are copies or out of order.

    FFmpeg hides the samples of a fragment that is earlier than the one before: those of another
    recording are shown all the same, and of several copies in a row the others go, too.
    """
    passing = False
    for packet in packets:
        if packet.stream_index != stream.index or not (packet.is_discard or passing):
            yield packet
        elif packet.pos is None or not fragments.follow_others(packet.pos):
            yield packet  # Hidden by an edit list.
        elif passing := fragments.are_passed_over(packet.pos):
            fragments.passed_over += 1
        else:
            yield _shown(packet, stream) if packet.is_discard else packet


def _shown(hidden: Packet[Stream], stream: Stream) -> Packet[Stream]:
    """A copy, for the mark of a packet cannot be changed; `holes.position` finds it."""
    packet = Packet(bytes(hidden))
    packet.stream = stream
    packet.time_base = hidden.time_base
    packet.pts, packet.dts, packet.duration = hidden.pts, hidden.dts, hidden.duration
    packet.is_keyframe = hidden.is_keyframe
    packet.opaque = hidden.pos
    return packet


def _found(descriptor: int, kind: bytes, at: int, beat: Callable[[], None]) -> Iterator[int]:
    """Offsets of these four bytes. `beat` is called for every mebibyte."""
    while piece := os.pread(descriptor, _PIECE_BYTES, at):
        beat()
        found = piece.find(kind)
        while found >= 0:
            yield at + found
            found = piece.find(kind, found + 1)
        at += max(1, len(piece) - len(kind) + 1)


def _outer(descriptor: int, at: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Kind, offset, offset of the content and end of the boxes from there on that follow each
    other."""
    whole = os.fstat(descriptor).st_size
    while at < whole and len(head := os.pread(descriptor, _LONG_HEAD_BYTES, at)) >= _HEAD_BYTES:
        size, content = int.from_bytes(head[:4], "big"), at + _HEAD_BYTES
        if size == 1:
            size, content = int.from_bytes(head[8:], "big"), at + _LONG_HEAD_BYTES
        if at + size < content:
            return
        yield head[4:8], at, content, at + size
        at += size


def _content(descriptor: int, start: int, end: int) -> bytes:
    """A fragment's tables; none where they are too large to be some."""
    return (
        os.pread(descriptor, end - start, start) if start <= end <= start + _LARGEST_HEAD else b""
    )


def _is_damaged(head: bytes) -> bool:
    """Whether the boxes in a `moof` box, or in its `traf` boxes, do not line up."""
    tracks = [content for kind, content in _boxes(head) if kind == b"traf"]
    return any(
        sum(_HEAD_BYTES + len(inside) for _kind, inside in _boxes(content)) != len(content)
        for content in (head, *tracks)
    )


def _number(head: bytes) -> int:
    """The number of a fragment, by the content of its `moof` box; 0 where it tells none."""
    return int.from_bytes(dict(_boxes(head)).get(b"mfhd", b"")[4:8], "big")


def _start(head: bytes, track: int) -> int | None:
    """When a fragment's samples of a track begin, by the content of its `moof` box: 0 where it does
    not tell, None where it has none."""
    for kind, content in _boxes(head):
        if kind != b"traf":
            continue
        inside = dict(_boxes(content))
        if int.from_bytes(inside.get(b"tfhd", b"")[4:8], "big") == track:
            told = inside.get(b"tfdt", b"")
            return int.from_bytes(told[4:12] if told[:1] == b"\1" else told[4:8], "big")
    return None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + _HEAD_BYTES <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if size < _HEAD_BYTES:
            return
        yield content[at + 4 : at + 8], content[at + _HEAD_BYTES : at + size]
        at += size
