"""What a packet's first bytes say about its picture, without a decoder.

Containers mark packets as keyframes that are none: recovery points of intra-refresh streams, whole
files whose table of keyframes was lost. Decoding that starts at such a packet gives wrong pictures
without any error, so the mark is compared with the picture's own headers (ITU-T H.264 7.3.3,
H.265 7.3.1.2, H.263 5.1, ISO/IEC 14496-2 6.2.5, ISO/IEC 13818-2 6.2.3, RFC 6386 9.1, RFC 9043 4.4).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from workers.footage.sample import Flags
from workers.footage.units import length_size, units

HEAD_BYTES = 2**14
"""Bytes of a keyframe's packet that are looked at: its first slices begin there."""

_H264_SLICE, _H264_IDR = 1, 5
_H264_INTRA_SLICES = frozenset((2, 4, 7, 9))
_HEVC_FIRST_NON_VCL, _HEVC_IRAP = 32, range(16, 24)
_SLICES_READ = 16
_H263_EXTENDED = 7
_DIRAC_PICTURE, _DIRAC_REFERENCES = 8, 3
_INTRA_BY_CUSTOM = frozenset(("png", "cfhd"))
"""Codecs that FFmpeg knows to have other pictures, and recordings of which hold none."""
_MARKED_IN_A_ROW = 32
"""Keyframes that no encoder makes one after the other, unless it makes nothing else."""


def contradicts_keyframe(codec: str, extradata: bytes, packet: bytes) -> bool:
    """True where a packet marked as a keyframe holds a picture that needs others.

    `packet`: its first HEAD_BYTES at least. False for an intra picture, and for codecs and packets
    whose headers are not understood.
    """
    needs_others = _CHECKS.get(codec)
    return bool(packet) and needs_others is not None and needs_others(extradata, packet)


def marks_everything(codec: str, keyframe: Flags, *, intra_only: bool) -> bool:
    """True where marks of keyframes tell nothing: all frames have one, or many in a row, of a codec
    that has other frames and whose headers are not understood. FFmpeg marks so where a file has no
    table of them, or where it ends too early."""
    if intra_only or codec in _INTRA_BY_CUSTOM or codec in _CHECKS or not keyframe.any():
        return False
    longest = int(np.diff(np.flatnonzero(~np.pad(keyframe, 1))).max()) - 1
    return longest >= min(len(keyframe), _MARKED_IN_A_ROW)


def may_hide(codec: str) -> bool:
    """True for codecs of which every packet must be looked at to tell whether it is shown."""
    return codec == "vp8"


def is_hidden(codec: str, packet: memoryview) -> bool:
    """True for a packet whose picture is never shown: a VP8 reference frame (RFC 6386 9.1)."""
    return may_hide(codec) and len(packet) > 0 and not packet[0] >> 4 & 1


def _hevc_needs_others(extradata: bytes, packet: bytes) -> bool:
    spans = units(packet, length_size("hevc", extradata))
    kinds = ((packet[begin] >> 1) & 0x3F for begin, _end in spans)
    picture = next((kind for kind in kinds if kind < _HEVC_FIRST_NON_VCL), None)
    return picture is not None and picture not in _HEVC_IRAP


def _mpeg4_needs_others(_extradata: bytes, packet: bytes) -> bool:
    at = packet.find(b"\x00\x00\x01\xb6")
    return 0 <= at < len(packet) - 4 and packet[at + 4] >> 6 != 0


def _mpeg2_needs_others(_extradata: bytes, packet: bytes) -> bool:
    at = packet.find(b"\x00\x00\x01\x00")
    return 0 <= at < len(packet) - 5 and (packet[at + 5] >> 3) & 7 != 1


def _h263_needs_others(_extradata: bytes, packet: bytes) -> bool:
    bits = int.from_bytes(packet[:8].ljust(8, b"\0"), "big")
    if bits >> 26 & 7 != _H263_EXTENDED:
        return bool(bits >> 25 & 1)
    # The picture's type stands behind the optional fields, where they are updated.
    return bits >> (2 if bits >> 23 & 7 == 1 else 20) & 7 != 0


def _dirac_needs_others(_extradata: bytes, packet: bytes) -> bool:
    at = packet.find(b"BBCD")
    while 0 <= at < len(packet) - 4:
        if packet[at + 4] & _DIRAC_PICTURE:
            return packet[at + 4] & _DIRAC_REFERENCES != 0
        at = packet.find(b"BBCD", at + 4)
    return False


def _h264_needs_others(extradata: bytes, packet: bytes) -> bool:
    slices = 0
    for begin, _end in units(packet, length_size("h264", extradata)):
        kind = packet[begin] & 0x1F
        if kind == _H264_IDR:
            return False
        if kind != _H264_SLICE:
            continue
        _first_macroblock, slice_type = _exp_golomb(packet[begin + 1 : begin + 16], 2)
        if slice_type not in _H264_INTRA_SLICES:
            return True
        slices += 1
        if slices == _SLICES_READ:
            break
    return False


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


_CHECKS: dict[str, Callable[[bytes, bytes], bool]] = {
    "h264": _h264_needs_others,
    "hevc": _hevc_needs_others,
    "mpeg4": _mpeg4_needs_others,
    "mpeg1video": _mpeg2_needs_others,
    "mpeg2video": _mpeg2_needs_others,
    "h263": _h263_needs_others,
    "dirac": _dirac_needs_others,
    "vp8": lambda _extradata, packet: packet[0] & 1 != 0,
    # DivX 3 and Windows Media Video begin with the picture's type, 0 for intra.
    "msmpeg4v2": lambda _extradata, packet: packet[0] >> 6 != 0,
    "msmpeg4v3": lambda _extradata, packet: packet[0] >> 6 != 0,
    "wmv1": lambda _extradata, packet: packet[0] >> 6 != 0,
    "wmv2": lambda _extradata, packet: packet[0] >> 7 != 0,
    # The first decision of the range coder, of even odds.
    "ffv1": lambda _extradata, packet: packet[:2] < b"\x7f\x80",
}
"""By codec, what tells from global headers and a packet whether its picture needs others."""
