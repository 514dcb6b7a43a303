"""How long the questions take, beside the least that they could take.

    python benchmarks/answers.py URL [URL ...] [--samples 1000000] [--only inserts,search,...]

Fills each database that is empty (`sqlite:////tmp/answers.db`, `postgresql://USER@HOST/NAME`) with
a job of 1,000,000 embedded samples (512 numbers each) and 10,000,000 predictions in 1,000 videos,
asks, and prints seconds and bounds; one that it has filled before is asked again as it is. About
4 GB on each database.

In one run on two shared, otherwise idle cores of a Xeon, files in the page cache, 23 November 2026,
in seconds:

    1,000,000 samples                 SQLite: ours / bound     PostgreSQL 15: ours / bound
    500,000 predictions inserted      0.89 / 0.84  x1.06       1.04 / 1.20  x0.86
    summary of one video              0.002                    0.006
    search, top 20                    1.22 / 1.09  x1.12       1.01 / 1.08  x0.94
    relabel, 20 labels: answers       1.77 / 1.41  x1.26       2.70 / 1.42  x1.91
    relabel, all rows written         25.4 / 18.1  x1.41       31.6 / 25.5  x1.24

Answers are states, scenes and flags of all videos, as they stand in the database; their bound, and
that of the search, is to read every vector once and multiply it with numpy. Over six runs, with the
machine's other guests more or less busy, the answers took x1.76 to x1.94 on PostgreSQL.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction

import numpy as np
from sqlalchemy import Engine, func, select, text, update

from storage import database, ledger, relabel, search, vectors
from storage.bulk import insert_columns
from storage.database import reading, writing
from storage.labels import store_label_vectors
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
from storage.scenes import scenes
from storage.schema import (
    embeddings,
    job_videos,
    jobs,
    predictions,
    samples,
    tasks,
)
from storage.schema import scenes as scene_rows
from storage.summaries import summaries

DIMENSION = 512
TOP = 10
RANGE = 60
PER_VIDEO = 1000
SCENE = 20
"""Samples of a scene, on average."""
SECOND = 1_000_000
INSERTED = 500_000
"""Predictions that are inserted to learn how fast."""


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


def new_labels() -> np.ndarray:
    """The vectors of the labels that the job is given."""
    return unit((20, DIMENSION), 6)


def pictures() -> np.ndarray:
    """Vectors of a video whose scenes show one of the new labels each: its cosine is about 0.25, as
    CLIP's are."""
    shown = np.random.default_rng(7).integers(0, 20, PER_VIDEO // SCENE + 1)
    scene = np.arange(PER_VIDEO) // SCENE
    found = (
        0.26 * new_labels()[shown[scene]]
        + 0.9 * unit((len(shown), DIMENSION), 1)[scene]
        + 0.35 * unit((PER_VIDEO, DIMENSION), 2)
    )
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


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
    pool = pictures()
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


def read_raw(engine: Engine) -> Iterator[np.ndarray]:
    """Every stored vector once, by the fastest way that the driver alone has."""
    query = "SELECT vectors FROM embeddings"
    with reading(engine) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        if engine.dialect.name == "sqlite":
            for (found,) in driver.execute(query):
                yield np.frombuffer(found, "<f2").reshape(-1, DIMENSION)
            return
        with (
            driver.cursor() as cursor,
            cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT BINARY)") as rows,
        ):
            rows.set_types(["bytea"])
            for (found,) in rows.rows():
                yield np.frombuffer(found, "<f2").reshape(-1, DIMENSION)


def read_and_multiply(engine: Engine, labels: np.ndarray) -> None:
    """What relabelling and searching cannot do without."""
    for matrix in read_raw(engine):
        matrix.astype(np.float32) @ labels.T


def summed_up(engine: Engine, job: Job) -> None:
    with reading(engine) as connection:
        some = connection.scalar(select(func.max(job_videos.c.video_id)))
        trip = timed(lambda: connection.execute(text("SELECT 1")).all(), 20)
    one = timed(lambda: summaries(engine, job.id, some), 5)
    say("summary of one video (goal 0.020)", one, trip, "a round trip")

    def grouped() -> None:
        with reading(engine) as connection:
            connection.execute(text(
                "SELECT video_id, label, SUM(end_us - start_us), MIN(start_us), MAX(end_us) "
                f"FROM scenes WHERE job_id = {job.id} GROUP BY video_id, label"
            )).all()  # fmt: skip

    say("summary of all videos", timed(lambda: summaries(engine, job.id), 2), timed(grouped, 2),
        "one GROUP BY over the scenes")  # fmt: skip

    def fetched() -> None:
        with reading(engine) as connection:
            connection.execute(text(f"SELECT * FROM scenes WHERE job_id = {job.id}")).all()

    say("scenes of all videos, read", timed(lambda: scenes(engine, job.id), 2), timed(fetched, 2),
        "fetching their rows")  # fmt: skip


def searched(engine: Engine, job: Job) -> None:
    query = unit((1, DIMENSION), 5)

    def ours() -> None:
        with reading(engine) as connection:
            search.search(vectors.of_model(connection, job.model), query[0], top=20)

    bound = timed(lambda: read_and_multiply(engine, query), 2)
    say("search, top 20 (goal x2)", timed(ours, 2), bound, "reading + numpy's product")


def relabelled(engine: Engine, job: Job) -> None:
    labels = new_labels()
    bound = timed(lambda: read_and_multiply(engine, labels), 3)
    say("every vector read once", timed(lambda: list(read_raw(engine)), 2))
    rows_s = min(insert_at_best(engine) for _ in range(2)) * count(engine, job) * TOP / INSERTED
    goes = [relabelling(engine, job, labels, whole=go == 2) for go in range(3)]
    answers = min(answered for answered, _ in goes)
    say("relabel, 20 labels: answers (goal x2)", answers, bound, "reading + numpy's product")
    say("relabel, 20 labels: all rows written", goes[-1][1], bound + rows_s,
        "and the driver's fastest inserts")  # fmt: skip


class Enough(Exception):
    """Ends a relabelling that has answered."""


def relabelling(
    engine: Engine, job: Job, labels: np.ndarray, *, whole: bool
) -> tuple[float, float]:
    """Seconds until the answers (states, scenes and flags of all videos) stand in the database, and
    until the rows of all samples and predictions do."""
    target = relabel.new_job(engine, job, label_set(f"new {time.time_ns()}", len(labels)))
    store_label_vectors(engine, target.label_set_id, target.model, labels)
    answered: list[float] = []

    def answers(_: int) -> None:
        answered.append(time.perf_counter() - start)
        if not whole:
            raise Enough

    start = time.perf_counter()
    with suppress(Enough):
        relabel.relabel(engine, job, target, answers=answers)
    return answered[0], time.perf_counter() - start


def inserts(engine: Engine, _: Job) -> None:
    both = [(insert_ours(engine), insert_at_best(engine)) for _ in range(3)]
    mine, fastest = (min(way) for way in zip(*both, strict=True))
    say(f"insert {INSERTED:,} predictions (goal x1.25)", mine, fastest,
        "the driver's fastest way")  # fmt: skip


def inserted_columns() -> dict[str, int | np.ndarray]:
    columns = prediction_columns(np.random.default_rng(3), INSERTED // TOP)
    return {"job_id": 1_000_000, "video_id": 1} | columns


def insert_ours(engine: Engine) -> float:
    """Seconds for so many predictions by `insert_columns`; they are taken back."""
    columns = inserted_columns()
    with writing(engine) as connection:
        spent = timed(lambda: insert_columns(connection, predictions, columns))
        connection.rollback()
    return spent


def insert_at_best(engine: Engine) -> float:
    """The same by the driver's own fastest way, from rows that stand ready."""
    columns = inserted_columns()
    arrays = np.broadcast_arrays(*(np.atleast_1d(v) for v in columns.values()))
    ready = list(zip(*(a.tolist() for a in arrays), strict=True))
    names = ", ".join(columns)
    with writing(engine) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None

        def many() -> None:
            driver.executemany(
                f"INSERT INTO predictions ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)", ready
            )

        def copied() -> None:
            statement = f"COPY predictions ({names}) FROM STDIN (FORMAT BINARY)"
            with driver.cursor() as cursor, cursor.copy(statement) as copy:
                copy.set_types(["int8", "int8", "int8", "int2", "int4", "float8", "float8"])
                for row in ready:
                    copy.write_row(row)

        spent = timed(many if engine.dialect.name == "sqlite" else copied)
        connection.rollback()
    return spent


PARTS: dict[str, Callable[[Engine, Job], None]] = {
    "inserts": inserts,
    "summaries": summed_up,
    "search": searched,
    "relabel": relabelled,
}


def count(engine: Engine, job: Job) -> int:
    with reading(engine) as connection:
        rows = select(func.count()).select_from(samples).where(samples.c.job_id == job.id)
        return connection.scalar(rows) or 0


def opened(url: str, total: int) -> tuple[Engine, Job]:
    """The database, filled if it is empty."""
    engine = database.connect(url)
    database.upgrade(engine)
    filled = [job for job in ledger.jobs(engine) if job.key == "bench"]
    start = time.perf_counter()
    job = filled[0] if filled else fill(engine, total)
    found = count(engine, job)
    print(f"{engine.dialect.name}: {found:,} embeddings, {found * TOP:,} predictions, "
          f"filled in {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    return engine, job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ",".join(PARTS))
    options = parser.parse_args()
    for url in options.urls:
        engine, job = opened(url, options.samples)
        for part in options.only.split(","):
            PARTS[part](engine, job)
        engine.dispose()


if __name__ == "__main__":
    main()
