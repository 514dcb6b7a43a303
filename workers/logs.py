"""Logs: one event a line, for people or as JSON, with the job, video and task that it is about.

What is logged may hold names of files and answers of servers, so nothing in a message can begin a
line of its own, move a terminal's cursor or pass for a field.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

from workers.settings import LogFormat, ServiceSettings

_about: ContextVar[Mapping[str, int]] = ContextVar("about", default=MappingProxyType({}))

# C0, C1 and DEL; separators that some readers take for ends of lines; marks that turn the direction
# of writing; halves of surrogate pairs, which no encoding can write.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_QUIET = ("celery.app.trace", "celery.worker.strategy", "alembic.runtime.migration")
"""Heard from WARNING up: of each message Celery says "received" and "succeeded", which the task
says better, and Alembic of each look at the tables what kind of database it is."""


@contextmanager
def about(
    *,
    job: int | None = None,
    video: int | None = None,
    task: int | None = None,
    probe: int | None = None,
) -> Iterator[None]:
    """Within, each line logged tells of these ids, as well as of those around. A thread started
    within does so too if it runs in `contextvars.copy_context()`."""
    given = {"job": job, "video": video, "task": task, "probe": probe}
    known = {name: value for name, value in given.items() if value is not None}
    token = _about.set({**_about.get(), **known})
    try:
        yield
    finally:
        _about.reset(token)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER[PID] job=1 video=2 task=3: MESSAGE`; fields come first, since a message
    could imitate them. A traceback follows in lines that begin with `    | `."""

    def format(self, record: logging.LogRecord) -> str:
        """The event as text."""
        fields = "".join(f" {name}={value}" for name, value in _about.get().items())
        head = f"{_moment(record)} {record.levelname} {record.name}[{record.process}]{fields}"
        lines = [f"{head}: {_harmless(record.getMessage())}"]
        lines += [f"    | {_harmless(line)}" for line in _traceback(record).split("\n") if line]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, process, message, the ids it is about, and
    `exception` with a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The event as JSON, in ASCII alone."""
        event: dict[str, object] = {
            "time": _moment(record),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            **_about.get(),
            "message": record.getMessage(),
        }
        if told := _traceback(record):
            event["exception"] = told
        return json.dumps(event)


def configure(settings: ServiceSettings) -> None:
    """Log to standard error in the form and from the level that the settings name. Done again, it
    replaces what was set up before."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if settings.log_format is LogFormat.JSON else TextFormatter()
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def say(message: str, *_: object) -> None:
    """Log what Celery says as it handles a signal, which may have come in the middle of a line:
    written at once, past locks and buffers. What comes with a message is the stream that it was
    meant for."""
    record = logging.LogRecord("celery.worker", logging.INFO, "", 0, "%s", (message,), None)
    if logging.getLogger(record.name).isEnabledFor(record.levelno):
        for handler in logging.getLogger().handlers:
            with suppress(OSError):
                os.write(2, f"{handler.format(record)}\n".encode())


def _moment(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> str:
    told = [logging.Formatter().formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        told.append(record.stack_info)
    return "\n".join(told)


def _harmless(text: str) -> str:
    """The text with what could act on a terminal or end a line written as escapes."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
