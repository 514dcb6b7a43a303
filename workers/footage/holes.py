"""Frames that are missing between packets, where a container lets that be told.

Theora in Ogg has a packet for every frame, a fragmented MP4 numbers its fragments, a transport
stream its pieces, and the packets of Matroska and FLV lie side by side in the file. That time
passes between two packets is no sign in itself: a frame stands until the next one, and recorders of
screens write none while nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from workers.footage.sample import Ints
from workers.footage.theora import stores_every_frame

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream

    from workers.footage.fragments import Fragments

_TILED = frozenset(("matroska,webm", "flv"))
_NUMBERED = frozenset(("mpegts",))
_MARKED_BEFORE = 3
"""Packets up to which a mark of corruption may come before the hole that it is about: a parser lags
behind by one, and the packet before the hole is marked, for nothing tells that it is complete."""
_BETWEEN_BYTES = 2**10
"""Bytes from which on what lies between two packets of a tiled container is looked at. Headers of
blocks and clusters take up to 25."""
_MOST_MISSING = 2**20
"""Frames that are missing at one place at most, ten hours. More in Theora are a damaged timestamp;
in others, where something is known to be missing, they last longer."""


def position(packet: Packet[Stream]) -> int | None:
    """The offset at which a packet lies in the file, if known."""
    return packet.opaque if packet.pos is None and isinstance(packet.opaque, int) else packet.pos


def are_numbered(container: str) -> bool:
    """Whether a container marks packets near which a part of the file is missing."""
    return container in _NUMBERED


def are_tiled(container: str) -> bool:
    """Whether the packets of a container follow each other in the file, of whichever stream."""
    return container in _TILED


class Hole(NamedTuple):
    """A place between two packets where others are missing; in running time."""

    begin: int
    """Timestamp at which the first one is missing."""
    decoding: bool
    """Whether that is a decoding timestamp, or one of presentation."""
    step: int
    """What each of them lasts."""
    missing: int
    """How many they are."""
    damaged_from: int
    """From this timestamp on frames behind the hole may refer to what is missing, up to the next
    keyframe; none before the hole is shown then."""


class Holes:
    """Finds holes while packets pass by in decoding order."""

    def __init__(
        self,
        container: str,
        codec: str,
        fragments: Fragments | None,
        *,
        lead_on: Callable[[int, int, int], bool] | None,
    ) -> None:
        """`lead_on` tells of a tiled container, of which `covering` sees the packets of all
        streams, whether its elements lead from a packet's offset and end to the next packet."""
        self._lead_on = lead_on
        self._numbered = are_numbered(container)
        self._marked = 0
        self._uncovered = False
        self._stored = stores_every_frame(codec)
        self._fragments = fragments
        self._until: int | None = None
        self._step = 0
        self._latest = 0
        self._least_delay = 2**63
        self._position: int | None = None

    def covering(self, packets: Iterable[Packet[Stream]]) -> Iterator[Packet[Stream]]:
        """Watch the packets of all streams go by, for what lies between them in the file."""
        if self._lead_on is None:
            yield from packets
            return
        begin = end = -1
        for packet in packets:
            if packet.pos is not None:
                if packet.pos > end + _BETWEEN_BYTES and begin >= 0:
                    self._uncovered |= not self._lead_on(begin, end, packet.pos)
                # The frames of one block have one offset.
                end = packet.size + (end if packet.pos == begin else packet.pos)
                begin = packet.pos
            yield packet

    def before(self, packet: Packet[Stream], pts: int | None, dts: int | None) -> Hole | None:
        """The hole before a packet that has these timestamps in running time."""
        duration, decoding = packet.duration, not (self._stored or self._lead_on)
        if not decoding:
            # FFmpeg makes up decoding timestamps of Matroska, wrong ones behind a hole.
            dts = pts
        self._marked = _MARKED_BEFORE if packet.is_corrupt else self._marked - 1
        uncovered, self._uncovered = self._uncovered, False
        if pts is None or dts is None or not duration or packet.is_discard:
            return None
        until = self._until
        self._until = dts + duration if until is None else max(until, dts + duration)
        step, self._step = min(duration, self._step or duration), duration
        latest, self._latest = self._latest, max(self._latest, pts)
        self._least_delay = min(self._least_delay, pts - dts)
        at, self._position = self._position, position(packet)
        if until is None:
            self._latest = pts
            return None
        if 2 * (dts - until) < step or not (uncovered or self._lacks(at, self._position)):
            return None
        missing = round((dts - until) / step)
        if missing > _MOST_MISSING:
            if self._stored:
                return None
            missing, step = _MOST_MISSING, (dts - until) // _MOST_MISSING
        damaged_from = latest + 1
        if not packet.is_keyframe:
            damaged_from = min(damaged_from, dts + self._least_delay)
        return Hole(until, decoding, step, missing, damaged_from)

    def _lacks(self, earlier: int | None, later: int | None) -> bool:
        if self._fragments is None or earlier is None or later is None:
            return self._stored or (self._numbered and self._marked >= 0)
        return self._fragments.lack_between(earlier, later)


def missing_times(hole: Hole, pts: Ints, delays: Ints) -> Ints:
    """When the missing frames of a hole would be shown: at times that are no other frame's, the
    earliest that its packets may have.

    `pts` are the timestamps of the frames that are there, ascending; `delays` how much later than
    decoded they are shown, at least and at most.
    """
    least, most = delays.tolist() if hole.decoding else (0, 0)
    slots = hole.missing + -(-(most - least) // hole.step)
    times = hole.begin + least + hole.step * np.arange(slots, dtype=np.int64)
    at = np.searchsorted(pts, times)
    after = pts[np.minimum(at, len(pts) - 1)] - times
    before = times - pts[np.maximum(at - 1, 0)]
    free = 2 * np.minimum(np.abs(after), np.abs(before)) > hole.step
    missing: Ints = times[free][: hole.missing]
    return missing
