"""Theora in Ogg has a packet for every frame, if only one without bytes that repeats the frame
before: where none is there frames are missing, and nothing else tells of them. (Theora I, A.2.)"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.packet import Packet
    from av.stream import Stream


def stores_every_frame(codec: str) -> bool:
    """True for the codec that this module is about."""
    return codec == "theora"


def timed_by_page(packets: Iterable[Packet[Stream]], stream_index: int) -> Iterator[Packet[Stream]]:
    """The same packets, those of a page behind missing ones at their true time: a page tells where
    its last frame stands, and FFmpeg has it only with the next page. A packet that lost its end on
    a missing page is marked as corrupt."""
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
                yield from _marked(page)
                page.clear()
            page.append(packet)
    except Exception:
        yield from _marked(page)
        raise
    yield from _marked(page)


def _marked(page: list[Packet[Stream]]) -> list[Packet[Stream]]:
    """A page's packets; one that began before a missing page is marked as corrupt, for it goes on
    with the end of another: it stands where it began, and what follows where that other ended."""
    for one, following in itertools.pairwise(page):
        if (following.dts or 0) - (one.dts or 0) > (one.duration or 1):
            one.is_corrupt = True
    return page
