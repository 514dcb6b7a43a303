"""Which frames are damaged: where packets are missing, incomplete or do not decode, and what refers
to them."""

from __future__ import annotations

import itertools
from collections import deque

from av.packet import Packet
from av.stream import Stream

from workers.footage.signs import Signs
from workers.footage.source import Source

_HEALED_S = 10
"""Seconds after damage from which on pictures count as whole where no keyframe comes: intra blocks
have replaced most of it, and a file with one keyframe is not lost for one damaged packet."""
_REMEMBERED = 64
"""Damages, keyframes and packets that are remembered; no decoder holds back so many frames."""
_LAGGING = frozenset(("mpegts",))
"""Containers whose packets are cut by a parser, which has the marks of the next packet by then."""
_NEVER = -(2**63)


class Damage:
    """What is damaged near the place of decoding.

    A decoder tells of a damaged packet by an error, or by a frame marked as corrupt, whose lost
    blocks it has made up; of some it says nothing, which packets show by signs of their own. What
    follows until the next keyframe is made of that, and is not marked.
    """

    def __init__(self, source: Source) -> None:
        self._signs = Signs(source.codec)
        self._healed_ticks = int(_HEALED_S / (source.stream.time_base or 1))
        self._lags = source.container in _LAGGING
        self._fed: deque[int] = deque(maxlen=_REMEMBERED)
        self._spoiled: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
        self._past: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
        self._keyframes: deque[int] = deque(maxlen=_REMEMBERED)
        self._behind_holes: set[int] = set()
        self._incomplete: set[int] = set()
        self._doubted = self._doubted_from = _NEVER
        self._jumps = 0
        self._source = source
        self._trusted: bool | None = None
        self.sought()

    def sought(self) -> None:
        """Reading goes on elsewhere."""
        self.emptied()
        self._signs.sought(self._source.extradata)
        self._holes = self._source.holes()
        self._marked = False
        self._due: int | None = None

    def emptied(self) -> None:
        """The decoder was emptied, and begins anew."""
        self._past.extend(self._spoiled)
        self._spoiled.clear()
        self._keyframes.clear()
        self._fed.clear()
        self._signs.emptied()
        self._confused = False

    def read(self, packet: Packet[Stream], jumps: int) -> None:
        """A packet was read, with timestamps in running time, after so many jumps of the clock.

        It need not be fed soon, so what is known of it is noted for then.
        """
        dts, due, self._due = packet.dts, self._due, None
        jumped, self._jumps = jumps > self._jumps, jumps
        is_due = dts is not None and due is not None and dts <= due
        follows = self._lags and packet.is_keyframe and is_due
        if due is not None and (jumped or follows):
            # Another recording begins there, or the next piece of it: nothing need be missing.
            self._incomplete.discard(self._doubted)
            kept = [one for one in self._spoiled if one[0] != self._doubted_from]
            self._spoiled = deque(kept, maxlen=_REMEMBERED)
        marked, self._marked = self._marked, packet.is_corrupt and self._are_trusted()
        if packet.pts is None:
            return
        if marked if self._lags else self._marked:
            self._due = None if dts is None else dts + 3 * (packet.duration or 0) // 2
            self._doubted, self._doubted_from = packet.pts, _NEVER
            self._incomplete.add(packet.pts)
        holes = None if self._trusted is False else self._holes
        hole = None if holes is None else holes.before(packet, packet.pts, packet.dts)
        if hole is not None:
            self._spoil(hole.damaged_from)
            self._behind_holes.add(packet.pts)

    def ends_before(self, packet: Packet[Stream]) -> bool:
        """Whether the decoder should be emptied before a packet: what it has made up for missing
        frames would mix up the references behind a keyframe, too."""
        return packet.is_keyframe and (self._confused or packet.pts in self._behind_holes)

    def _are_trusted(self) -> bool:
        if self._trusted is None:
            self._trusted = not self._lags or self._source.marks_are_rare()
        return self._trusted

    def fed(self, packet: Packet[Stream]) -> None:
        """A packet is fed. What is shown from a keyframe on is whole again."""
        told = self._signs.tell(packet)
        pts = packet.pts
        if pts is None:
            return
        self._fed.append(pts)
        if packet.is_keyframe:
            self._confused = False
            self._keyframes.append(pts)
            self._spoiled = _ended(self._spoiled, pts)
            self._past = _ended(self._past, pts)
        elif pts in self._behind_holes:
            self._confused = True
        if pts in self._incomplete:
            begin = self.add(pts)
            if pts == self._doubted:
                self._doubted_from = begin
        if told:
            self.add(pts)

    def add(self, pts: int | None) -> int:
        """The picture of this timestamp is damaged. What is shown before it but fed later may refer
        to it too: the timestamp from which on there is damage."""
        self._confused = True
        if pts is None:
            return _NEVER
        return self._spoil(pts)

    def _spoil(self, pts: int) -> int:
        end = min((key for key in self._keyframes if key > pts), default=pts + self._healed_ticks)
        before = itertools.takewhile(lambda fed: fed != pts, self._fed)
        begin = max((fed + 1 for fed in before if fed < pts), default=pts)
        self._spoiled.append((begin, end))
        return begin

    def reaches(self, pts: int | None) -> bool:
        """Whether the picture of this timestamp is damaged, or refers to one that is."""
        return pts is not None and any(begin <= pts < end for begin, end in self._spoiled)

    def reached(self, pts: int) -> bool:
        """The same, of what was decoded before a seek as well."""
        return self.reaches(pts) or any(begin <= pts < end for begin, end in self._past)


def _ended(spoiled: deque[tuple[int, int]], pts: int) -> deque[tuple[int, int]]:
    """What is spoiled up to this timestamp at most, if it began before."""
    if not spoiled:
        return spoiled
    ended = [(begin, min(end, pts) if begin < pts else end) for begin, end in spoiled]
    return deque(ended, maxlen=_REMEMBERED)
