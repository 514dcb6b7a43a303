"""A video as whoever opens it needs to know it: where its file lies, and what probing found."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy import Engine, select

from storage.database import reading
from storage.ledger.planning import info_of
from storage.records import ArchiveFile, VideoInfo
from storage.schema import files, probes, videos


@dataclass(frozen=True, slots=True)
class Footage:
    """A video of the archive."""

    video_id: int
    content_id: str
    files: tuple[ArchiveFile, ...]
    """Where it was seen, and how, the latest first; empty where no file is known any more."""
    path: str
    """The latest, printable."""
    info: VideoInfo | None
    """What probing found; None for a video that was rejected."""

    @property
    def name(self) -> str:
        """The file's own name, printable."""
        return self.path.rpartition("/")[2]

    @property
    def path_raw(self) -> bytes:
        """The latest name."""
        return self.files[0].path_raw if self.files else b""


def footage_of(engine: Engine, video_id: int) -> Footage:
    """The video of this number, which must be one."""
    with reading(engine) as connection:
        row = connection.execute(select(videos).where(videos.c.id == video_id)).mappings().one()
        places = connection.execute(
            select(files.c.path_raw, files.c.path, files.c.size_bytes, files.c.mtime_ns)
            .where(files.c.video_id == video_id)
            .order_by(files.c.seen_ms.desc(), files.c.id.desc())
        ).all()
    return Footage(
        video_id=video_id,
        content_id=row["content_id"],
        files=tuple(
            ArchiveFile(os.fsdecode(place.path_raw), place.size_bytes, place.mtime_ns)
            for place in places
        ),
        path=places[0].path if places else "",
        info=None if row["container"] is None else info_of(row),
    )


def every_path(engine: Engine) -> list[bytes]:
    """The name of every file that any job was given, read or not."""
    with reading(engine) as connection:
        named = select(files.c.path_raw).union(select(probes.c.path_raw))
        return list(connection.scalars(named))
