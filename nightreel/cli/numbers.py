"""The numbers of videos beside their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from nightreel.cli.output import VIDEO, Column, Row

NUMBER = Column("video_id", "No.", justify="right")


def numbered(columns: Sequence[Column], rows: Sequence[Row], form: str) -> list[Column]:
    """The columns, of which a table has `NUMBER` only where two videos bear one file name, and
    need a number to be told apart by; data have it always."""
    names = {row[NUMBER.key]: PurePath(row[VIDEO]).name for row in rows}
    told_apart = form == "table" and len(set(names.values())) == len(names)
    return [column for column in columns if not (told_apart and column.key == NUMBER.key)]
