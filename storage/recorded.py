"""The day a video was recorded, and where that is known from."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from enum import StrEnum

_EARLIEST_YEAR, _LATEST_YEAR = 1950, 2099
"""Clocks that were never set say 1904 or 1970; 1970 is refused by its first day below."""
_UNSET = frozenset({date(1970, 1, 1), date(1980, 1, 1), date(2000, 1, 1)})
"""Where cameras' clocks start that were never set."""

_WRITTEN = re.compile(r"(\d{4})([-:/.]?)(\d{2})\2(\d{2})(?!\d)")
"""ISO 8601 with or without hyphens, and as Exif writes days (2024:07:01)."""
_IN_NAME = re.compile(
    # The separator may stand after the year alone (2024_0701),
    r"(?<!\d)(\d{4})([-_. ]?)(\d{2})\2?(\d{2})"
    # and the time of day may follow at once (202407011234, 20240701123456).
    r"(?:(?:[01]\d|2[0-3])[0-5]\d(?:[0-5]\d)?)?(?!\d)"
)


class DateSource(StrEnum):
    """What a day of recording was taken from."""

    CONTAINER = "container"
    NAME = "file name"
    MODIFIED = "modification time"


def recorded(created: str | None, path: str, mtime_ns: int) -> tuple[date, DateSource] | None:
    """The day of recording: by the container's metadata as it is written there, else by a date in
    the file's name, else by its modification time (UTC); None where none of them can be."""
    if created is not None and (found := _WRITTEN.match(created.strip())):
        day = _plausible(found[1], found[3], found[4])
        if day is not None:
            return day, DateSource.CONTAINER
    for found in _IN_NAME.finditer(path.rpartition("/")[2]):
        day = _plausible(found[1], found[3], found[4])
        if day is not None:
            return day, DateSource.NAME
    if mtime_ns <= 0:
        return None
    try:
        return datetime.fromtimestamp(mtime_ns // 10**9, UTC).date(), DateSource.MODIFIED
    except (OverflowError, ValueError, OSError):
        return None


def _plausible(year: str, month: str, day: str) -> date | None:
    try:
        found = date(int(year), int(month), int(day))
    except ValueError:
        return None
    return found if _EARLIEST_YEAR <= found.year <= _LATEST_YEAR and found not in _UNSET else None
