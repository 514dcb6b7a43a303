"""What a packet's first bytes say about its picture, without a decoder.

Containers mark packets as keyframes that are none: recovery points of intra-refresh streams, whole
files whose table of keyframes was lost. Decoding that starts at such a packet gives wrong pictures
without any error, so the mark is compared with the picture's own headers (ITU-T H.264 7.3.3,
H.265 7.3.1.2, ISO/IEC 14496-2 6.2.5, ISO/IEC 13818-2 6.2.3, RFC 6386 9.1).
"""

from __future__ import annotations

from collections.abc import Iterator

HEAD_BYTES = 2**14
"""Bytes of a keyframe's packet that are looked at: its first slices begin there."""

_H264_SLICE, _H264_IDR = 1, 5
_H264_INTRA_SLICES = frozenset((2, 4, 7, 9))
_HEVC_FIRST_NON_VCL, _HEVC_IRAP = 32, range(16, 24)
_SLICES_READ = 16
_START_CODE = b"\x00\x00\x01"


def contradicts_keyframe(codec: str, extradata: bytes, packet: bytes) -> bool:
    """True where a packet marked as a keyframe holds a picture that needs others.

    `packet`: its first HEAD_BYTES at least. False for an intra picture, and for codecs and packets
    whose headers are not understood.
    """
    match codec:
        case "h264":
            return _h264_needs_others(extradata, packet)
        case "hevc":
            kinds = ((unit[0] >> 1) & 0x3F for unit in _units(packet, _length_size(extradata, 21)))
            picture = next((kind for kind in kinds if kind < _HEVC_FIRST_NON_VCL), None)
            return picture is not None and picture not in _HEVC_IRAP
        case "mpeg4":
            at = packet.find(b"\x00\x00\x01\xb6")
            return 0 <= at < len(packet) - 4 and packet[at + 4] >> 6 != 0
        case "mpeg1video" | "mpeg2video":
            at = packet.find(b"\x00\x00\x01\x00")
            return 0 <= at < len(packet) - 5 and (packet[at + 5] >> 3) & 7 != 1
        case "vp8":
            return bool(packet) and packet[0] & 1 != 0
    return False


def may_hide(codec: str) -> bool:
    """True for codecs of which every packet must be looked at to tell whether it is shown."""
    return codec == "vp8"


def is_hidden(codec: str, packet: memoryview) -> bool:
    """True for a packet whose picture is never shown: a VP8 reference frame (RFC 6386 9.1)."""
    return may_hide(codec) and len(packet) > 0 and not packet[0] >> 4 & 1


def _h264_needs_others(extradata: bytes, packet: bytes) -> bool:
    slices = 0
    for unit in _units(packet, _length_size(extradata, 4)):
        kind = unit[0] & 0x1F
        if kind == _H264_IDR:
            return False
        if kind != _H264_SLICE:
            continue
        _first_macroblock, slice_type = _exp_golomb(unit[1:16], 2)
        if slice_type not in _H264_INTRA_SLICES:
            return True
        slices += 1
        if slices == _SLICES_READ:
            break
    return False


def _length_size(extradata: bytes, at: int) -> int:
    """Bytes of a unit's length prefix by the configuration record; 0 where start codes divide."""
    framed = len(extradata) > at and extradata[0] == 1
    return (extradata[at] & 3) + 1 if framed else 0


def _units(packet: bytes, length_size: int) -> Iterator[bytes]:
    """The beginnings (up to 64 bytes) of a packet's network abstraction layer units."""
    if length_size:
        at = 0
        while at + length_size < len(packet):
            size = int.from_bytes(packet[at : at + length_size], "big")
            at += length_size
            if size:
                yield packet[at : at + min(size, 64)]
            at += size
        return
    at = packet.find(_START_CODE)
    while 0 <= at < len(packet) - 3:
        yield packet[at + 3 : at + 67]
        at = packet.find(_START_CODE, at + 3)


def _exp_golomb(data: bytes, count: int) -> list[int]:
    """The first unsigned Exp-Golomb numbers of a bit string; -1 where it ends too early."""
    bits = int.from_bytes(data, "big")
    left = len(data) * 8
    numbers: list[int] = []
    for _ in range(count):
        zeros = 0
        while left and not bits >> (left - 1) & 1:
            zeros += 1
            left -= 1
        if left < zeros + 1:
            return [*numbers, *[-1] * (count - len(numbers))]
        left -= zeros + 1
        numbers.append((bits >> left & (1 << (zeros + 1)) - 1) - 1)
    return numbers
