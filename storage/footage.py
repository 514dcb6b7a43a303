"""A video as whoever opens it needs to know it: where its file lies, and what probing found."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy import Engine, select

from storage.database import reading
from storage.ledger.planning import info_of
from storage.records import VideoInfo
from storage.schema import files, videos


@dataclass(frozen=True, slots=True)
class Footage:
    """A video of the archive."""

    video_id: int
    path_raws: tuple[bytes, ...]
    """Names of its file, the latest first; empty where none is known any more."""
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
        return self.path_raws[0] if self.path_raws else b""

    def path_that_opens(self) -> str | None:
        """The first of its names where a file lies; None where none does."""
        return next((os.fsdecode(raw) for raw in self.path_raws if os.path.exists(raw)), None)


def footage_of(engine: Engine, video_id: int) -> Footage:
    """The video of this number, which must be one."""
    with reading(engine) as connection:
        row = connection.execute(select(videos).where(videos.c.id == video_id)).mappings().one()
        places = connection.execute(
            select(files.c.path_raw, files.c.path)
            .where(files.c.video_id == video_id)
            .order_by(files.c.seen_ms.desc(), files.c.id.desc())
        ).all()
    return Footage(
        video_id=video_id,
        path_raws=tuple(place.path_raw for place in places),
        path=places[0].path if places else "",
        info=None if row["container"] is None else info_of(row),
    )
