"""Metrics of workers and scheduler, read as Prometheus reads them, and the scheduler's health."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import rows
from conftest import Service
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, insert, update

from scheduler.metrics import Health, LedgerCollector, serve
from storage import ledger
from storage.database import connect, writing
from storage.dialect import Now
from storage.ledger.census import take_census
from storage.records import TaskState, VideoState
from storage.schema import events, probes, tasks
from workers.metrics import Meters, Outcome, PortTaken, listen
from workers.settings import ServiceSettings
from workers.shared import Shared

DOCUMENT = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
NONE = dict.fromkeys(Outcome, 0)
ANY_PORT = ServiceSettings(metrics_port=0)

Sample = tuple[str, tuple[tuple[str, str], ...]]


def parsed(text: str) -> dict[Sample, float]:
    """Samples by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def get(port: int, path: str = "/metrics") -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(port: int) -> dict[Sample, float]:
    """What Prometheus reads."""
    status, text = get(port)
    assert status == 200
    return parsed(text)


def by_label(samples: dict[Sample, float], name: str) -> dict[str, float]:
    """The values of a metric of one label."""
    return {labels[0][1]: value for (found, labels), value in samples.items() if found == name}


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for it, for a minute at most."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


WORKER = """
import os
import signal
from celery.signals import setup_logging, worker_init
from storage.records import RangeResult, SampleResult, Usage
from workers import logs, metrics
from workers.app import make_app
from workers.settings import ServiceSettings

app = make_app()
app.conf.include = []
app.conf.worker_max_tasks_per_child = 2

@worker_init.connect
def begin(**_):
    logs.configure(ServiceSettings())
    metrics.serve(ServiceSettings())

@setup_logging.connect
def set_up(**_):
    pass

@app.task(name="count")
def count():
    sample = SampleResult(0, 0, 0, 1, ())
    usage = Usage(3, 1, 100, 0.5, 0.25)
    metrics.api_spent(usage)
    metrics.range_committed(RangeResult((sample, sample), (), None, 0, usage), 3.0, 0.125)
    metrics.task_ended(metrics.Outcome.DONE)
    metrics.task_ended(metrics.Outcome.FAULT, "read-error")
    metrics.probe_ended(metrics.Outcome.REFUSED)

@app.task(name="die")
def die():
    metrics.task_ended(metrics.Outcome.LOST)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def worker(
    folder: Path,
    redis_url: str,
    port: int | None = 0,
    app: str = "counting",
    database_url: str = "",
) -> Iterator[subprocess.Popen[str]]:
    """A real worker of two processes that counts what it is told; its log is its standard error."""
    (folder / "counting.py").write_text(WORKER)
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    environment |= {
        "NIGHTREEL_BROKER_URL": redis_url,
        "NIGHTREEL_QUEUE": "counting",
        "PYTHONWARNINGS": "ignore",
        "TMPDIR": str(folder / "tmp"),
    }
    if port is not None:
        environment["NIGHTREEL_METRICS_PORT"] = str(port)
    if database_url:
        environment["NIGHTREEL_DATABASE_URL"] = database_url
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "-A", app, "worker", "--concurrency", "2"),
            *("--without-gossip", "--without-mingle"),
        ],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            # Told to end just as a result is on its way, a process of the pool waits up to 30 s for
            # that to be read.
            started.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()


def port_of(started: subprocess.Popen[str]) -> int:
    """The port that the service says it took."""
    assert started.stderr is not None
    for line in started.stderr:
        if found := re.search(r"metrics are at http://127\.0\.0\.1:(\d+)/metrics", line):
            # The pipe must not fill up.
            threading.Thread(target=started.stderr.read, daemon=True).start()
            return int(found[1])
    raise AssertionError("the service ended")


def send(folder: Path, redis_url: str, *names: str) -> None:
    """Send the tasks to the worker."""
    from workers.app import make_app
    from workers.settings import QueueSettings

    app = make_app(QueueSettings(broker_url=redis_url, queue="counting"))  # type: ignore[arg-type]
    for name in names:
        app.send_task(name)
    app.close()


def test_a_workers_processes_count_together(tmp_path: Path, redis_url: str) -> None:
    """Counters add up over the pool, its killed and its replaced processes; the files they are kept
    in are as many as the pool has places, and gone when the worker has ended."""
    with worker(tmp_path, redis_url) as started:
        port = port_of(started)
        send(tmp_path, redis_url, *["count"] * 8, "die", *["count"] * 4)
        name = "nightreel_frames_total"
        ended = NONE | {"done": 12, "fault": 12, "lost": 1}, NONE | {"refused": 12}

        def counted() -> tuple[dict[str, float], ...]:
            page = scrape(port)
            return tuple(by_label(page, f"nightreel_{row}_total") for row in ("tasks", "probes"))

        # A task counts its probe last.
        until(lambda: counted() == ended, "all are counted")
        samples = scrape(port)
        assert samples[name, ()] == 24
        assert by_label(samples, "nightreel_errors_total") == {"read-error": 12}
        assert by_label(samples, "nightreel_api_calls_total") == {"image": 36, "text": 12}
        assert samples["nightreel_decode_seconds_total", ()] == 3
        assert samples["nightreel_api_wait_seconds_total", ()] == 6
        assert samples["nightreel_commit_seconds_total", ()] == 1.5
        assert samples["nightreel_range_seconds_count", ()] == 12
        assert samples["nightreel_range_seconds_sum", ()] == 36
        assert samples["nightreel_range_seconds_bucket", (("le", "2.5"),)] == 0
        assert samples["nightreel_range_seconds_bucket", (("le", "5.0"),)] == 12
        (folder,) = (tmp_path / "tmp").glob("nightreel-metrics-*")
        # Two kinds of files for each of two places, and for the first process.
        assert len(list(folder.iterdir())) <= 6
        (folder / "counter_7.db").touch()  # as a process has it that begins at this moment
        assert scrape(port)[name, ()] == 24
        assert get(port, "/")[0] == 404
    assert started.returncode == 0
    assert not folder.exists()
    with pytest.raises(OSError, match="refused"):
        get(port)


def test_two_workers_of_a_host_cannot_have_one_port(
    tmp_path: Path, redis_url: str, sqlite_url: str
) -> None:
    """The second one says so in a line and ends with 2."""
    with worker(tmp_path, redis_url, 0, "workers.app", sqlite_url) as first:
        port = port_of(first)
        assert by_label(scrape(port), "nightreel_tasks_total") == NONE
        with worker(tmp_path, redis_url, port, "workers.app", sqlite_url) as second:
            assert second.stderr is not None
            said = second.stderr.read()
            assert second.wait(60) == 2
            assert f"metrics cannot be served at 127.0.0.1:{port}: it is taken" in said


def test_without_a_port_nothing_is_counted_and_no_file_made(tmp_path: Path, redis_url: str) -> None:
    """Metrics that nobody asked for cost nothing."""
    with worker(tmp_path, redis_url, None) as started:
        assert started.stderr is not None
        for line in started.stderr:
            if "ready" in line:
                break
        send(tmp_path, redis_url, "count")
        shared = Shared(redis_url, "counting")
        until(lambda: shared.waiting() == 0, "it is taken")
        shared.close()
    assert started.returncode == 0
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.fixture
def server_port() -> Iterator[Callable[..., int]]:
    """Serves a scheduler's pages; they end with the test."""
    servers = []

    def start(collector: LedgerCollector, health: Health | None = None) -> int:
        server = serve(ANY_PORT, collector, health or Health())
        assert server is not None
        servers.append(server)
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Clock:
    """A clock that a test moves; asking takes `each_s` of it."""

    def __init__(self, each_s: float = 0.0) -> None:
        self.now = 1000.0
        self.each_s = each_s

    def __call__(self) -> float:
        self.now += self.each_s
        return self.now


def in_every_state(engine: Engine) -> int:
    """A job of a video with tasks in several states, a probe, an event, and a message 60 s old."""
    made = rows.planned(engine, 20, 8)
    first, *_ = ledger.feed(engine, 3)
    rows.claimed(engine, first)
    with writing(engine) as connection:
        connection.execute(
            update(tasks).where(tasks.c.state == TaskState.QUEUED).values(queued_ms=Now() - 60_000)
        )
        work = {"attempts": 0, "fence": 0, "not_before_ms": 0, "job_id": made.job_id}
        file = {"path_raw": b"/a", "size_bytes": 1, "mtime_ns": 1}
        connection.execute(
            insert(probes).values(path_sha256=b"a", state=TaskState.FAILED, **file, **work)
        )
        connection.execute(
            insert(events).values(
                id="e",
                job_id=made.job_id,
                kind="job.closed",
                url="http://x",
                body="{}",
                state="given-up",
                attempts=1,
                not_before_ms=0,
                created_ms=0,
            )
        )
    return made.job_id


def test_the_scheduler_shows_how_the_ledger_stands(
    engine: Engine, redis_url: str, server_port: Callable[..., int]
) -> None:
    """Each state of each kind of row is a sample, also those of which there is none; the age of the
    oldest message goes by the database's clock."""
    in_every_state(engine)
    shared = Shared(redis_url, "q")
    shared._ask(lambda client: client.rpush("q", "m", "m"))
    port = server_port(LedgerCollector(engine, shared.waiting, lambda: True))
    samples = scrape(port)
    shared.close()
    assert by_label(samples, "nightreel_tasks") == dict.fromkeys(TaskState, 0) | {
        "pending": 4,
        "queued": 2,
        "leased": 1,
    }
    assert by_label(samples, "nightreel_videos") == dict.fromkeys(VideoState, 0) | {"running": 2}
    assert by_label(samples, "nightreel_jobs") == {"running": 1, "paused": 0, "closed": 0}
    assert by_label(samples, "nightreel_probes") == dict.fromkeys(TaskState, 0) | {"failed": 1}
    assert by_label(samples, "nightreel_events") == {"pending": 0, "delivered": 0, "given-up": 1}
    assert 60 <= samples["nightreel_queue_age_seconds", ()] < 120
    assert samples["nightreel_queue_length", ()] == 2
    assert samples["nightreel_leader", ()] == 1
    assert by_label(samples, "nightreel_up") == {"database": 1, "queue": 1}


def test_a_message_that_nobody_takes_grows_old(engine: Engine) -> None:
    """As long as the queue holds it, sweeping leaves it its age; what the queue has lost has none
    until it is sent again."""
    rows.planned(engine, 20, 8)
    assert len(ledger.feed(engine, 3)) == 3
    with writing(engine) as connection:
        connection.execute(
            update(tasks)
            .where(tasks.c.state == TaskState.QUEUED)
            .values(queued_ms=Now() - 4_000_000)
        )
    for waiting in (3, None):
        ledger.sweep(engine, 120, waiting=waiting)
        assert take_census(engine).queue_age_s >= 4000
    ledger.sweep(engine, 120, waiting=0)
    assert take_census(engine).queue_age_s == 0
    assert len(ledger.feed(engine, 3)) == 3
    assert take_census(engine).queue_age_s < 60


def test_an_empty_ledger_has_no_age(engine: Engine, server_port: Callable[..., int]) -> None:
    """Without messages nothing waits."""
    port = server_port(LedgerCollector(engine, lambda: 0, lambda: False))
    samples = scrape(port)
    assert samples["nightreel_queue_age_seconds", ()] == 0
    assert samples["nightreel_leader", ()] == 0
    assert sum(by_label(samples, "nightreel_tasks").values()) == 0


def test_a_database_that_is_away_breaks_no_scrape(
    postgres_url: str, postgres_service: Service, server_port: Callable[..., int]
) -> None:
    """While it is away the page says so and leaves out what only it knows; then all is there."""
    engine, clock = connect(postgres_url), Clock()
    port = server_port(LedgerCollector(engine, lambda: None, lambda: True, clock=clock))
    assert by_label(scrape(port), "nightreel_up") == {"database": 1, "queue": 0}
    postgres_service.stop(kill=True)
    clock.now += 100
    away = scrape(port)
    assert by_label(away, "nightreel_up") == {"database": 0, "queue": 0}
    assert {name for name, _ in away} == {"nightreel_up", "nightreel_leader"}
    postgres_service.start()
    clock.now += 5
    assert ("nightreel_queue_age_seconds", ()) in scrape(port)
    engine.dispose()


def test_at_most_a_twentieth_of_the_time_goes_into_counting(sqlite_url: str) -> None:
    """An answer that took 3 seconds is shown for 60, to any number of those who ask."""
    engine, clock = connect(sqlite_url), Clock(each_s=3.0)
    collector = LedgerCollector(engine, lambda: 0, lambda: True, clock=clock)

    def closed_jobs() -> float:
        (family,) = (f for f in collector.collect() if f.name == "nightreel_jobs")
        return sum(sample.value for sample in family.samples)

    assert closed_jobs() == 0
    counted_at = clock.now
    clock.each_s = 0.0
    rows.planned(engine, 4)
    clock.now = counted_at - 6 + 3 + 59.9
    assert closed_jobs() == 0
    clock.now = counted_at + 60
    assert closed_jobs() == 1
    engine.dispose()


def test_health_is_the_loops(sqlite_url: str, server_port: Callable[..., int]) -> None:
    """200 while the loop has stepped within a minute, 503 with the reason after that."""
    engine, clock = connect(sqlite_url), Clock()
    health = Health(clock=clock)
    port = server_port(LedgerCollector(engine, lambda: 0, lambda: True), health)
    assert get(port, "/healthz") == (200, "well\n")
    clock.now += 61
    assert get(port, "/healthz") == (503, "no step for 61 s: the loop hangs\n")
    health.troubled("the database is away")
    assert get(port, "/healthz") == (503, "no step for 61 s: the database is away\n")
    health.stepped()
    assert get(port, "/healthz") == (200, "well\n")
    assert get(port, "/other")[0] == 404
    engine.dispose()


def test_of_two_schedulers_one_leads(tmp_path: Path, sqlite_url: str, redis_url: str) -> None:
    """Real services, each at a port of its own: both are well, and one says that it leads."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    environment |= {
        "NIGHTREEL_DATABASE_URL": sqlite_url,
        "NIGHTREEL_BROKER_URL": redis_url,
        "NIGHTREEL_METRICS_PORT": "0",
    }
    started = []
    try:
        for _ in range(2):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "scheduler"],
                    cwd=tmp_path,
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ports = [port_of(each) for each in started]
        until(lambda: sum(scrape(port)["nightreel_leader", ()] for port in ports) == 1, "one leads")
        assert [get(port, "/healthz") for port in ports] == [(200, "well\n")] * 2
    finally:
        for each in started:
            each.terminate()
        codes = [each.wait(60) for each in started]
        for each in started:
            assert each.stderr is not None
            each.stderr.close()
    assert codes == [0, 0]


def test_a_client_that_says_nothing_holds_up_no_other(
    sqlite_url: str, server_port: Callable[..., int]
) -> None:
    """Each client has a thread of its own."""
    engine = connect(sqlite_url)
    port = server_port(LedgerCollector(engine, lambda: 0, lambda: True))
    with socket.create_connection(("127.0.0.1", port)):
        assert get(port, "/healthz")[0] == 200
    engine.dispose()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_endpoint_is_where_the_settings_say(host: str) -> None:
    """On either kind of loopback address; a port that is taken is said in one line."""
    try:
        server = listen(ServiceSettings(metrics_host=host, metrics_port=0), {})
    except PortTaken:
        pytest.skip(f"this machine has no {host}")
    taken = ServiceSettings(metrics_host=host, metrics_port=server.server_port)
    with pytest.raises(PortTaken, match=rf"at {host}:\d+: it is taken; set NIGHTREEL_METRICS"):
        listen(taken, {})
    server.shutdown()
    server.server_close()


def test_an_address_of_another_machine_is_refused_in_one_line() -> None:
    """What cannot be listened on is named with the reason."""
    with pytest.raises(PortTaken, match=r"192\.0\.2\.1"):
        listen(ServiceSettings(metrics_host="192.0.2.1", metrics_port=0), {})


def test_the_document_names_every_metric(sqlite_url: str) -> None:
    """The tables of the documentation hold the names, labels and kinds that there are, no more."""
    registry = CollectorRegistry()
    Meters(registry)
    engine = connect(sqlite_url)
    shown = {
        f"{family.name}{'_total' if family.type == 'counter' else ''}": family.type
        for family in [
            *registry.collect(),
            *LedgerCollector(engine, lambda: 0, lambda: True).collect(),
        ]
    }
    engine.dispose()
    documented = dict(re.findall(r"^\| `(nightreel_\w+)(?:\{.*?\})?` \| (\w+) \|", DOCUMENT, re.M))
    assert documented == shown


HANGING = """
import runpy
from scheduler import metrics

metrics.WELL_S = 3.0
metrics.HANGS_S = 6.0
runpy.run_module("scheduler", run_name="__main__", alter_sys=True)
"""
"""A scheduler that waits for seconds where others wait for minutes."""


def test_a_scheduler_that_hangs_in_the_database_ends(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    """With 1 and one line, so that its supervisor starts it anew."""
    said = tmp_path / "log"
    with psycopg.connect(postgres_url) as other, said.open("wb") as log:
        scheduler = subprocess.Popen(
            [sys.executable, "-c", HANGING],
            env=os.environ
            | {"NIGHTREEL_DATABASE_URL": postgres_url, "NIGHTREEL_BROKER_URL": redis_url},
            stderr=log,
        )
        try:
            until(lambda: "this scheduler leads" in said.read_text(), "it leads")
            other.execute("LOCK TABLE tasks, probes IN ACCESS EXCLUSIVE MODE")
            assert scheduler.wait(60) == 1
        finally:
            scheduler.kill()
            scheduler.wait()
    last = said.read_text().splitlines()[-1]
    assert re.search(r"ERROR .* no step for \d+ s: the loop hangs: it ends, to be started", last)


def test_a_loop_that_goes_round_in_vain_does_not_hang() -> None:
    """A database that is away for a night is no reason to end; one that never answers is."""
    now = [0.0]
    health = Health(clock=lambda: now[0])
    for _ in range(100):
        now[0] += 60
        health.troubled("the database is away")
    assert health.complaint is not None
    assert not health.hangs
    now[0] += 301
    assert health.hangs
    health.stepped()
    assert not health.hangs
