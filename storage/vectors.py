"""Stored embeddings, read back in bulk: a video's vectors at a time, whatever ranges they were
committed in."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, Select, select

from storage.bulk import by_driver
from storage.database import reading, writing
from storage.dialect import among, insert
from storage.records import Fit, Sampling
from storage.schema import embeddings, job_videos, text_vectors

BUCKET, T_US, START_US, END_US = range(4)
"""Columns of `VideoVectors.times`."""

_ROWS_AT_ONCE = 64
"""Ranges fetched at a time: some megabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class VideoVectors:
    """The embedded samples of one video under one sampling, in order of time."""

    video_id: int
    sampling: str
    fit: str
    times: npt.NDArray[np.int64]
    """Samples x (bucket, t_us, start_us, end_us)."""
    parts: Sequence[npt.NDArray[np.float16]]
    """`vectors` as they are stored, some samples each."""

    @property
    def vectors(self) -> npt.NDArray[np.float16]:
        """Samples x dimension, of unit length; of several squares of a sample one after the
        other. Made each time it is asked for."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)


def of_job(  # noqa: PLR0917
    connection: Connection,
    job_id: int,
    sampling: Sampling | str,
    fit: Fit | str,
    model: str,
    video_ids: Iterable[int] | None = None,
) -> Iterator[VideoVectors]:
    """The embeddings of the job's videos (or of some of them) as its sampling, fit and model have
    them, made by whichever job; by number of video. Videos without any are left out."""
    of_job = select(job_videos.c.video_id).where(job_videos.c.job_id == job_id)
    if video_ids is not None:
        of_job = of_job.where(among(connection, job_videos.c.video_id, video_ids))
    # Not a join: for one of those SQLite would sort the rows, vectors and all.
    query = _rows().where(
        embeddings.c.video_id.in_(of_job),
        embeddings.c.sampling == str(sampling),
        embeddings.c.fit == fit,
        embeddings.c.model == model,
    )
    return _by_video(connection, query)


def of_model(connection: Connection, model: str) -> Iterator[VideoVectors]:
    """All embeddings of a model; a video that was sampled or fitted in several ways comes several
    times."""
    return _by_video(connection, _rows().where(embeddings.c.model == model))


def _rows() -> Select[int, str, str, int, bytes, bytes]:
    return select(
        embeddings.c.video_id,
        embeddings.c.sampling,
        embeddings.c.fit,
        embeddings.c.dimension,
        embeddings.c.times,
        embeddings.c.vectors,
    ).order_by(
        embeddings.c.video_id,
        embeddings.c.sampling,
        embeddings.c.fit,
        # In the order of the unique index, or a database would sort gigabytes.
        embeddings.c.model,
        embeddings.c.bucket_start,
        embeddings.c.bucket_end,
    )


def _by_video(
    connection: Connection, query: Select[int, str, str, int, bytes, bytes]
) -> Iterator[VideoVectors]:
    with _fetched(connection, query) as rows:
        for (video_id, sampling, fit), of_video in groupby(rows, key=lambda row: tuple(row[:3])):
            times, vectors, after = [], [], -1
            for *_, dimension, times_of_range, vectors_of_range in of_video:
                found = np.frombuffer(times_of_range, dtype="<i8").reshape(-1, 4)
                matrix = np.frombuffer(vectors_of_range, dtype="<f2").reshape(-1, dimension)
                # Ranges that were cut elsewhere by another job may overlap.
                if found[0, BUCKET] < after:
                    fresh = found[:, BUCKET] >= after
                    found, matrix = found[fresh], matrix[fresh]
                if len(found):
                    after = int(found[-1, BUCKET]) + 1
                    times.append(found)
                    vectors.append(matrix)
            yield VideoVectors(video_id, sampling, fit, np.concatenate(times), vectors)


@contextmanager
def _fetched(
    connection: Connection, query: Select[*tuple[Any, ...]]
) -> Iterator[Iterable[Sequence[Any]]]:
    """Rows of a query of `_rows`, some megabytes of which are in memory at once."""
    if connection.dialect.name != "postgresql":
        with connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE)) as rows:
            yield rows
        return
    # Not a cursor: the server sends a copy on and on, and its bytes as they are. One that is left
    # early is cancelled, which the transaction survives by its savepoint.
    compiled = query.compile(
        dialect=connection.dialect, compile_kwargs={"render_postcompile": True}
    )
    statement = f"COPY ({compiled}) TO STDOUT (FORMAT BINARY)"
    with (
        connection.begin_nested(),
        by_driver(connection, statement) as driver,
        driver.cursor() as cursor,
        cursor.copy(statement, compiled.params) as copy,
    ):
        copy.set_types(["int8", "text", "text", "int4", "bytea", "bytea"])
        yield copy.rows()


@contextmanager
def ahead(stored: Iterable[VideoVectors]) -> Iterator[Iterator[VideoVectors]]:
    """The same, each video fetched in a thread of its own while the one before is worked on.

    Its connection must not be used before the context ends.
    """
    videos = iter(stored)

    def fetched() -> Iterator[VideoVectors]:
        coming = thread.submit(next, videos, None)
        while (video := coming.result()) is not None:
            coming = thread.submit(next, videos, None)
            yield video

    try:
        with ThreadPoolExecutor(1, "vectors") as thread:
            yield fetched()
    finally:
        # What is left unread would hold the connection.
        if isinstance(videos, Generator):
            videos.close()


def text_vector(engine: Engine, model: str, text: str) -> npt.NDArray[np.float32] | None:
    """The unit vector that the model gave for this text before; None if it was never asked."""
    with reading(engine) as connection:
        found = connection.scalar(
            select(text_vectors.c.vector).where(
                text_vectors.c.model == model, text_vectors.c.text == text
            )
        )
    return None if found is None else np.frombuffer(found, dtype="<f4")


def remember_text(engine: Engine, model: str, text: str, vector: npt.NDArray[np.float32]) -> None:
    """Keep the unit vector of a text, so that it need not be asked again."""
    with writing(engine) as connection:
        connection.execute(
            insert(connection, text_vectors)
            .values(model=model, text=text, vector=vector.astype("<f4").tobytes())
            .on_conflict_do_nothing(index_elements=["model", "text"])
        )
