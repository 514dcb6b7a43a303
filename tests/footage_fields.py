"""H.264 field pictures, which no encoder at hand writes: uncompressed macroblocks, each field a
picture of its own (ITU-T H.264, 7.3)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
from av.packet import Packet

_ACROSS, _DOWN = 4, 4
"""Macroblocks of a frame."""
_TICKS = 3600
_IDR, _PICTURE, _SPS, _PPS, _DELIMITER = 0x65, 0x01, 0x67, 0x68, 0x09
_I_SLICE, _I_PCM = 7, 25


class _Bits:
    def __init__(self) -> None:
        self.text = ""

    def fixed(self, *fields: tuple[int, int]) -> _Bits:
        """Append (length, value) pairs."""
        self.text += "".join(f"{value:0{length}b}" for length, value in fields)
        return self

    def golomb(self, *values: int) -> _Bits:
        """Append unsigned exponential Golomb codes."""
        for value in values:
            code = f"{value + 1:b}"
            self.text += "0" * (len(code) - 1) + code
        return self

    def unit(self, head: int) -> bytes:
        """A NAL unit of it, with emulation prevention."""
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        escaped, zeros = bytearray(), 0
        for byte in int(text, 2).to_bytes(len(text) // 8):
            if zeros == 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = 0 if byte else zeros + 1
        return b"\0\0\0\1" + bytes((head,)) + bytes(escaped)


def _headers() -> bytes:
    sequence = _Bits().fixed((8, 77), (8, 0), (8, 30)).golomb(0, 4, 0, 4, 2).fixed((1, 0))
    sequence.golomb(_ACROSS - 1, _DOWN // 2 - 1).fixed((1, 0), (1, 0), (1, 1), (1, 0), (1, 0))
    pictures = _Bits().golomb(0, 0).fixed((1, 0), (1, 0)).golomb(0, 0, 0).fixed((3, 0))
    pictures.golomb(0, 0, 0).fixed((1, 1), (1, 0), (1, 0))
    return sequence.unit(_SPS) + pictures.unit(_PPS)


def _field(number: int, bottom: int, since_key: int) -> bytes:
    key = since_key == 0 and not bottom
    bits = _Bits().golomb(0, _I_SLICE, 0).fixed((8, min(since_key, 1)), (1, 1), (1, bottom))
    if key:
        bits.golomb(number % 2)
    bits.fixed((8, (2 * since_key + bottom) % 256))
    if since_key == 0:
        bits.fixed(*((1, 0),) * (2 if key else 1))
    bits.golomb(0, 1)
    for macroblock in range(_ACROSS * _DOWN // 2):
        bits.golomb(_I_PCM)
        bits.text += "0" * (-len(bits.text) % 8)
        light = 40 + (number * 7 + macroblock * 5 + bottom * 3) % 180
        bits.fixed(*((8, light),) * 256, *((8, 100 + number % 50),) * 128)
    reference = 0x60 if since_key == 0 else 0
    return bits.unit(_IDR if key else _PICTURE | reference)


def field_pictures(
    path: Path, count: int, *, keys: int = 25, apart: bool = False, damaged: int | None = None
) -> Path:
    """Write a video of frames in two fields each, at 25 frames a second; only keyframes are
    referred to. In MPEG-TS the second field has no timestamp, or with `apart` its own. The
    first field of the frame `damaged` ends in noise."""
    delimiter = b"\0\0\0\1" + bytes((_DELIMITER, 0xF0))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16 * _ACROSS, 16 * _DOWN, "yuv420p"
        stream.time_base = Fraction(1, 25 * _TICKS)
        stream.codec_context.extradata = _headers()
        for number in range(count):
            since_key = number % keys
            head = delimiter + (b"" if since_key else _headers())
            fields = [
                head + _field(number, 0, since_key),
                delimiter + _field(number, 1, since_key),
            ]
            if number == damaged:
                fields[0] = fields[0][:40] + b"\xff" * (len(fields[0]) - 40)
            for place, data in enumerate(fields if apart else [b"".join(fields)]):
                packet = Packet(data)
                packet.stream, packet.time_base = stream, stream.time_base
                packet.pts = packet.dts = _TICKS * number + place * _TICKS // 2
                packet.is_keyframe = since_key == 0 and place == 0
                container.mux(packet)
    return path
