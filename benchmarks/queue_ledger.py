"""What the ledger costs: a task's way through it, planning, and a million rows."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from multiprocessing.synchronize import Barrier

import numpy as np
from queue_servers import processor_s
from sqlalchemy import Engine, Table, func, select, text, update

from scheduler.feeder import Feeder
from scheduler.settings import SchedulerSettings
from storage import database, ledger, results
from storage.database import reading, writing
from storage.dialect import Now
from storage.ledger import Claim, JobState
from storage.ranges import stored_range
from storage.records import (
    ArchiveFile,
    Fit,
    FrameRange,
    JobSpec,
    Label,
    LabelSet,
    Prediction,
    RangeResult,
    SampleResult,
    Sampling,
    Usage,
    VideoInfo,
)
from storage.schema import PENDING, files, job_videos, tasks, videos
from workers.probing import register

SECOND = 1_000_000
RANGE_S = 60
TOP = 5
DIMENSION = 512
WINDOW = 64
TASK_S = 2.0
"""What a worker takes for such a range, at least: how many heartbeats it sends."""
LEASE_S = 90
LABELS = LabelSet("five", tuple(Label(f"label {n}", (f"label {n}",)) for n in range(TOP)))
VECTORS = np.full((RANGE_S, DIMENSION), DIMENSION**-0.5, "<f2").tobytes()


def say(name: str, value: str, goal: str = "", *, met: bool | None = None) -> None:
    """One line of the result."""
    verdict = "" if met is None else f"   goal {goal}: {'met' if met else 'MISSED'}"
    print(f"  {name:56} {value:>22}{verdict}", flush=True)


def spec(model: str = "none") -> JobSpec:
    """What the benchmark's jobs ask for."""
    return JobSpec("benchmark", "benchmark", Sampling(), Fit.CROP, TOP, LABELS, model, None)


def info(seconds: int) -> VideoInfo:
    return VideoInfo(
        container="mp4", codec="h264", pixel_format="yuv420p", stream_index=0,
        stream_reason="only", width=1920, height=1080, rotation=0, time_base=Fraction(1, 90_000),
        frame_rate=Fraction(25), frame_count=25 * seconds, first_pts=0,
        duration_us=seconds * SECOND, indexed_us=seconds * SECOND, header_us=None,
        sequential_reason=None, interlaced=False, bit_depth=8, transfer="bt709",
    )  # fmt: skip


def ranges(count: int) -> list[FrameRange]:
    """Ranges of a minute, a sample a second."""
    found = []
    for start in range(0, count * RANGE_S, RANGE_S):
        buckets = tuple(range(start, start + RANGE_S))
        pts = tuple(bucket * 90_000 for bucket in buckets)
        end_us = (start + RANGE_S) * SECOND
        found.append(
            FrameRange(start, start + RANGE_S, start * SECOND, end_us, pts[0], buckets, pts)
        )
    return found


def file(name: str) -> ArchiveFile:
    return ArchiveFile(f"/archive/{name}.mp4", 1, 1_700_000_000_000_000_000)


def add_video(engine: Engine, job_id: int, name: str, count: int) -> int:
    """A planned video of so many tasks."""
    video_id = ledger.register_file(engine, file(name), name)
    ledger.plan_video(engine, job_id, video_id, info(count * RANGE_S), ranges(count))
    return video_id


def found_in(claim: Claim) -> RangeResult:
    """A minute with a label each second."""
    best = tuple(Prediction(rank, 0.3 - rank / 100, 0.5 / 2**rank) for rank in range(TOP))
    samples = tuple(
        SampleResult(b, b * SECOND, b * SECOND, (b + 1) * SECOND, best)
        for b in claim.frame_range.buckets
    )
    return RangeResult(samples, (), VECTORS, DIMENSION, Usage(8, 0, 750_000, 0.5, 1.5))


class Clock:
    """Milliseconds of a task by what they were spent on: of wall time, and of this processor."""

    def __init__(self) -> None:
        self._wall: dict[str, list[float]] = {}
        self._cpu: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str, shared_by: float = 1) -> Iterator[None]:
        start, worked = time.perf_counter(), time.process_time()
        yield
        for kept, spent in (
            (self._wall, time.perf_counter() - start),
            (self._cpu, time.process_time() - worked),
        ):
            kept.setdefault(name, []).append(spent * 1000 / shared_by)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(spent) for name, spent in self._wall.items()}

    def cpu(self) -> dict[str, float]:
        return {name: statistics.median(spent) for name, spent in self._cpu.items()}


def fed(engine: Engine, job_id: int, clock: Clock, rounds: int) -> None:
    """So many windows of tasks on their whole way, as scheduler and worker take them."""
    for _ in range(rounds):
        with clock("feed, a task's share of a window", WINDOW):
            ids = ledger.feed(engine, WINDOW)
        for task_id in ids:
            done(engine, job_id, task_id, clock)


def done(engine: Engine, job_id: int, task_id: int, clock: Clock) -> None:
    """One task, from its message to its commit."""
    with clock("claim"):
        claim = ledger.claim(engine, task_id, "benchmark", LEASE_S)
    assert claim is not None
    content = claim.video_id, claim.sampling, claim.fit, claim.model, claim.frame_range
    with clock("look for stored vectors and a budget"):
        stored_range(engine, *content)
        ledger.reserve_calls(engine, job_id, 8)
    with clock("heartbeat, a task's share of one each 30 s", 30 / TASK_S):
        ledger.heartbeat(engine, task_id, claim.fence, LEASE_S)
    result = found_in(claim)
    with clock(f"commit of {RANGE_S} samples, {TOP} labels and a vector each"):
        assert results.commit(engine, task_id, claim.fence, result)


def closed(engine: Engine, job_id: int, clock: Clock, name: str, count: int, *, each: int) -> None:
    """So many more videos, done and closed."""
    for number in range(count):
        video_id = add_video(engine, job_id, f"{name}-{number}", each)
        with reading(engine) as connection:
            ids = connection.scalars(
                select(tasks.c.id).where(tasks.c.job_id == job_id, tasks.c.video_id == video_id)
            ).all()
        for task_id in ids:
            claim = ledger.claim(engine, task_id, "benchmark", LEASE_S)
            assert claim is not None
            assert results.commit(engine, task_id, claim.fence, found_in(claim))
    with clock("look for finished videos, and closing, a task's share", count * each):
        assert len(ledger.close_finished(engine)) == count


# -- the parts


def overhead(engine: Engine, windows: int, *servers: int) -> float:
    """Print what a task costs in the ledger; return the milliseconds of processor time that worker,
    scheduler and these processes of a server spend on that."""
    clock = Clock()
    job_id = ledger.open_job(engine, spec(), files=()).id
    multiplied(engine, job_id, add_video(engine, job_id, "template", 10), 1000)
    fed(engine, job_id, Clock(), 1)
    before = processor_s(*servers)
    fed(engine, job_id, clock, windows)
    server_ms = (processor_s(*servers) - before) * 1000 / (windows * WINDOW)
    closed(engine, job_id, clock, "closed", 20, each=10)
    wall, cpu = clock.medians(), clock.cpu()
    print(f"  a task in the ledger, medians of {windows * WINDOW}: wall / caller's CPU")
    for name, ms in wall.items():
        say(name, f"{ms:.2f} / {cpu[name]:.2f} ms")
    say("all of it", f"{sum(wall.values()):.2f} / {sum(cpu.values()):.2f} ms")
    if servers:
        say("CPU of the server beside", f"{server_ms:.2f} ms")
    return sum(cpu.values()) + server_ms


def claims(engine: Engine, count: int) -> None:
    """Print how many claims a second the ledger takes."""
    job_id = ledger.open_job(engine, spec(), files=()).id
    multiplied(engine, job_id, add_video(engine, job_id, "template", 10), count * 4 // 10)
    with reading(engine) as connection:
        ids = list(connection.scalars(select(tasks.c.id)))
    rates = []
    for processes in (1, 2):
        parts = [[ids.pop() for _ in range(count)] for _ in range(processes)]
        rates.append(processes * count / together(claim_all, engine, parts))
    say("claims a second by 1 / by 2 processes", f"{rates[0]:,.0f} / {rates[1]:,.0f}")


def claim_all(engine: Engine, ids: Sequence[int]) -> None:
    for row_id in ids:
        assert ledger.claim(engine, row_id, "benchmark", LEASE_S) is not None


def planning(engine: Engine, count: int, each: int) -> None:
    """Print how long an archive takes to be planned, the reading of its files left out."""
    listed = [file(f"{n:06}") for n in range(count)]
    start = time.perf_counter()
    job_id = ledger.open_job(engine, spec(), files=listed).id
    submitted_s = time.perf_counter() - start
    ids = ledger.feed_probes(engine, count)
    planned_s = together(plan_all, engine, [(ids[0::2], each), (ids[1::2], each)])
    assert ledger.finish_probed(engine) == [job_id]
    with reading(engine) as connection:
        rows = connection.scalar(select(func.count()).select_from(tasks))
    assert rows == count * each
    say(f"{count:,} videos submitted, in one transaction", f"{submitted_s:.2f} s")
    say(f"planned, {each} tasks each, by 2 processes",
        f"{planned_s:.1f} s, {count / planned_s:,.0f} a second")  # fmt: skip


def plan_all(engine: Engine, asked: tuple[Sequence[int], int]) -> None:
    """What a worker asks of the ledger for each new file."""
    ids, each = asked
    made = ranges(each)
    for probe_id in ids:
        claim = ledger.claim_probe(engine, probe_id, "benchmark", LEASE_S)
        assert claim is not None
        assert ledger.known_video(engine, claim.file) is None
        video_id = register(engine, claim.file, f"content {probe_id}")
        assert ledger.plan_probed(engine, claim, video_id, info(each * RANGE_S), made)


def million(engine: Engine, total: int, windows: int) -> None:
    """Print what a task costs at the beginning, in the middle and at the end of a large job."""
    each = 100
    start = time.perf_counter()
    job_id = ledger.open_job(engine, spec(), files=()).id
    multiplied(engine, job_id, add_video(engine, job_id, "template", each), total // each - 1)
    print(
        f"  {total:,} tasks of {total // each:,} videos (rows made by SQL in "
        f"{time.perf_counter() - start:.0f} s): ms a task,\n"
        f"  medians of {windows * WINDOW}, at the beginning, in the middle, at the end"
    )
    stages: list[dict[str, float]] = []
    for stage, share in (("beginning", 0.0), ("middle", 0.5), ("end", 0.98)):
        advance(engine, int(each * share))
        clock = Clock()
        for _ in range(3):
            with clock("a look that finds nothing to close: ms each"):
                ledger.close_finished(engine)
        fed(engine, job_id, clock, windows)
        closed(engine, job_id, clock, stage, 20, each=10)
        stages.append(clock.medians())
    first, middle, last = stages
    each_ms = statistics.mean(
        sum(ms for name, ms in stage.items() if name.startswith(("feed", "look for finished")))
        for stage in stages
    )
    say(
        f"feeding and closing all {total:,}, projected from these",
        f"{each_ms * total / 60_000:,.0f} min",
    )
    for name, ms in first.items():
        met = max(middle[name], last[name]) <= 1.5 * ms
        say(name, f"{ms:.2f} {middle[name]:.2f} {last[name]:.2f}", "no growth (x1.5)", met=met)


def simulation(engine: Engine, total: int, window: int) -> None:
    """Print how long a scheduler takes to feed and close so many tasks, one and all, where workers
    are simulated: what was fed is done at once, by SQL, and nothing is found in it."""
    each = 100
    job_id = ledger.open_job(engine, spec(), files=()).id
    multiplied(engine, job_id, add_video(engine, job_id, "template", each), total // each - 1)
    ledger.finish_planning(engine, job_id)
    fed: list[int] = []
    settings = SchedulerSettings(window=window)
    scheduler = Feeder(engine, lambda _, ids: fed.extend(ids), settings, name="benchmark")
    steps_s: list[float] = []
    counted = 0
    begin = time.perf_counter()
    while ledger.get_job(engine, job_id).state is not JobState.CLOSED:
        start = time.perf_counter()
        scheduler.step()
        steps_s.append(time.perf_counter() - start)
        counted += len(fed)
        with writing(engine) as connection:
            connection.execute(
                update(tasks)
                .where(tasks.c.id.in_(fed))
                .values(state="done", queued_ms=None, done_ms=Now(), attempts=1, fence=1)
            )
        fed.clear()
    whole_s = time.perf_counter() - begin
    stands = ledger.status(engine, job_id)
    assert counted == stands.tasks == stands.closed_tasks == total
    assert stands.closed_videos == total // each
    spent_s = sum(steps_s)
    say(f"feeding {total:,} tasks, closing {total // each:,} videos", f"{spent_s:,.0f} s")
    say("the same, a task's share", f"{spent_s * 1000 / total:.3f} ms")
    say(f"the longest of {len(steps_s):,} steps, windows of {window:,}", f"{max(steps_s):.2f} s")
    say("all of it, simulated workers included", f"{whole_s:,.0f} s")


def advance(engine: Engine, below: int) -> None:
    """As if all tasks below this ordinal had been done."""
    with writing(engine) as connection:
        connection.execute(
            update(tasks)
            .where(PENDING, tasks.c.ordinal < below)
            .values(state="done", samples=RANGE_S, done_ms=1, attempts=1, fence=1)
        )
    tidy(engine)


def tidy(engine: Engine) -> None:
    """What autovacuum does sooner or later."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))


def multiplied(engine: Engine, job_id: int, template: int, copies: int) -> None:
    """Copy a planned video with its tasks so often, by SQL alone."""
    as_bytes = "CAST(content_id AS BLOB)"
    if engine.dialect.name == "postgresql":
        as_bytes = "convert_to(content_id, 'UTF8')"
    given = {"job": job_id, "template": template, "copies": copies}
    with writing(engine) as connection:

        def copy(table: Table, source: str, **changed: str) -> None:
            kept = [c.name for c in table.c if c.name not in {"id", *changed}]
            into, values = (
                ", ".join([*kept, *changed]),
                ", ".join([*(f"one.{name}" for name in kept), *changed.values()]),
            )
            connection.execute(
                text(f"INSERT INTO {table.name} ({into}) SELECT {values} FROM {source}"), given
            )

        numbers = (
            "(WITH RECURSIVE n(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM n WHERE k < :copies) "
            "SELECT k FROM n) AS numbers"
        )
        of_template = "one.video_id = :template AND copies.id > :template"
        copy(
            videos, f"videos AS one, {numbers} WHERE one.id = :template",
            content_id="'copy ' || numbers.k",
        )  # fmt: skip
        source = f"videos AS copies WHERE {of_template}"
        copy(
            files, f"files AS one, {source}", video_id="copies.id",
            path_sha256=as_bytes, path_raw=as_bytes, path="copies.content_id",
        )  # fmt: skip
        copy(job_videos, f"job_videos AS one, {source} AND one.job_id = :job", video_id="copies.id")
        copy(tasks, f"tasks AS one, {source} AND one.job_id = :job", video_id="copies.id")
    tidy(engine)


def together(
    what: Callable[[Engine, object], None], engine: Engine, parts: Sequence[object]
) -> float:
    """Do each part in a process of its own, all at once; return the seconds they take, start of
    the processes left out."""
    url = engine.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")
    start, queue = spawn.Barrier(len(parts)), spawn.SimpleQueue()
    children = [spawn.Process(target=_part, args=(what, url, part, start, queue)) for part in parts]
    for child in children:
        child.start()
    spans = [queue.get() for _ in children]
    for child in children:
        child.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def _part(
    what: Callable[[Engine, object], None],
    url: str,
    part: object,
    start: Barrier,
    queue: multiprocessing.SimpleQueue[tuple[float, float]],
) -> None:
    engine = database.connect(url)
    with reading(engine) as connection:
        connection.execute(text("SELECT 1"))
    start.wait()
    begin = time.monotonic()
    what(engine, part)
    queue.put((begin, time.monotonic()))
    engine.dispose()
