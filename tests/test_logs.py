"""Logs: one event a line, in both forms, whatever a message holds."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from workers import logs
from workers.settings import LogFormat, ServiceSettings

log = logging.getLogger("nightreel.test")

HOSTILE = (
    "clip\r\n2026-01-01T00:00:00.000Z ERROR workers.tasks[1] task=9: forged\x1b[2J\x9b1m\0\u2028"
    "\u202egpj.exe"
)


class Stream:
    """What is logged while the form is set up, as lines."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.written = io.TextIOWrapper(self.buffer, "utf-8", "strict", write_through=True)

    @property
    def lines(self) -> list[str]:
        """Everything logged so far."""
        return self.buffer.getvalue().decode().splitlines()

    @property
    def only(self) -> str:
        """The one line that was logged."""
        (line,) = self.lines
        return line


@pytest.fixture
def stream(form: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The root logger set up in the form; as it was before, afterwards."""
    made = Stream()
    monkeypatch.setattr(sys, "stderr", made.written)
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    logs.configure(ServiceSettings(log_format=LogFormat(form)))
    yield made
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(level)


TEXT = pytest.mark.parametrize("form", ["text"])
JSON = pytest.mark.parametrize("form", ["json"])
BOTH = pytest.mark.parametrize("form", ["text", "json"])


@TEXT
def test_a_line_of_text_has_moment_level_origin_and_message(stream: Stream) -> None:
    """Without ids a line is what people expect of one."""
    log.warning("%d videos wait", 3)
    moment, rest = stream.only.split(" ", 1)
    assert rest == f"WARNING nightreel.test[{os.getpid()}]: 3 videos wait"
    assert moment.endswith("Z")
    assert abs(datetime.now(UTC) - datetime.fromisoformat(moment)) < timedelta(minutes=1)


@JSON
def test_a_line_of_json_has_the_same_as_fields(stream: Stream) -> None:
    """Each event is one object with the documented names."""
    with logs.about(job=1, video=2, task=3):
        log.warning("%d videos wait", 3)
    event = json.loads(stream.only)
    moment = datetime.fromisoformat(event.pop("time"))
    assert abs(datetime.now(UTC) - moment) < timedelta(minutes=1)
    assert event == {
        "level": "WARNING",
        "logger": "nightreel.test",
        "process": os.getpid(),
        "job": 1,
        "video": 2,
        "task": 3,
        "message": "3 videos wait",
    }


@TEXT
def test_lines_within_a_task_tell_of_it_and_those_after_do_not(stream: Stream) -> None:
    """Ids add up inwards and end with their block, also where it ends by an exception."""
    with logs.about(job=1):
        with suppress(KeyError), logs.about(video=2, task=3):
            log.info("inner")
            raise KeyError
        log.info("outer")
    with logs.about(probe=4):
        log.info("probe")
    log.info("none")
    assert [line.split(" ", 2)[2].partition("] ")[2] for line in stream.lines[:3]] == [
        "job=1 video=2 task=3: inner",
        "job=1: outer",
        "probe=4: probe",
    ]
    assert stream.lines[3].endswith("]: none")


@TEXT
def test_threads_that_run_in_the_tasks_context_tell_of_it(stream: Stream) -> None:
    """A thread knows the ids of the context that it was given, and no others."""
    with logs.about(job=1, task=3):
        for target in (copy_context().run, lambda work, *args: work(*args)):
            thread = threading.Thread(target=target, args=(log.info, "asked"))
            thread.start()
            thread.join()
    assert " job=1 task=3: asked" in stream.lines[0]
    assert "job=" not in stream.lines[1]


@BOTH
def test_nothing_in_a_message_begins_a_line_or_moves_a_cursor(stream: Stream, form: str) -> None:
    """Newlines, control characters and marks of direction are written as escapes, whether they come
    in the message or its arguments; what is harmless stays."""
    log.info("größe of %s", HOSTILE)
    log.info(HOSTILE)
    assert len(stream.lines) == 2
    for line in stream.lines:
        assert line.isprintable()
        assert "\\r\\n2026" in line
    if form == "json":
        assert json.loads(stream.lines[0])["message"] == f"größe of {HOSTILE}"
    else:
        assert "größe" in stream.lines[0]
        # The fields that count stand before the message.
        assert all("task=" not in line.split(": ")[0] for line in stream.lines)


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_a_name_that_is_no_text_can_be_written(formatter: logging.Formatter) -> None:
    """A file's name of other bytes than UTF-8 comes as lone surrogates, which no stream takes."""
    name = os.fsdecode(b"clip\xff.mp4")
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "opening %s", (name,), None)
    assert formatter.format(record).encode().decode().count("clip\\udcff.mp4") == 1


@JSON
def test_an_exception_is_one_line_of_json(stream: Stream) -> None:
    """Its traceback is a field, with the line ends escaped."""
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("it %s", "fails")
    event = json.loads(stream.only)
    assert event["message"] == "it fails"
    assert event["exception"].startswith("Traceback (most recent call last):\n")
    assert HOSTILE in event["exception"]


@TEXT
def test_an_exceptions_lines_are_told_from_events(stream: Stream) -> None:
    """In text, each line of a traceback begins with a mark that no event begins with."""
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("it fails")
    head, *told = stream.lines
    assert head.endswith("it fails")
    assert told[0] == "    | Traceback (most recent call last):"
    assert all(line.startswith("    | ") and line.isprintable() for line in told)


@BOTH
def test_the_level_of_the_settings_holds(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is below the level is not logged; setting up again replaces, and doubles nothing."""
    monkeypatch.setattr(sys, "stderr", stream.written)
    logs.configure(ServiceSettings(log_level="WARNING"))
    log.info("unheard")
    log.warning("heard")
    assert stream.only.endswith("]: heard")


@BOTH
def test_celery_speaks_in_the_same_form_and_not_twice_of_a_task(stream: Stream) -> None:
    """Celery's own lines take the form; its two lines a message are left to the task."""
    logging.getLogger("celery.worker.consumer").info("Connected")
    logging.getLogger("celery.app.trace").info("Task succeeded")
    logging.getLogger("celery.worker.strategy").info("Task received")
    assert "Connected" in stream.only


SPEAKING = """
import logging
from celery.signals import setup_logging, worker_ready
from workers import logs
from workers.app import make_app
from workers.settings import ServiceSettings

app = make_app()
app.conf.include = []

@setup_logging.connect
def set_up(**_):
    logs.configure(ServiceSettings())

@app.task(name="speak")
def speak(task_id):
    with logs.about(job=7, task=task_id):
        logging.getLogger("speaker").info("spoken")

@worker_ready.connect
def begin(**_):
    app.send_task("speak", args=[5])
"""


@BOTH
def test_a_real_worker_logs_in_the_form(form: str, tmp_path: Path, redis_url: str) -> None:
    """From its first line to its last, in its first process and in its pool's, a worker's standard
    error holds lines of the form alone."""
    (tmp_path / "speaking.py").write_text(SPEAKING)
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "-A", "speaking", "worker", "--concurrency", "1"),
            *("--without-gossip", "--without-mingle"),
        ],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")},
            # Celery warns of root's privileges before it sets up any log.
            "PYTHONWARNINGS": "ignore",
            "NIGHTREEL_BROKER_URL": redis_url,
            "NIGHTREEL_QUEUE": "speaking",
            "NIGHTREEL_LOG_FORMAT": form,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stderr is not None
    lines: list[str] = []
    with started, started.stderr as log_of_worker, redis.Redis.from_url(redis_url) as client:
        for line in log_of_worker:
            lines.append(line.rstrip("\n"))
            if "spoken" in line:
                # Celery takes a while to end where it meets a message that is not acknowledged.
                while client.zcard("unacked_index"):
                    time.sleep(0.02)
                started.terminate()
    assert started.returncode == 0, lines
    assert any("Connected to redis" in line for line in lines)
    if form == "json":
        spoken = [e for line in lines if (e := json.loads(line))["logger"] == "speaker"]
        assert [(e["job"], e["task"], e["message"]) for e in spoken] == [(7, 5, "spoken")]
    else:
        assert all(line.split(" ")[1] in ("INFO", "WARNING") for line in lines), lines
        assert [line for line in lines if line.endswith(" job=7 task=5: spoken")]


def service(command: list[str], folder: Path, **settings: str) -> subprocess.Popen[str]:
    """A service that logs JSON, whose two streams are one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=kept | {"NIGHTREEL_LOG_FORMAT": "json", "PYTHONWARNINGS": "ignore"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_a_worker_says_of_a_signal_is_json_too(
    tmp_path: Path, redis_url: str, sqlite_url: str
) -> None:
    """Standard output holds nothing of Celery's own as the worker ends."""
    celery = ["celery", "-A", "workers.app", "worker", "--concurrency", "1", "--without-mingle"]
    urls = {"NIGHTREEL_BROKER_URL": redis_url, "NIGHTREEL_DATABASE_URL": sqlite_url}
    worker = service(celery, tmp_path, **urls)
    assert worker.stdout is not None
    said = []
    with worker, worker.stdout as lines:
        for line in lines:
            said.append(json.loads(line)["message"])
            if said[-1].endswith("ready."):
                worker.terminate()
    assert worker.returncode == 0
    assert "worker: Warm shutdown (MainProcess)" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FEED_INTERVAL_S", "inf"),
        ("FEED_INTERVAL_S", "1e12"),
        ("SWEEP_INTERVAL_S", "nan"),
        ("LEADER_LEASE_S", "inf"),
        ("QUEUED_TIMEOUT_S", "100000000000"),
        ("STALL_S", "inf"),
    ],
)
def test_a_scheduler_that_does_not_start_says_so_in_the_form(
    tmp_path: Path, name: str, value: str
) -> None:
    """One line names the setting that no clock could keep, and the exit code is that of one."""
    scheduler = service(["scheduler"], tmp_path, **{f"NIGHTREEL_{name}": value})
    said, _ = scheduler.communicate(timeout=60)
    assert scheduler.returncode == 2
    if name == "STALL_S":  # of the settings that say what the form is
        assert said.startswith("the scheduler does not start: NIGHTREEL_STALL_S: ")
    else:
        message = json.loads(said)["message"]
        assert message.startswith(f"the scheduler does not start: NIGHTREEL_{name}: ")
    assert len(said.splitlines()) == 1
