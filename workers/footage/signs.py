"""Signs of damage in packets that decoders decode without a word."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

from av.packet import Packet
from av.stream import Stream

from workers.footage.frame_numbers import FrameNumbers
from workers.footage.units import START_CODE, length_size, units

_ZEROS = bytes(32)
"""What a disk, a card or a transfer leaves of a block that it lost begins with this; no code of a
picture comes near it."""
_OTHER = re.compile(rb"[^\0]")
_USUAL_START = b"\0" + START_CODE

_PICTURES: dict[str, Callable[[int], bool]] = {
    "h264": lambda head: 1 <= head & 0x1F <= 5,
    "hevc": lambda head: head >> 1 & 0x3F < 32,
    "mpeg1video": lambda code: code < 0xB0,
    "mpeg2video": lambda code: code < 0xB0,
    "mpeg4": lambda code: code != 0xB2,
    "vc1": lambda code: 0x0B <= code <= 0x0D,
}
"""By codec in which nothing but a start code holds 23 zero bits in a row (ITU-T H.264 7.4.1, H.265
7.4.2, ISO/IEC 11172-2 2.4.2, 13818-2 5.2.3, 14496-2 6.2.1, SMPTE 421M annex E): whether what begins
with this byte, behind a start code or a length, belongs to a picture. Makers of cameras put what
they like into the rest."""

_MIRRORED = bytes(sum((byte >> bit & 1) << 7 - bit for bit in range(8)) for byte in range(256))
"""By byte, its bits in the other order: RFC 9043 divides as zlib does, but from the other end."""
_ALL_ONES = 0xFFFFFFFF
_FOOTER_BYTES = 8
"""Of an FFV1 slice with a checksum: 3 of its size, 1 of its state, 4 of the checksum."""


class Signs:
    """Looks at the packets that are fed to a decoder, in their order."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self._length_size = 0
        self._frame_numbers: FrameNumbers | None = None
        self._checksums = _Checksums()

    def sought(self, extradata: bytes) -> None:
        """Reading goes on elsewhere, in a stream with these global headers."""
        self._length_size = length_size(self._codec, extradata)
        if self._codec == "h264":
            self._frame_numbers = FrameNumbers()
            self._frame_numbers.learn(extradata)

    def emptied(self) -> None:
        """The next packet does not follow on the one before it."""
        if self._frame_numbers is not None:
            self._frame_numbers.restart()

    def tell(self, packet: Packet[Stream]) -> bool:
        """Whether this packet is damaged, or pictures are missing that it may refer to."""
        if self._codec == "ffv1":
            return self._checksums.fail(bytes(packet))
        if self._codec not in _PICTURES:
            return False
        if packet.has_sidedata("new_extradata"):
            self.sought(bytes(packet.get_sidedata("new_extradata")))
        data = bytes(packet)
        # FFmpeg takes start codes for what they are, whatever the headers say.
        framing = 0 if data.startswith(_USUAL_START) else self._length_size
        missing = self._frame_numbers is not None and self._frame_numbers.pass_over(
            data, framing, keyframe=packet.is_keyframe
        )
        return missing or _lacks_block(self._codec, framing, data)


class _Checksums:
    """Those at the ends of an FFV1 frame's slices (RFC 9043, 4.9), by which its decoder takes a
    slice of the frame before, and says nothing."""

    def __init__(self) -> None:
        self._true = False

    def fail(self, data: bytes) -> bool:
        """Whether a slice is damaged; never before one has shown that there are checksums."""
        mirrored = memoryview(data.translate(_MIRRORED))
        whole, end = True, len(data)
        while end >= _FOOTER_BYTES:
            footer = end - _FOOTER_BYTES
            begin = footer - int.from_bytes(data[footer : footer + 3])
            if begin < 0:
                break
            # The remainder of a slice with its checksum is 0.
            true = zlib.crc32(mirrored[begin:end], _ALL_ONES) == _ALL_ONES
            self._true |= true
            whole &= true
            end = begin
        return self._true and not (whole and end == 0)


def _lacks_block(codec: str, length_size: int, data: bytes) -> bool:
    """Whether zeros stand in the middle of a packet's picture, where its codec has none."""
    at = data.find(_ZEROS)
    if at >= 0 and length_size:
        return _lacks_block_in_units(codec, length_size, data)
    behind = 0
    while at >= 0:
        other = _OTHER.search(data, at)
        if other is None:
            return False  # What fills up a packet.
        end = other.end()
        if data[end - 1] != 1:
            start = data.rfind(START_CODE, max(behind - 3, 0), at)
            if start < 0 or _PICTURES[codec](data[start + 3]):
                return True
            start = data.find(START_CODE, end)
            if start < 0:
                return False
            end = start + 3
        behind = end
        at = data.find(_ZEROS, end)
    return False


def _lacks_block_in_units(codec: str, length_size: int, data: bytes) -> bool:
    for begin, end in units(data, length_size):
        if end > len(data):
            return True  # The zeros stand where the length of a unit was.
        if _PICTURES[codec](data[begin]):
            at = data.find(_ZEROS, begin, end)
            # Zeros that filled up a stream with start codes remain at the ends of its units.
            if at >= 0 and _OTHER.search(data, at, end) is not None:
                return True
    return False
