"""Theora in Ogg has a packet for every frame, if only one without bytes that repeats the frame
before: where none is there frames are missing, and nothing else tells of them. (Theora I, A.2.)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream

_MOST_MISSING = 2**20
"""Frames that are missing at one place at most, ten hours; more is a damaged timestamp."""


def stores_every_frame(codec: str) -> bool:
    """True for the codec that this module is about."""
    return codec == "theora"


class Holes:
    """Frames that are missing between packets; of other codecs none is known."""

    def __init__(self, codec: str) -> None:
        self._stored = stores_every_frame(codec)
        self._until: int | None = None

    def before(self, dts: int | None, duration: int | None) -> range:
        """Timestamps at which frames are missing before a packet. For each once, in order."""
        if not self._stored or dts is None or not duration:
            return range(0)
        until, self._until = self._until, dts + duration
        if until is None or dts - until > _MOST_MISSING * duration:
            return range(0)
        return range(until, dts, duration)


def timed_by_page(packets: Iterable[Packet[Stream]], stream_index: int) -> Iterator[Packet[Stream]]:
    """The same packets, those of a page behind missing ones at their true time: a page tells where
    its last frame stands, and FFmpeg has it only with the next page."""
    page: list[Packet[Stream]] = []
    try:
        for packet in packets:
            if packet.stream_index != stream_index or packet.dts is None:
                yield packet
                continue
            if page and packet.pos != page[-1].pos:
                last = page[-1]
                missing = packet.dts - (last.dts or 0) - (last.duration or 0)
                for one in page:
                    if missing > 0 and one.dts is not None:
                        one.pts = one.dts = one.dts + missing
                yield from page
                page.clear()
            page.append(packet)
    except Exception:
        yield from page
        raise
    yield from page
