"""How long the questions take, beside the least that they could take.

    python benchmarks/answers.py FOLDER [--postgresql URL] [--samples 1000000]

Fills a fresh SQLite database in FOLDER, and the empty PostgreSQL database at URL, with a job of
1,000,000 embedded samples (512 numbers each) and 10,000,000 predictions in 1,000 videos, asks, and
prints seconds and bounds. About 4 GB on each database.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from sqlalchemy import Engine, func, select, text, update

from storage import database, ledger, relabel, results, search, vectors
from storage.bulk import insert_columns
from storage.columns import SampleColumns
from storage.database import reading, writing
from storage.ledger import Job
from storage.records import (
    ArchiveFile,
    Fit,
    FrameRange,
    JobSpec,
    Label,
    LabelSet,
    Sampling,
    VideoInfo,
)
from storage.scenes import labelled_scenes, picture_changes, scenes
from storage.schema import (
    embeddings,
    job_videos,
    jobs,
    predictions,
    samples,
    tasks,
)
from storage.schema import scenes as scene_rows
from storage.scoring import best_labels, similarities
from storage.summaries import summaries

DIMENSION = 512
TOP = 10
RANGE = 60
PER_VIDEO = 1000
SCENE = 20
"""Samples of a scene, on average."""
SECOND = 1_000_000


def timed(what: Callable[[], object], times: int = 1) -> float:
    """The best of several goes, in seconds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - start)
    return best


def say(name: str, seconds: float, bound: float | None = None, of: str = "") -> None:
    """One line of the result."""
    beside = "" if bound is None else f"   bound {bound:8.3f} s  x{seconds / bound:5.2f}   {of}"
    print(f"  {name:42} {seconds:8.3f} s{beside}", flush=True)


def label_set(name: str, count: int) -> LabelSet:
    return LabelSet(name, tuple(Label(f"{name} {at}", (f"{name} {at}",)) for at in range(count)))


def unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def fill(engine: Engine, total: int) -> Job:
    """A closed job of so many samples, as runs leave one behind."""
    spec = JobSpec(
        "bench", "bench", Sampling(), Fit.CROP, TOP, label_set("old", 20), "clip/1", None
    )
    job = ledger.open_job(engine, spec)
    info = VideoInfo(
        container="mp4", codec="h264", pixel_format="yuv420p", stream_index=0,
        stream_reason="only", width=1920, height=1080, rotation=0, time_base=Fraction(1, 90_000),
        frame_rate=Fraction(25), frame_count=25 * PER_VIDEO, first_pts=0,
        duration_us=PER_VIDEO * SECOND, indexed_us=PER_VIDEO * SECOND, header_us=None,
        sequential_reason=None, interlaced=False, bit_depth=8, transfer="bt709",
    )  # fmt: skip
    whole = FrameRange(0, PER_VIDEO, 0, PER_VIDEO * SECOND, None, (), ())
    pool = unit((PER_VIDEO, DIMENSION), 1).astype(np.float16)
    bucket = np.arange(PER_VIDEO)
    random = np.random.default_rng(2)
    for number in range(total // PER_VIDEO):
        file = ArchiveFile(f"/archive/{number:06}.mp4", 1, 1_700_000_000_000_000_000)
        video_id = ledger.register_file(engine, file, f"content-{number}")
        ledger.plan_video(engine, job.id, video_id, info, [whole])
        times = np.stack([bucket, bucket, bucket, bucket + 1], axis=1) * [1, SECOND, SECOND, SECOND]
        rolled = np.roll(pool, number, axis=0)
        of_video = {"job_id": job.id, "video_id": video_id}
        with writing(engine) as connection:
            connection.execute(
                embeddings.insert(),
                [
                    {
                        "video_id": video_id, "sampling": str(job.sampling), "fit": job.fit,
                        "model": job.model, "bucket_start": at,
                        "bucket_end": min(at + RANGE, PER_VIDEO), "dimension": DIMENSION,
                        "times": times[at : at + RANGE].astype("<i8").tobytes(),
                        "vectors": rolled[at : at + RANGE].tobytes(), "gaps": "[]",
                    }
                    for at in range(0, PER_VIDEO, RANGE)
                ],
            )  # fmt: skip
            insert_columns(
                connection, samples,
                {**of_video, "bucket": bucket, "t_us": bucket * SECOND,
                 "start_us": bucket * SECOND, "end_us": (bucket + 1) * SECOND},
            )  # fmt: skip
            insert_columns(connection, predictions, of_video | prediction_columns(random))
            starts = np.arange(0, PER_VIDEO, SCENE)
            insert_columns(
                connection, scene_rows,
                {**of_video, "start_us": starts * SECOND, "end_us": (starts + SCENE) * SECOND,
                 "label": random.integers(0, 20, len(starts)), "confidence": 0.5, "peak": 0.9,
                 "samples": SCENE, "agreeing": 0.9},
            )  # fmt: skip
    with writing(engine) as connection:
        connection.execute(update(tasks).values(state="done", samples=PER_VIDEO))
        connection.execute(
            update(job_videos).values(
                state="complete", analysed_us=job_videos.c.duration_us, closed_ms=1
            )
        )
        connection.execute(update(jobs).values(state="closed", planning_finished=True))
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
    else:
        with writing(engine) as connection:
            connection.execute(text("ANALYZE"))
    return ledger.get_job(engine, job.id)


def prediction_columns(
    random: np.random.Generator, count: int = PER_VIDEO
) -> dict[str, np.ndarray]:
    confidence = np.sort(random.dirichlet(np.ones(TOP), count), axis=1)[:, ::-1]
    return {
        "bucket": np.repeat(np.arange(count), TOP),
        "rank": np.tile(np.arange(TOP), count),
        "label": random.integers(0, 20, count * TOP),
        "similarity": confidence.ravel() / 3,
        "confidence": confidence.ravel(),
    }


def read_raw(engine: Engine) -> list[np.ndarray]:
    """Every stored vector once, by the driver alone."""
    with reading(engine) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        binary = {"binary": True} if engine.dialect.name == "postgresql" else {}
        cursor = driver.cursor(**binary)
        cursor.execute("SELECT vectors FROM embeddings")
        return [np.frombuffer(row[0], "<f2").reshape(-1, DIMENSION) for row in cursor]


def read_and_multiply(engine: Engine, labels: np.ndarray) -> None:
    """What relabelling and searching cannot do without."""
    for matrix in read_raw(engine):
        matrix.astype(np.float32) @ labels.T


def questions(engine: Engine, job: Job) -> None:
    with reading(engine) as connection:
        some = connection.scalar(select(func.max(job_videos.c.video_id)))
        trip = timed(lambda: connection.execute(text("SELECT 1")).all(), 20)
    one = timed(lambda: summaries(engine, job.id, some), 5)
    say("summary of one video (goal 0.020)", one, trip,
        "a round trip")  # fmt: skip

    def grouped() -> None:
        with reading(engine) as connection:
            connection.execute(text(
                "SELECT video_id, label, SUM(end_us - start_us), MIN(start_us), MAX(end_us) "
                "FROM scenes WHERE job_id = 1 GROUP BY video_id, label"
            )).all()  # fmt: skip

    say("summary of all videos", timed(lambda: summaries(engine, job.id), 2), timed(grouped, 2),
        "one GROUP BY over the scenes")  # fmt: skip

    def fetched() -> None:
        with reading(engine) as connection:
            connection.execute(text("SELECT * FROM scenes WHERE job_id = 1")).all()

    say("scenes of all videos, read", timed(lambda: scenes(engine, job.id), 2), timed(fetched, 2),
        "fetching their rows")  # fmt: skip
    query = unit((1, DIMENSION), 5)

    def searched() -> None:
        with reading(engine) as connection:
            stored = vectors.of_model(connection, job.model)
            search.search(stored, query[0], top=20)

    bound = timed(lambda: read_and_multiply(engine, query), 2)
    say("search, top 20 (goal x2)", timed(searched, 2), bound, "reading + numpy's product")
    labels = unit((20, DIMENSION), 6)
    bound = timed(lambda: read_and_multiply(engine, labels), 2)

    def scored() -> None:
        for one in stored_of(engine, job):
            best_labels(similarities(one.vectors, labels), TOP)

    say("relabel with 20 labels: scores (goal x2)", timed(scored), bound,
        "reading + numpy's product")  # fmt: skip

    def scenes_found() -> None:
        names = [f"new {at}" for at in range(20)]
        for one in stored_of(engine, job):
            found = best_labels(similarities(one.vectors, labels), TOP)
            label, similarity, confidence = (part.astype(float) for part in found)
            columns = SampleColumns(*one.times.T, label.astype(int), similarity, confidence)
            labelled_scenes(columns, [], names, changes=picture_changes(one.vectors))

    say("relabel: scores and scenes, not written", timed(scenes_found), bound, "the same")
    target = relabel.new_job(engine, job, label_set("new", 20))
    results.store_label_vectors(engine, target.label_set_id, target.model, labels)
    say("relabel: all of it, rows written", timed(lambda: relabel.relabel(engine, job, target)),
        bound, "the same")  # fmt: skip


def stored_of(engine: Engine, job: Job):
    with reading(engine) as connection:
        yield from vectors.of_job(connection, job.id, job.sampling, job.fit, job.model)


def inserts(engine: Engine, count: int = 500_000) -> None:
    """Prediction rows a second by `insert_columns`, and by the driver's own fastest way."""
    columns = {"video_id": 1} | prediction_columns(np.random.default_rng(3), count // TOP)
    names = f"job_id, {', '.join(columns)}"
    new_jobs = iter(range(1000, 2000))

    def ours() -> float:
        job_id = next(new_jobs)
        with writing(engine) as connection:
            return timed(
                lambda: insert_columns(connection, predictions, {"job_id": job_id} | columns)
            )

    def drivers() -> float:
        arrays = np.broadcast_arrays(
            *(np.atleast_1d(v) for v in (next(new_jobs), *columns.values()))
        )
        ready = list(zip(*(a.tolist() for a in arrays), strict=True))
        with writing(engine) as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            if engine.dialect.name == "sqlite":
                statement = f"INSERT INTO predictions ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)"
                return timed(lambda: driver.executemany(statement, ready))

            def copied() -> None:
                statement = f"COPY predictions ({names}) FROM STDIN (FORMAT BINARY)"
                with driver.cursor() as cursor, cursor.copy(statement) as copy:
                    copy.set_types(["int8", "int8", "int8", "int2", "int4", "float8", "float8"])
                    for row in ready:
                        copy.write_row(row)

            return timed(copied)

    both = [(ours(), drivers()) for _ in range(3)]
    mine, fastest = (min(way) for way in zip(*both, strict=True))
    with writing(engine) as connection:
        connection.execute(predictions.delete().where(predictions.c.job_id >= 1000))
    say(f"insert {count:,} predictions (goal x1.25)", mine, fastest, "the driver's fastest way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--postgresql", metavar="URL")
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "answers.db"
    file.unlink(missing_ok=True)
    for url in filter(None, (f"sqlite:///{file}", options.postgresql)):
        engine = database.connect(url)
        database.upgrade(engine)
        start = time.perf_counter()
        job = fill(engine, options.samples)
        spent = time.perf_counter() - start
        print(f"{engine.dialect.name}: {options.samples:,} embeddings, {options.samples * TOP:,} "
              f"predictions, filled in {spent:.0f} s", flush=True)  # fmt: skip
        inserts(engine)
        questions(engine, job)
        engine.dispose()


if __name__ == "__main__":
    main()
