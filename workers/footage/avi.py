"""Where the pictures of an AVI stand. They have no times but slots, for which FFmpeg counts the
chunks that it finds: behind lost ones all would move forward."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from workers.footage.holes import Hole
from workers.footage.riff import HEAD_BYTES, INDEX, Chunk, Table, chunks, read_table

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream

_MOST_LOST = 2**20
_MOST_BETWEEN = 2**12
"""Chunks of other streams that lie between two pictures at most."""
_ALIKE, _LEAST_ALIKE = 8, 3
"""Pictures in a row that are compared with the index where positions have moved, and how many tell
the place if they are fewer, and the index tells of all."""
_LEAST_LED = 8
"""Pictures in a row from which chunks must have led on, where no index tells of them."""
_MOST_SEARCHES = 2**8
"""Searches in vain after which the index counts as that of another file."""


class _Lost(NamedTuple):
    """What is noted beside the packet behind lost chunks."""

    slots: int


class _Read(NamedTuple):
    """A packet whose place is known."""

    at: int
    """The offset of its chunk."""
    slot: int
    """Its slot by FFmpeg's count."""


class Chunks:
    """The slots of a stream's chunks by the file's index.

    Where chunks were overwritten, those behind them lie where the index says; where bytes were cut
    out or put in, they have moved, and are known by their sizes.
    """

    def __init__(self, path: str, stream: Stream) -> None:
        self.lost = False
        """Whether chunks of the index were not found."""
        self._path = path
        self._stream = stream
        self._table: Table | None = None
        self._begun = False
        self._chunked: bool | None = None
        self._searches = 0
        self._moved = 0
        self._number: int | None = -1
        self._latest: _Read | None = _Read(-1, -1)
        self._at: int | None = None
        self._told_at_first = 0
        self._partial = self._broken = False
        self._led = 0
        self._unknown: int | None = None
        self._shift = 0
        self._passed = -1

    def sought(self) -> None:
        """Reading goes on elsewhere; there FFmpeg takes the slot from the index."""
        self._number = self._latest = self._at = None
        self._shift = self._led = 0

    def passing(self, packets: Iterable[Packet[Stream]]) -> Iterator[Packet[Stream]]:
        """The same packets, those of the stream at their slots. Each waits for the next one, which
        tells whether it is torn."""
        if not self._begun:
            self._begun = True
            self._told_at_first = known = len(self._stream.index_entries)
            if known < self._stream.frames:
                # Without an index, FFmpeg enters what it comes across.
                table = read_table(self._path, self._stream.index, self._stream.frames)
                self._table = table if table is not None and len(table.slots) > known else None
        held: Packet[Stream] | None = None
        try:
            for packet in packets:
                if packet.stream_index != self._stream.index or packet.dts is None:
                    yield packet
                elif self._placed(packet, held):
                    if held is not None:
                        yield held
                    held = packet
        except Exception:
            if held is not None:
                yield held
            raise
        if held is not None:
            yield held

    def _placed(self, packet: Packet[Stream], before: Packet[Stream] | None) -> bool:
        """Give a packet its slot, and mark the one before it if that is torn. False for what is no
        picture of the stream, as far as can be told."""
        slot, position = packet.dts or 0, packet.pos
        if position is not None and self._are_chunks(position):
            at = position - HEAD_BYTES
            if self._table is None and not self._follows(at, slot, before):
                self._table = self._told()
            if self._table is not None and not self._find(packet, self._table, at, before):
                self._unknown = at
                return False
            self._at = at
        packet.dts = self._passed = slot + self._shift
        if packet.pts is not None:
            packet.pts += self._shift
        return True

    def _are_chunks(self, position: int) -> bool:
        """Whether packets are chunks of the stream, by the first. Those of DV with its sound in one
        stream are not, and have times of their own."""
        if self._chunked is None:
            with open(self._path, "rb", buffering=0) as file:
                chunk = next(chunks(file.fileno(), position - HEAD_BYTES), None)
            self._chunked = chunk is not None and chunk.is_picture(self._stream.index)
        return self._chunked

    def _follows(self, at: int, slot: int, before: Packet[Stream] | None) -> bool:
        """Whether a chunk is the next one and has its slot, as all of a whole file are. Of what the
        file's index does not tell, FFmpeg enters where it came across it."""
        entries = self._stream.index_entries
        number = entries.search_timestamp(slot, backward=True, any_frame=True)
        if number < 0 or self._number not in (number - 1, None):
            return False
        entry = entries[number]
        if (entry.pos, entry.timestamp) != (at, slot):
            return False
        if number >= self._told_at_first:
            self._leads_to(at, before, listed=False)
        self._number, self._latest = number, _Read(at, slot)
        return True

    def _leads_to(self, at: int, before: Packet[Stream] | None, *, listed: bool) -> bool:
        """Whether chunks lead to one from the picture before, which is marked if it is torn. Where
        no index tells of it, those before must have led on: recorders may fill gaps their way."""
        if self._at is None:
            return True
        leads, whole = self._leads(self._at, at)
        if before is not None and not whole and (listed or self._led >= _LEAST_LED):
            before.is_corrupt = True
        self._led = self._led + 1 if leads else 0
        self._broken |= not leads
        return leads

    def _leads(self, begin: int, to: int) -> tuple[bool, bool]:
        """Whether chunks lead from one to another; and whether the first is whole, as far as the
        next one tells."""
        with open(self._path, "rb", buffering=0) as file:
            whole = True
            behind = itertools.islice(chunks(file.fileno(), begin), 1, _MOST_BETWEEN)
            for number, chunk in enumerate(behind):
                if chunk.at == to:
                    return True, True
                if number == 0:
                    whole = chunk.is_common or _ends_at_zeros(file.fileno(), chunk.at)
                    whole = whole and chunk.at < to
                if chunk.at > to or not chunk.is_plausible:
                    break
        return False, whole

    def _find(
        self, packet: Packet[Stream], table: Table, at: int, before: Packet[Stream] | None
    ) -> bool:
        """Find the slot of a packet by the index. False where neither that nor the chunks before
        tell of it."""
        slot, latest, known = packet.dts or 0, self._latest, -1
        if latest is not None:
            known = int(np.searchsorted(table.positions, latest.at + self._moved, "right")) - 1
        rank = self._listed(table, at, packet.size)
        if rank != known + 1:
            goes_on = known + 1 < len(table.slots)
            leads = self._leads_to(at, before, listed=goes_on and not self._partial)
            # Where the index tells of a part, chunks that lead on tell more than their sizes.
            if rank is None and goes_on and (self._broken or not self._partial):
                rank = self._found(table, at, known)
            if rank is None and goes_on and not leads and not self._partial:
                return False
            self._partial |= rank is None and goes_on
        if rank is None:
            return True
        self._latest, self._broken = _Read(at, slot), False
        packet.is_keyframe = bool(table.keyframes[rank])
        true = int(table.slots[rank])
        if latest is None:
            self._shift = true - slot
            self.lost |= self._shift != 0
            return True
        known_slot = int(table.slots[known]) if known >= 0 else -1
        between = table.slots[known + 1 : rank]
        between = between[(between > known_slot) & (between < true)]
        ahead = true - known_slot - (slot - latest.slot)
        # That the index and the chunks count empty slots differently is no loss.
        lost = len(between) > 0 or (ahead > 0 and not self._leads_to(at, before, listed=True))
        if ahead <= _MOST_LOST and (self._unknown is not None or (lost and ahead > 0)):
            self._shift += ahead
            if lost:
                self.lost = True
                missing = [int(between.min())] if len(between) else []
                number = bisect_right(table.untold, known_slot, key=attrgetter("stop"))
                untold = table.untold[number : number + 1]
                missing += [slots.start for slots in untold if slots.stop < true]
                first = min(missing, default=0)
                packet.opaque = _Lost(true - max(first, self._passed + 1))
        self._unknown = None
        return True

    def _told(self) -> Table:
        """FFmpeg's index."""
        told = [
            (entry.pos, entry.size, entry.timestamp, entry.is_keyframe)
            for entry in self._stream.index_entries
        ]
        at, size, slot, key = np.array(told, np.int64).reshape(-1, 4).T
        return Table.of(at, size, slot, key > 0)

    def _listed(self, table: Table, at: int, size: int | None = None) -> int | None:
        """The number of the chunk that lay at an offset, and had that size, before it moved."""
        number = int(np.searchsorted(table.positions, at + self._moved))
        if number == len(table.positions) or table.positions[number] != at + self._moved:
            return None
        return number if size in (None, table.sizes[number]) else None

    def _found(self, table: Table, at: int, known: int) -> int | None:
        """The number of a chunk that is not where it lay, or another."""
        if self._unknown is None or self._breaks(table, self._unknown, at):
            found = self._alike(table, at, known + 1)
            if found is not None:
                self._moved = int(table.positions[found]) - at
                return found
        # Of the next one, the size may be damaged.
        there = self._listed(table, at)
        return there if not self._moved or there == known + 1 else None

    def _breaks(self, table: Table, begin: int, to: int) -> bool:
        """Whether chunks do not lead from one to another, or a part of the index lies between."""
        number = bisect_right(table.moved, begin, key=itemgetter(0))
        parted = any(place < to for place, _moved in table.moved[number : number + 1])
        return parted or not self._leads(begin, to)[0]

    def _alike(self, table: Table, at: int, begin: int) -> int | None:
        """The number of the chunk at an offset by the sizes of those that follow it."""
        if self._searches == _MOST_SEARCHES:
            return None
        self._searches += 1
        pictures, ended = self._pictures_from(at)
        positions, sizes = table.positions[begin:], table.sizes[begin:]
        starts = len(sizes) - len(pictures) + 1
        if not pictures or starts <= 0:
            return None
        alike = np.ones(starts, np.bool_)
        for number, chunk in enumerate(pictures):
            there = slice(number, number + starts)
            alike &= sizes[there] == chunk.size
            alike &= positions[there] - positions[:starts] == chunk.at - at
        found = np.flatnonzero(alike)
        # If nothing else is missing up to the next part of the index, it has moved as far.
        part = bisect_right(table.moved, at, key=itemgetter(0))
        moved = next((moved for _place, moved in table.moved[part : part + 1]), None)
        nearest = found[positions[found] == at + moved] if moved is not None else found[:0]
        least = _ALIKE if self._partial else _LEAST_ALIKE
        if not len(nearest) and len(pictures) < least:
            found = found[found == starts - 1] if ended else found[:0]
        # Of pictures of one size nothing tells the place of one.
        found = nearest if len(nearest) else found
        if len(found) != 1:
            return None
        self._searches = 0
        return begin + int(found[0])

    def _pictures_from(self, at: int) -> tuple[list[Chunk], bool]:
        """The next pictures of the stream from an offset on, as far as chunks lead; and whether
        they are the file's last."""
        pictures: list[Chunk] = []
        with open(self._path, "rb", buffering=0) as file:
            for chunk in itertools.islice(chunks(file.fileno(), at), _MOST_BETWEEN):
                if len(pictures) == _ALIKE or not chunk.is_plausible:
                    return pictures, False
                if chunk.name == INDEX:
                    break
                if chunk.size and chunk.is_picture(self._stream.index):
                    pictures.append(chunk)
        return pictures, True


def _ends_at_zeros(descriptor: int, at: int) -> bool:
    """Whether zeros begin where a chunk ends: damage has spared it, or they fill the file up to the
    next one."""
    before, behind = os.pread(descriptor, HEAD_BYTES, at - HEAD_BYTES), os.pread(descriptor, 64, at)
    rest = behind.lstrip(b"\0")
    fills = len(rest) + HEAD_BYTES <= len(behind) or Chunk(at, rest[:4], 0).is_common
    return any(before) and fills


class LostChunks:
    """Tells of the chunks that `Chunks` has found to be lost."""

    def __init__(self) -> None:
        self._least_delay = 2**63

    def before(self, packet: Packet[Stream], pts: int | None, dts: int | None) -> Hole | None:
        """The hole before a packet that has these timestamps in running time."""
        if pts is None or dts is None:
            return None
        self._least_delay = min(self._least_delay, pts - dts)
        lost = packet.opaque
        if not isinstance(lost, _Lost) or lost.slots < 1:
            return None
        return Hole(dts - lost.slots, True, 1, lost.slots, dts + self._least_delay - 1)
