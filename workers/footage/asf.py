"""How long an ASF file (WMV) lasts by its header. FFmpeg gives that to every stream, however long
it is, and to none where the file has not the size of which the header tells: where it is cut off.
(File Properties Object: Microsoft's Advanced Systems Format specification, 3.2.)"""

from __future__ import annotations

import os

_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_HEAD_BYTES, _OBJECT_HEAD_BYTES, _PROPERTIES_BYTES = 30, 24, 104
_BROADCAST = 1
_MOST_OBJECTS = 2**10


def header_end_us(path: str) -> int | None:
    """Where a file's longest stream ends by its header, in microseconds of the file's clock; None
    where the header does not say, as of what was written while it was sent, or contradicts itself.

    Looks at a thousand objects at most. Raises OSError.
    """
    at = _HEAD_BYTES
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for _ in range(_MOST_OBJECTS):
            if at + _PROPERTIES_BYTES > size:
                break
            found = os.pread(file.fileno(), _PROPERTIES_BYTES, at)
            if found[:16] == _FILE_PROPERTIES:
                return _end_us(found)
            at += max(_OBJECT_HEAD_BYTES, int.from_bytes(found[16:24], "little"))
    return None


def _end_us(properties: bytes) -> int | None:
    played_100ns, preroll_ms, flags = (
        int.from_bytes(properties[begin:end], "little")
        for begin, end in ((64, 72), (80, 88), (88, 92))
    )
    # All times of the file begin with what players buffer before they show anything.
    lasting = played_100ns // 10 - preroll_ms * 1000
    return lasting if lasting > 0 and not flags & _BROADCAST else None
