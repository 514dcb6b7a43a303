"""Files that stand under their name once they are complete, and never by half."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHOWN = 24
"""Characters of a name that stand in that of its unfinished file; each has four bytes at most."""
_TOLD_APART = 16
"""Hexadecimal digits that tell longer names with the same beginning apart."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at `path`: a file beside it that takes its place at the end,
    or goes away where writing fails; through a link, in the place of what it leads to.

    A device or a pipe is written into as it stands: it has a reader, and no earlier content. Its
    own name is given then, so open it once, to write from start to end. Raises OSError.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    place = Path(os.path.realpath(path))
    # The ending stays, since some writers choose the format by it; a name may be as long as the
    # file system takes, and this one must not be longer.
    name = hashlib.sha256(os.fsencode(place.name)).hexdigest()[:_TOLD_APART]
    part = place.with_name(f".{place.stem[:_SHOWN]}-{name}.part{place.suffix[:_SHOWN]}")
    try:
        yield part
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)
