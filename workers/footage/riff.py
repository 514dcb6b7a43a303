"""Slots of AVI files that no packet tells of: those of lost chunks, and empty ones at the end,
which are chunks without a byte that repeat the picture before and which demuxers pass over. (Chunk
layout: RIFF; Microsoft's AVI RIFF file reference.)"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from workers.footage.holes import Hole
from workers.footage.sample import Ints

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream

_LISTS = (b"RIFF", b"LIST")
SLOT_BYTES = _HEAD_BYTES = 8
_MOST_CHUNKS = 2**20


def empty_slots(path: str, at: int, stream_index: int) -> int:
    """How many empty chunks of a stream lie behind a byte offset at which a chunk ends.

    Looks at a million chunks at most. Raises OSError.
    """
    picture = b"%02d" % stream_index
    count, at = 0, at + at % 2
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for _ in range(_MOST_CHUNKS):
            head = os.pread(file.fileno(), _HEAD_BYTES, at)
            if len(head) < _HEAD_BYTES:
                break
            kind, length = head[:4], int.from_bytes(head[4:], "little")
            if kind in _LISTS:
                at += _HEAD_BYTES + 4
                continue
            if length == 0 and kind[:2] == picture and kind[2:] in (b"dc", b"db"):
                count += 1
            at += _HEAD_BYTES + length + length % 2
            if at > size:
                break
    return count


class _Lost(NamedTuple):
    """What is noted beside the packet behind lost chunks."""

    slots: int


class Chunks:
    """The slots of a stream's chunks by the file's index. FFmpeg counts the chunks that it finds,
    so behind lost ones all would move forward."""

    def __init__(self, stream: Stream) -> None:
        self.lost = False
        """Whether chunks of the index were not found."""
        self._stream = stream
        self._table: tuple[Ints, Ints] | None = None
        self._number: int | None = -1
        self._latest: tuple[int, int] | None = (-1, -1)
        self._shift = 0
        self._passed = -1

    def sought(self) -> None:
        """Reading goes on elsewhere; there FFmpeg takes the slot from the index."""
        self._number = self._latest = None
        self._shift = 0

    def passing(self, packets: Iterable[Packet[Stream]]) -> Iterator[Packet[Stream]]:
        """The same packets, those of the stream at their slots."""
        for packet in packets:
            slot = packet.dts
            if packet.stream_index == self._stream.index and slot is not None:
                if not self._follows(packet.pos, slot):
                    self._find(packet, slot)
                packet.dts = self._passed = slot + self._shift
                if packet.pts is not None:
                    packet.pts += self._shift
            yield packet

    def _follows(self, position: int | None, slot: int) -> bool:
        """Whether a packet is the index's next and has its slot, as all of a whole file are."""
        if self._table is not None or position is None:
            return position is None
        entries = self._stream.index_entries
        number = entries.search_timestamp(slot, backward=True, any_frame=True)
        if number < 0 or self._number not in (number - 1, None):
            return False
        entry = entries[number]
        if (entry.pos, entry.timestamp) != (position - _HEAD_BYTES, slot):
            return False
        self._number, self._latest = number, (entry.pos, slot)
        return True

    def _find(self, packet: Packet[Stream], slot: int) -> None:
        if self._table is None:
            self._table = self._sorted()
        positions, slots = self._table
        at = (packet.pos or 0) - _HEAD_BYTES
        rank = int(np.searchsorted(positions, at))
        if rank == len(positions) or positions[rank] != at:
            return
        true, latest, self._latest = int(slots[rank]), self._latest, (at, slot)
        if latest is None:
            self._shift = true - slot
            self.lost |= self._shift != 0
            return
        before = int(np.searchsorted(positions, latest[0], "right")) - 1
        known = int(slots[before]) if before >= 0 else -1
        between = slots[before + 1 : rank]
        between = between[(between > known) & (between < true)]
        ahead = true - known - (slot - latest[1])
        # That the index and the chunks count empty slots differently is no loss.
        if len(between) and 0 < ahead <= _MOST_CHUNKS:
            self.lost = True
            self._shift += ahead
            packet.opaque = _Lost(true - max(int(between.min()), self._passed + 1))

    def _sorted(self) -> tuple[Ints, Ints]:
        """Where chunks lie, ascending, and their slots."""
        told = [(entry.pos, entry.timestamp) for entry in self._stream.index_entries]
        table = np.array(told, np.int64).reshape(-1, 2)
        positions, first = np.unique(table[:, 0], return_index=True)
        return positions, table[first, 1]


class LostChunks:
    """Tells of the chunks that `Chunks` has found to be lost."""

    def before(self, packet: Packet[Stream], pts: int | None, dts: int | None) -> Hole | None:
        """The hole before a packet that has these timestamps in running time."""
        lost = packet.opaque
        if not isinstance(lost, _Lost) or lost.slots < 1 or pts is None or dts is None:
            return None
        return Hole(dts - lost.slots, True, 1, lost.slots, pts - 1)
