"""Empty slots at the end of an AVI file: chunks without a byte, which repeat the picture before and
which demuxers pass over. (Chunk layout: RIFF; Microsoft's AVI RIFF file reference.)"""

from __future__ import annotations

import os

_LISTS = (b"RIFF", b"LIST")
SLOT_BYTES = _HEAD_BYTES = 8
_MOST_CHUNKS = 2**20


def empty_slots(path: str, at: int, stream_index: int) -> int:
    """How many empty chunks of a stream lie behind a byte offset at which a chunk ends.

    Looks at a million chunks at most. Raises OSError.
    """
    picture = b"%02d" % stream_index
    count, at = 0, at + at % 2
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for _ in range(_MOST_CHUNKS):
            head = os.pread(file.fileno(), _HEAD_BYTES, at)
            if len(head) < _HEAD_BYTES:
                break
            kind, length = head[:4], int.from_bytes(head[4:], "little")
            if kind in _LISTS:
                at += _HEAD_BYTES + 4
                continue
            if length == 0 and kind[:2] == picture and kind[2:] in (b"dc", b"db"):
                count += 1
            at += _HEAD_BYTES + length + length % 2
            if at > size:
                break
    return count
