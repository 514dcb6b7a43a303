"""The archive's own files: opened as a job saw them, and never written over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.footage import Footage


def original_of(footage: Footage) -> str:
    """Path of a file that holds what was analysed, as a worker finds it.

    Raises UsageError where the video's file is gone, or another lies in its place.
    """
    from storage.summaries import nowhere
    from workers.places import place_of
    from workers.probing import FileUnreadable

    try:
        return place_of(footage.files, footage.content_id).path
    except FileUnreadable as error:
        place = footage.path or nowhere(footage.video_id)
        raise click.UsageError(f"{place}: {error}.") from None


def spare_originals(engine: Engine, output: Path) -> None:
    """Raise UsageError where to write `output` would destroy a file of the archive, or the
    database.

    Every one of them is looked at: links and mounts give a file names that no comparison of paths
    sees. What SQLite keeps beside its database is refused before it is there, too.
    """
    from storage.footage import every_path

    of_database = list[str]()
    if engine.dialect.name == "sqlite":
        file = os.path.realpath(str(engine.url.database))
        of_database = [file + ending for ending in ("", "-wal", "-shm", "-journal")]
    there = _seen(output)
    if os.path.realpath(output) in of_database or any(_is(one, there) for one in of_database):
        raise click.UsageError(f"{output}: it is the database; name another file.")
    if there is None:
        return
    if any(_is(path_raw, there) for path_raw in every_path(engine)):
        raise click.UsageError(
            f"{output}: it is a video of the archive, which would be lost; name another file."
        )


def _is(path: str | bytes, there: os.stat_result | None) -> bool:
    one = _seen(path)
    return one is not None and there is not None and os.path.samestat(one, there)


def _seen(path: str | bytes | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
