"""The units that H.264 and H.265 packets consist of, as containers divide them: by a length before
each of them (ISO/IEC 14496-15) or by start codes (ITU-T H.264 and H.265, annex B)."""

from __future__ import annotations

import re
from collections.abc import Iterator

START_CODE = b"\x00\x00\x01"
_START = re.compile(START_CODE)
_LENGTH_SIZE_AT = {"h264": 4, "hevc": 21}
"""Where a configuration record tells how many bytes a length has."""


def length_size(codec: str, extradata: bytes) -> int:
    """Bytes of a unit's length by the configuration record; 0 where start codes divide."""
    at = _LENGTH_SIZE_AT.get(codec, len(extradata))
    framed = len(extradata) > at and extradata[0] == 1
    return (extradata[at] & 3) + 1 if framed else 0


def units(data: bytes, length_size: int) -> Iterator[tuple[int, int]]:
    """Where a packet's units begin and end, empty ones left out. With lengths, the last may end
    beyond the packet; with start codes, zeros before the next one count to a unit."""
    if length_size:
        at = 0
        while at + length_size < len(data):
            begin = at + length_size
            at = begin + int.from_bytes(data[at:begin], "big")
            if at > begin:
                yield begin, at
        return
    begin = len(data)
    for start in _START.finditer(data):
        if begin < start.start():
            yield begin, start.start()
        begin = start.end()
    if begin < len(data):
        yield begin, len(data)
