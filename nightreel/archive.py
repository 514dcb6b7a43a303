"""The results from Python: open a database, iterate over what it holds, query it.

    from nightreel.archive import Archive

    with Archive.open("sqlite:///nightreel.db") as archive:
        for scene in archive.scenes("match.mp4"):
            print(scene.start_us / 1e6, scene.label, scene.confidence)

Everything here reads; nothing is changed, decoded or sent. Questions are about the latest job
unless `job` names another by its number. A video is named by its path, the path's end, or its
number.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, text

from storage import coverage, database, flags, highlights, ledger, occurrences, vectors
from storage import scenes as stored_scenes
from storage import search as nearest
from storage import summaries as stored_summaries
from storage.columns import SampleColumns, columns_in
from storage.coverage import VideoCoverage
from storage.flags import FlaggedRange
from storage.highlights import Cut
from storage.labels import labels_in
from storage.ledger import Job
from storage.occurrences import Occurrence
from storage.records import Label, Scene
from storage.search import Hit
from storage.settings import StorageSettings
from storage.summaries import VideoSummary
from storage.vectors import VideoVectors

__all__ = ["Archive"]

_LARGEST_NUMBER = 2**63 - 1
"""Of a row, in both databases."""
_LONGEST_S = 1e12
"""Microseconds are no larger numbers than databases hold."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A results database, open for reading. A context manager."""

    engine: Engine

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """The database at `url`, or the one that NIGHTREEL_DATABASE_URL names.

        Raises `storage.database.DatabaseError` where it is not there or of another release.
        """
        engine = database.connect(url or StorageSettings().database_url)
        try:
            database.check(engine)
        except database.DatabaseError:
            engine.dispose()
            raise
        return cls(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; may be repeated."""
        self.engine.dispose()

    # -- what is there

    def jobs(self) -> list[Job]:
        """Every job, newest first."""
        return ledger.jobs(self.engine)

    def job(self, number: int | None = None) -> Job:
        """One job, or the latest. Raises `storage.ledger.NoSuchJob`."""
        if number is None:
            return ledger.latest_job(self.engine)
        if not 0 < number <= _LARGEST_NUMBER:
            raise ledger.NoSuchJob(f"there is no job {number}: `jobs()` lists those there are")
        return ledger.get_job(self.engine, number)

    def labels(self, job: int | None = None) -> list[Label]:
        """The job's labels, in the order that `SampleColumns.label` counts in."""
        with database.reading(self.engine) as connection:
            return labels_in(connection, self.job(job).id)

    def videos(self, job: int | None = None) -> list[VideoSummary]:
        """The summary of each video, by path."""
        return stored_summaries.summaries(self.engine, self.job(job).id)

    def video(self, name: str | int, job: int | None = None) -> int:
        """The number of the one video of this name. Raises `storage.summaries.NoSuchVideo`, and
        `SeveralVideos`, a ValueError, where the name fits several."""
        return stored_summaries.find_video(self.engine, self.job(job).id, str(name))

    def coverage(self, job: int | None = None) -> list[VideoCoverage]:
        """What of each video was analysed, and what was not, and why."""
        return coverage.coverage(self.engine, self.job(job).id)

    # -- one video

    def scenes(self, video: str | int, job: int | None = None) -> list[Scene]:
        """The video's scenes, in order of time."""
        number = self.video(video, job)
        found = stored_scenes.scenes(self.engine, self.job(job).id, number)
        return found.get(number, [])

    def samples(self, video: str | int, job: int | None = None) -> SampleColumns:
        """The video's samples with their best labels, as arrays in order of time."""
        with database.reading(self.engine) as connection:
            return columns_in(connection, self.job(job).id, self.video(video, job))

    def summary(self, video: str | int, job: int | None = None) -> VideoSummary:
        """The video in a few numbers."""
        number = self.video(video, job)
        (found,) = stored_summaries.summaries(self.engine, self.job(job).id, number)
        return found

    # -- all videos

    def vectors(self, job: int | None = None) -> Iterator[VideoVectors]:
        """Every video's stored embeddings, a video at a time: float16 unit vectors and their
        times. Holds a reading transaction until it is exhausted or closed."""
        asked = self.job(job)
        with database.reading(self.engine) as connection:
            yield from vectors.of_job(connection, asked.id, asked.sampling, asked.fit, asked.model)

    def find(
        self, label: str, *, min_length_s: float = 0, job: int | None = None
    ) -> list[Occurrence]:
        """Which videos show the label, when it begins, how long it lasts; most of it first.

        Raises `storage.occurrences.NoSuchLabel`.
        """
        length_us = _microseconds("min_length_s", min_length_s)
        return occurrences.occurrences(
            self.engine, self.job(job).id, label, min_length_us=length_us
        )

    def flags(self, job: int | None = None) -> list[FlaggedRange]:
        """What labels with a threshold have raised, worst first. Raises
        `storage.flags.NothingWatched` where the job has none."""
        return flags.flagged(self.engine, self.job(job).id)

    def highlights(
        self,
        label: str,
        *,
        top: int = 10,
        pad_s: float = 0,
        least: float = highlights.LEAST,
        job: int | None = None,
    ) -> list[Cut]:
        """The label's best moments as cuts, the surest first, none below this confidence.

        Raises `storage.occurrences.NoSuchLabel`, also for `unknown`, which has no confidence.
        """
        pad_us = _microseconds("pad_s", pad_s)
        return highlights.highlights(
            self.engine, self.job(job).id, label, top=top, pad_us=pad_us, least=least
        )

    def search(
        self,
        query: str | npt.ArrayLike,
        *,
        top: int = 20,
        apart_s: float = 5.0,
        job: int | None = None,
    ) -> list[Hit]:
        """The moments nearest to a vector, or to a text that `nightreel search` has asked for
        before (only then its vector is known): among all that the latest job's model has embedded,
        whichever job sampled it (`v_videos` has every video), or among the videos of `job`.

        KeyError for any other text, ValueError for a vector of another dimension or without a
        direction.
        """
        apart_us = _microseconds("apart_s", apart_s)
        asked = self.job(job)
        if isinstance(query, str):
            known = vectors.text_vector(self.engine, asked.model, query.strip())
            if known is None:
                raise KeyError(f"{query!r} was never asked: run `nightreel search` with it once")
            vector = known
        else:
            given = np.asarray(query, dtype=np.float64)
            length = float(np.linalg.norm(given))
            if not 0 < length < math.inf:
                raise ValueError(f"a vector of length {length} has no direction to search in")
            vector = (given / length).astype(np.float32)
        stored = self._of_model(asked.model) if job is None else self.vectors(job)
        return nearest.search(stored, vector, top=top, apart_us=apart_us)

    def _of_model(self, model: str) -> Iterator[VideoVectors]:
        with database.reading(self.engine) as connection:
            yield from vectors.of_model(connection, model)

    def query(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows of one SELECT as dictionaries; `:name` in it stands for a parameter, also
        within a text, where `\\:` is a colon.

        Raises sqlalchemy.exc.DBAPIError for all else: other statements, several at once, and
        whatever would change a database or make a file; ValueError for an empty text, and where
        two columns have one name.
        """
        if not sql.strip():
            raise ValueError("an empty query: give one SELECT")
        with (
            database.reading(self.engine) as connection,
            _only_selecting(connection) as bound,
            bound.execute(text(sql), parameters) as found,
        ):
            names = list(found.keys())
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ValueError(f"several columns are called {twice[0]!r}: name them apart by AS")
            return [dict(row) for row in found.mappings()]


@contextmanager
def _only_selecting(connection: Connection) -> Iterator[Connection]:
    if connection.dialect.name != "sqlite":
        # A cursor is declared for one SELECT only, and for nothing behind a semicolon.
        yield connection.execution_options(stream_results=True)
        return
    driver: Any = connection.connection.driver_connection
    driver.set_authorizer(_authorized)
    try:
        yield connection
    finally:
        driver.set_authorizer(None)


_SELECTING = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)


def _authorized(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _SELECTING else sqlite3.SQLITE_DENY


def _microseconds(name: str, seconds: float) -> int:
    if not 0 <= seconds < _LONGEST_S:
        raise ValueError(f"{name}={seconds}: give seconds, 0 or more")
    return round(seconds * 1e6)
