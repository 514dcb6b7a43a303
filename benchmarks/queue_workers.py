"""What the queue costs, and what workers make of the cores: with real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median

import numpy as np
import redis
from queue_ledger import DIMENSION, LABELS, TOP, say, spec
from queue_servers import Fresh, processor_s
from sqlalchemy import Engine, select

from scheduler.feeder import publisher
from storage import ledger
from storage.database import reading
from storage.records import ArchiveFile, Fit, Sampling
from storage.schema import tasks
from workers.api import ApiClient
from workers.app import CLASSIFY_RANGE, make_app
from workers.classify import LabelVectors, classify_range
from workers.footage.decode import read_range
from workers.probing import Asked, Probed, probe_and_plan
from workers.settings import MAX_BATCH, QueueSettings, WorkerSettings

MODEL = "none"
SIZE = 224
LATENCY_S = 0.02
QUEUE = "benchmark"
FIRST_S = 3.8
"""CPU seconds of such a range where each sample is its second's first frame (decode.py)."""
START_S = 60.0


# -- messages


def messages(redis_url: str, windows: Sequence[int]) -> float:
    """Print how fast ids are published and what they take in Redis; return the milliseconds of the
    last and largest window's each."""
    app = make_app(QueueSettings(broker_url=redis_url, queue=QUEUE))
    publish = publisher(app)
    each_ms = 0.0
    with redis.Redis.from_url(redis_url) as client:
        publish(CLASSIFY_RANGE, [0])
        for window in windows:
            client.delete(QUEUE)
            before = client.info("memory")["used_memory"]
            start = time.perf_counter()
            publish(CLASSIFY_RANGE, range(window))
            spent_s = time.perf_counter() - start
            each_ms = spent_s / window * 1000
            held = client.info("memory")["used_memory"] - before
            say(
                f"published by the feeder, window of {window:,}",
                f"{window / spent_s:,.0f} a second, {held / 1e6:.2f} MB",
                "below 256 MB", met=held < 256e6,
            )  # fmt: skip
        client.delete(QUEUE)
    app.close()
    return each_ms


def taken(engine: Engine, redis_url: str, count: int, folder: Path) -> float:
    """Print how many messages a second a worker takes, claims in vain and acknowledges; return the
    milliseconds of processor time of each."""
    app = make_app(QueueSettings(broker_url=redis_url, queue=QUEUE))
    rates, cpu_ms = [], 0.0
    for processes in (1, 2):
        with redis.Redis.from_url(redis_url) as client:
            # The ledger knows none of them.
            publisher(app)(CLASSIFY_RANGE, range(1_000_000_000, 1_000_000_000 + count))
            with worker(f"taken-{processes}", engine, redis_url, "", folder, processes) as pid:
                marks = []
                for left in (0.9, 0.1):
                    while client.llen(QUEUE) > left * count:
                        time.sleep(0.01)
                    marks.append((time.monotonic(), processor_s(pid)))
                while client.llen(QUEUE):
                    time.sleep(0.01)
        (begun, before), (ended, after) = marks
        rates.append(0.8 * count / (ended - begun))
        cpu_ms = (after - before) * 1000 / (0.8 * count)
    app.close()
    say(
        "taken, claimed in vain and acknowledged, by 1 / by 2",
        f"{rates[0]:,.0f} / {rates[1]:,.0f} a second",
    )
    say("taken: CPU of the worker, each", f"{cpu_ms:.2f} ms")
    return cpu_ms


# -- work


@dataclass(frozen=True, slots=True)
class Bench:
    """What stands ready for real work."""

    fresh: Fresh
    redis_url: str
    servers: tuple[int, int]
    """Processes of Redis and PostgreSQL."""
    video: Path
    folder: Path
    count: int
    """Tasks of a turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one arrangement of processes made of its tasks."""

    rate: float
    """Tasks a second."""
    own_s: float
    """CPU seconds a task of those that decode."""


def work(bench: Bench, turns: int, overhead_ms: float | None) -> None:
    """Print what two workers make of two cores, beside two processes that decode and ask the API
    with no queue and no ledger between them; and the share of both in a task's time."""
    file = ArchiveFile(str(bench.video), 1, 1)
    probed = probe_and_plan(Asked(file, "benchmark"), Sampling(), 60_000_000)
    assert probed.info is not None
    one = probed.ranges[0]
    print(
        f"  {bench.count} times the first {(one.end_us - one.start_us) / 1e6:.0f} s of "
        f"{bench.video.name} ({probed.info.width}x{probed.info.height}), medians of {turns} turn(s)"
    )
    free: dict[int, list[Turn]] = {1: [], 2: []}
    fed: dict[int, list[Turn]] = {1: [], 2: []}
    with slow_api() as api_url:
        for turn in range(turns):
            for processes in (1, 2):
                free[processes].append(freely(bench, probed, api_url, processes))
                place = bench.folder / f"turn-{turn}-{processes}"
                place.mkdir()
                fed[processes].append(queued(bench, probed, api_url, processes, place))
    for name, found in (("no queue, no ledger", free), ("workers", fed)):
        rates = " / ".join(f"{median(one.rate for one in found[n]):.3f}" for n in (1, 2))
        cpu = " / ".join(f"{median(one.own_s for one in found[n]):.3f}" for n in (1, 2))
        say(f"{name}: tasks a second by 1 / by 2", rates)
        say(f"{name}: CPU-s a task by 1 / by 2", cpu)
    possible = median(b.rate / a.rate for a, b in zip(free[1], free[2], strict=True))
    reached = median(b.rate / a.rate for a, b in zip(fed[1], fed[2], strict=True))
    say("speed-up from 1 to 2 without a queue: the ideal", f"{possible:.3f}")
    say("speed-up from 1 to 2 workers", f"{reached:.3f}")
    kept = reached / possible
    say("scaling efficiency", f"{kept:.3f}", "0.95 of ideal", met=kept >= 0.95)
    beside = median(b.rate / a.rate for a, b in zip(free[2], fed[2], strict=True))
    say("2 workers beside 2 processes without a queue", f"{beside:.3f}", "0.95", met=beside >= 0.95)
    rest = bench.folder / "rest"
    rest.mkdir()
    say("scheduler and servers with nothing to do", f"{at_rest(bench, rest, 10):.1%} of a core")
    if overhead_ms is not None:
        say("CPU of queue and ledger a task, servers included", f"{overhead_ms:.1f} ms")
        here_s = median(one.own_s for one in free[1])
        for way, task_s in (("measured here", here_s), ("mode `first`", FIRST_S)):
            share = overhead_ms / 1000 / (task_s + overhead_ms / 1000)
            say(f"share in a task of {task_s:.2f} CPU-s ({way})", f"{share:.2%}", "1 %",
                met=share < 0.01)  # fmt: skip


def freely(bench: Bench, probed: Probed, api_url: str, processes: int) -> Turn:
    """Processes that nobody feeds."""
    spawn = multiprocessing.get_context("spawn")
    start, answers = spawn.Barrier(processes), spawn.SimpleQueue()
    each = bench.count // processes
    children = [
        spawn.Process(target=_free, args=(probed, api_url, each, start, answers))
        for _ in range(processes)
    ]
    for child in children:
        child.start()
    found = [answers.get() for _ in children]
    for child in children:
        child.join()
    rate = steady(moments for moments, _ in found)
    return Turn(rate, sum(cpu_s for _, cpu_s in found) / (each * processes))


def _free(
    probed: Probed,
    api_url: str,
    count: int,
    start: Barrier,
    answers: multiprocessing.SimpleQueue[tuple[list[float], float]],
) -> None:
    labels = LabelVectors(np.eye(TOP, DIMENSION, dtype=np.float32))
    settings = WorkerSettings(api_url=api_url)
    moments = []
    assert probed.info is not None
    with closing(ApiClient(settings)) as client:
        client.endpoint()
        start.wait()
        before = time.process_time()
        for _ in range(count):
            decoded = read_range(
                probed.file.path, probed.info, probed.ranges[0], Sampling(), size=SIZE, fit=Fit.CROP
            )
            classify_range(
                decoded, sampling=Sampling(), fit=Fit.CROP, client=client, labels=labels,
                top_n=TOP, in_flight=settings.api_in_flight,
            )  # fmt: skip
            moments.append(time.monotonic())
        spent = time.process_time() - before
    answers.put((moments, spent))


def queued(bench: Bench, probed: Probed, api_url: str, workers: int, folder: Path) -> Turn:
    """Workers of one process each, by the moments of their commits."""
    assert probed.info is not None
    one = probed.ranges[0]
    short = replace(probed.info, duration_us=one.end_us, indexed_us=one.end_us)
    with ExitStack() as stack:
        engine = stack.enter_context(bench.fresh("postgresql"))
        job = ledger.open_job(engine, spec(MODEL), files=())
        for number in range(bench.count):
            # Other names for one file, and other videos to the ledger: nothing is stored of them.
            path = folder / f"{number}.mp4"
            path.symlink_to(bench.video.resolve())
            stat = path.stat()
            file = ArchiveFile(str(path), stat.st_size, stat.st_mtime_ns)
            video_id = ledger.register_file(engine, file, f"{number}")
            ledger.plan_video(engine, job.id, video_id, short, [one])
        ledger.finish_planning(engine, job.id)
        services = engine, bench.redis_url, folder
        pools = [
            stack.enter_context(worker(f"worker-{n}", *services[:2], api_url, folder, 1))
            for n in range(workers)
        ]
        stack.enter_context(scheduler(*services, window=4 * workers))
        before = processor_s(*pools)
        ends = _all_done(engine, bench.count)
        own_s = (processor_s(*pools) - before) / bench.count
    return Turn(steady(ends), own_s)


def at_rest(bench: Bench, folder: Path, seconds: float) -> float:
    """CPU seconds a second of a scheduler that has nothing to do, and of its servers."""
    with (
        bench.fresh("postgresql") as engine,
        scheduler(engine, bench.redis_url, folder, window=8) as feeder,
    ):
        before = processor_s(feeder, *bench.servers)
        time.sleep(seconds)
        return (processor_s(feeder, *bench.servers) - before) / seconds


def _all_done(engine: Engine, count: int) -> list[list[float]]:
    """When the tasks of each worker were done, once all are."""
    deadline = time.monotonic() + 60 * count
    while time.monotonic() < deadline:
        with reading(engine) as connection:
            rows = connection.execute(
                select(tasks.c.worker, tasks.c.done_ms)
                .where(tasks.c.state == "done")
                .order_by(tasks.c.done_ms)
            ).all()
        if len(rows) == count:
            ends: dict[str, list[float]] = {}
            for name, done_ms in rows:
                ends.setdefault(name, []).append(done_ms / 1000)
            return list(ends.values())
        time.sleep(0.5)
    raise SystemExit("the workers stand still")


def steady(ends: Iterable[Sequence[float]]) -> float:
    """Tasks a second of processes whose tasks ended at these moments, from the end of each one's
    second on: by then all is loaded and asked."""
    return sum((len(own) - 2) / (own[-1] - own[1]) for own in ends)


# -- processes


@contextmanager
def worker(  # noqa: PLR0917
    name: str, engine: Engine, redis_url: str, api_url: str, folder: Path, processes: int
) -> Iterator[int]:
    """A worker as an operator starts it, ready; its process, which leads a session."""
    words = ["-m", "celery", "-A", "workers.app", "worker", "--loglevel", "INFO"]
    how = ["--concurrency", str(processes), "--without-gossip", "--without-mingle"]
    named = {"NIGHTREEL_WORKER_NAME": name, "NIGHTREEL_API_URL": api_url or "http://127.0.0.1:1"}
    with _started(name, [*words, *how, "-n", f"{name}@%h"], engine, redis_url, folder, named) as (
        process,
        log,
    ):
        _until_said(" ready", process, log)
        yield process.pid


@contextmanager
def scheduler(engine: Engine, redis_url: str, folder: Path, *, window: int) -> Iterator[int]:
    """The scheduler service, as it begins to lead."""
    words, settings = ["-P", "-m", "scheduler"], {"NIGHTREEL_WINDOW": str(window)}
    with _started("scheduler", words, engine, redis_url, folder, settings) as (process, log):
        _until_said("this scheduler leads", process, log)
        yield process.pid


@contextmanager
def _started(  # noqa: PLR0917
    name: str, words: list[str], engine: Engine, redis_url: str, folder: Path, given: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    services = {
        "NIGHTREEL_DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "NIGHTREEL_BROKER_URL": redis_url,
        "NIGHTREEL_QUEUE": QUEUE,
        "OPENBLAS_NUM_THREADS": "1",
    }
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=kept | services | given,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield process, log
    finally:
        process.terminate()
        process.wait()


def _until_said(words: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while words not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{process.args!r} does not start: {log.read_text()}")
        time.sleep(0.02)


def _answer(ready: Connection) -> None:
    """Embed everything after the latency, as vectors of no meaning."""
    chance = np.random.default_rng(0)
    rows = max(MAX_BATCH, len(LABELS.labels))
    vectors = chance.normal(size=(rows, DIMENSION)).tolist()
    answers = {n: json.dumps({"embeddings": vectors[:n]}).encode() for n in range(1, rows + 1)}

    class Routes(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def say(self, content: bytes) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            self.wfile.write(head + content)

        def do_GET(self) -> None:
            self.say(json.dumps({"model": MODEL, "input_size": SIZE}).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = body.count(b'"base64"')
            if not asked:
                text = json.loads(body)["text"]
                asked = len(text) if isinstance(text, list) else 1
            time.sleep(LATENCY_S)
            self.say(answers[asked])

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Routes) as http:
        ready.send(f"http://127.0.0.1:{http.server_address[1]}")
        http.serve_forever()


@contextmanager
def slow_api() -> Iterator[str]:
    """Address of an API that sleeps and costs next to nothing, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()
