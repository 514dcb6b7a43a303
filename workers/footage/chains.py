"""Whether the elements of a container follow each other in the file from one packet to the next.

Matroska: RFC 8794 and RFC 9559. FLV: Adobe Flash Video File Format Specification 10.1, annex E.
"""

from __future__ import annotations

import os

_INTO = frozenset((0x18538067, 0x1F43B675, 0xA0))
"""Segment, Cluster and BlockGroup, whose content is walked too."""
_ELEMENTS = _INTO | {
    *(0x1A45DFA3, 0xA3, 0xA1, 0xE7, 0xAB, 0xA7, 0x9B, 0xFB, 0xFD, 0xA2, 0xA4, 0x75A1, 0xEC, 0xBF),
    *(0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x5854),
    *(0x75A2, 0x8E, 0xAF),
}
"""Everything that stands beside blocks, clusters, or in them."""
_HEAD_BYTES = 12
_BLOCK_HEAD_BYTES = 64
"""Bytes of a block's own header and of those around it, at most."""
_TAG_HEAD_BYTES, _TAG_TAIL_BYTES = 11, 4
_TAGS = frozenset((8, 9, 18))
"""Sound, pictures and data."""
_MOST_ELEMENTS = 2**16


def lead_on(path: str, container: str, begin: int, end: int, to: int) -> bool:
    """Whether elements lead from a packet at `begin`, whose bytes end at about `end`, to the next
    one at `to`; all are offsets. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        if container == "flv":
            return _tags_lead(file.fileno(), begin, to)
        starts = range(end, min(end + _BLOCK_HEAD_BYTES, to))
        return any(_elements_lead(file.fileno(), start, to) for start in starts)


def _tags_lead(descriptor: int, at: int, to: int) -> bool:
    for _ in range(_MOST_ELEMENTS):
        if at >= to:
            return at == to
        head = os.pread(descriptor, _TAG_HEAD_BYTES, at)
        if len(head) < _TAG_HEAD_BYTES or head[0] & 31 not in _TAGS or any(head[8:]):
            return False
        at += _TAG_HEAD_BYTES + int.from_bytes(head[1:4], "big") + _TAG_TAIL_BYTES
    return False


def _elements_lead(descriptor: int, at: int, to: int) -> bool:
    for _ in range(_MOST_ELEMENTS):
        if at >= to:
            return True
        head = os.pread(descriptor, _HEAD_BYTES, at)
        length = _length(head)
        kind = int.from_bytes(head[:length], "big")
        if kind not in _ELEMENTS:
            return False
        size_length = _length(head[length:])
        if not size_length:
            return False
        size = int.from_bytes(head[length : length + size_length], "big")
        at += length + size_length
        at += 0 if kind in _INTO else size - (1 << 7 * size_length)
    return False


def _length(number: bytes) -> int:
    """Bytes of a number of variable length; 0 where there is none."""
    return 9 - number[0].bit_length() if number and number[0] else 0
