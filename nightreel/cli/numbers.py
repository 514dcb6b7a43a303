"""The numbers of videos beside their paths."""

from __future__ import annotations

import os
from collections.abc import Sequence

from nightreel.cli.output import VIDEO, Column, Row

NUMBER = Column("video_id", "No.", justify="right")


def numbered(columns: Sequence[Column], rows: Sequence[Row], form: str) -> list[Column]:
    """The columns, of which a table has `NUMBER` only where two videos bear one file name, and
    need a number to be told apart by; data have it always."""
    if form == "table":
        names = {row[NUMBER.key]: os.path.basename(row[VIDEO]) for row in rows}
        if len(set(names.values())) == len(names):
            return [column for column in columns if column.key != NUMBER.key]
    return list(columns)
