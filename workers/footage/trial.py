"""A trial of seeking: whether what is read after a seek is what was read there before.

Seeking follows an index in the file, or guesses by sizes and timestamps. No demuxer tells where a
damaged index or a wrong guess has led it to: pictures of one place come with the times of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import NamedTuple
from zlib import crc32

import av.error
from av.packet import Packet
from av.stream import Stream

from workers.footage.decoder import BACK_S, SEARCHED
from workers.footage.rejection import FootageError
from workers.footage.source import Source

_PLACES = 4
"""Places that are tried at most."""
_FOLLOWING = 16
"""Packets behind a keyframe that are compared too, for only its own timestamp may be right."""
_READ = 2**12
"""Packets read at most from where a seek has led to. What is that far from its aim is read on from
there, and not sought."""


class _Landmark(NamedTuple):
    """A keyframe's checksum, and the timestamps and sizes of its packet and of those behind it."""

    checksum: int
    packets: tuple[tuple[int | None, int], ...]

    @property
    def pts(self) -> int:
        return self.packets[0][0] or 0


class _Group:
    """A keyframe and the packets behind it that pass by."""

    def __init__(self, keyframe: Packet[Stream]) -> None:
        self._keyframe = keyframe
        self._packets = [(keyframe.pts, keyframe.size)]

    def follow(self, packet: Packet[Stream]) -> bool:
        """Take the next packet; whether there is room for more."""
        if len(self._packets) <= _FOLLOWING:
            self._packets.append((packet.pts, packet.size))
        return len(self._packets) <= _FOLLOWING

    @property
    def landmark(self) -> _Landmark:
        return _Landmark(crc32(memoryview(self._keyframe)), tuple(self._packets))


class Landmarks:
    """A few keyframes of a stream, evenly spaced and its last one, by which to tell its places."""

    def __init__(self) -> None:
        self._kept: list[_Landmark] = []
        self._group: _Group | None = None
        self._number = 0
        self._every = 1

    def passing(
        self, packets: Iterable[Packet[Stream]], stream_index: int
    ) -> Iterator[Packet[Stream]]:
        """Watch packets, of any stream, on their way."""
        for packet in packets:
            if packet.stream_index == stream_index:
                if _anchors(packet):
                    self._keep()
                    self._group = _Group(packet)
                elif self._group is not None:
                    self._group.follow(packet)
            yield packet

    def _keep(self) -> None:
        """Settle the group that ends. The stream's first needs no seek."""
        if self._group is None:
            return
        # Odd ones: of telecined streams every second group begins with the first of two fields.
        if self._number and self._number % self._every == 1 % self._every:
            self._kept.append(self._group.landmark)
            if len(self._kept) == _PLACES:
                self._kept = self._kept[::2]
                self._every *= 2
        self._number += 1

    def are_found(self, path: str, stream_index: int, beat: Callable[[], None]) -> bool:
        """Whether seeks in that file, opened anew, find what has passed; False where reading fails.
        `beat` is called for every packet."""
        if self._group is None:
            return True
        places = [self._group.landmark, *reversed(self._kept)]
        try:
            with Source(path, stream_index, beat=beat) as source:
                return all(_is_found(source, place, beat) for place in places)
        except (FootageError, av.error.FFmpegError, OSError, ValueError, OverflowError):
            return False


def _anchors(packet: Packet[Stream]) -> bool:
    """Whether decoding may begin there."""
    return packet.is_keyframe and packet.pts is not None


def _is_found(source: Source, place: _Landmark, beat: Callable[[], None]) -> bool:
    """Whether a decoder that seeks to a place as decoders do comes upon what passed there. True,
    too, where it would not trust the seek and read all from the start."""
    for back in BACK_S[source.container in SEARCHED :]:
        with closing(source.packets()) as reading:
            # While packets are read, a seek may take no longer than a packet.
            next(reading, None)
            if not source.seek(place.pts - int(back / (source.stream.time_base or 1))):
                return True
        group, early = None, False
        for number, packet in enumerate(source.packets()):
            beat()
            if number == _READ:
                return True
            if _anchors(packet):
                if group is not None or (packet.pts or 0) > place.pts:
                    break
                early = True
                if packet.pts == place.pts:
                    group = _Group(packet)
            elif group is not None and not group.follow(packet):
                break
        if group is not None:
            return group.landmark == place
        if early:
            return False
    return True
