"""What a worker counts, as Prometheus reads it: over all its processes, at one address.

Off unless `NIGHTREEL_METRICS_PORT` is set; then `serve` runs in the worker's first process, before
the pool's are forked, and each of those counts in a file of its own in a directory that all share.
A file belongs to a place in the pool and not to a process, so that a process which takes another's
place counts on, and the files stay as many as the pool is large.
"""

from __future__ import annotations

import atexit
import errno
import functools
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client.values
from billiard import current_process
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from storage.records import RangeResult, Usage
from workers.settings import ServiceSettings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

SLOWEST_CLIENT_S = 10.0
"""How long a client of the endpoint may take to ask."""
_RANGE_S = (0.5, 1, 2.5, 5, 10, 20, 40, 60, 90, 120, 180, 300, 600, 1800, 3600)


class PortTaken(Exception):
    """The endpoint cannot listen where the settings say."""


class Outcome(StrEnum):
    """What became of a message that a worker took."""

    DONE = "done"
    """Committed."""
    OUTAGE = "outage"
    """The API was away: put back, no attempt spent."""
    FAULT = "fault"
    """Failed by its own fault: an attempt spent."""
    LOST = "lost"
    """The lease went to another worker, nothing written."""
    PAUSED = "paused"
    """The whole job was held: key, credits or budget."""
    REFUSED = "refused"
    """Not begun: the ledger had no use for it, or it was planned by another release."""


class Meters:
    """The counters of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"nightreel_{name}", text, labels, registry=registry)

        self.tasks = counter(
            "tasks", "Ranges taken from the queue, by what became of them", "outcome"
        )
        self.probes = counter(
            "probes", "Files taken to be probed, by what became of them", "outcome"
        )
        self.errors = counter("errors", "Attempts that were not committed, by reason", "kind")
        self.frames = counter("frames", "Frames of committed ranges that have a result")
        self.calls = counter("api_calls", "Calls that the API bills", "kind")
        self.decode_s = counter("decode_seconds", "Decoding and preparing of committed ranges")
        self.wait_s = counter(
            "api_wait_seconds", "From a request to its answer, added up over requests at once"
        )
        self.commit_s = counter("commit_seconds", "Writing of committed ranges to the database")
        self.range_s = Histogram(
            "nightreel_range_seconds",
            "From claim to commit of a range",
            registry=registry,
            buckets=_RANGE_S,
        )
        # A rate is known from the first event on only where there was a zero before it.
        for outcome in Outcome:
            self.tasks.labels(outcome)
            self.probes.labels(outcome)
        for kind in ("image", "text"):
            self.calls.labels(kind)


class _Pool(MultiProcessCollector):
    """All processes' counters. A process that just begins has made its file and written nothing to
    it, which the library takes for damage."""

    def collect(self) -> Iterable[Metric]:
        """What the files that hold anything add up to."""
        files = [file for file in Path(self._path).glob("*.db") if file.stat().st_size]
        merged: Iterable[Metric] = self.merge(map(str, files), accumulate=True)  # type: ignore[no-untyped-call]
        return merged


_meters: Meters | None = None


def task_ended(outcome: Outcome, error_kind: str | None = None) -> None:
    """A message of a range was dealt with; `error_kind` is the one that the ledger was told."""
    if _meters is not None:
        _meters.tasks.labels(outcome).inc()
        _count_error(_meters, error_kind)


def probe_ended(outcome: Outcome, error_kind: str | None = None) -> None:
    """A message of a file to be probed was dealt with."""
    if _meters is not None:
        _meters.probes.labels(outcome).inc()
        _count_error(_meters, error_kind)


def range_committed(result: RangeResult, seconds: float, commit_seconds: float) -> None:
    """A range was committed `seconds` after its claim, `commit_seconds` of which were writing."""
    if _meters is not None:
        _meters.frames.inc(len(result.samples))
        _meters.decode_s.inc(result.usage.decode_seconds)
        _meters.commit_s.inc(commit_seconds)
        _meters.range_s.observe(seconds)


def api_spent(usage: Usage) -> None:
    """An attempt made these calls, whatever became of it."""
    if _meters is not None:
        _meters.calls.labels("image").inc(usage.image_calls)
        _meters.calls.labels("text").inc(usage.text_calls)
        _meters.wait_s.inc(usage.api_seconds)


def _count_error(meters: Meters, kind: str | None) -> None:
    if kind is not None:
        meters.errors.labels(kind).inc()


def serve(settings: ServiceSettings) -> None:
    """Count from now on, in this process and those forked from it, and show it at `/metrics`; with
    no port set, do nothing. Once a process, before any fork. Raises PortTaken.
    """
    global _meters  # noqa: PLW0603 - a process counts in one place
    if settings.metrics_port is None:
        return
    folder = tempfile.mkdtemp(prefix="nightreel-metrics-")
    atexit.register(_remove, folder, os.getpid())
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue(  # type: ignore[no-untyped-call]
        _place
    )
    _meters = Meters(CollectorRegistry())
    shown = CollectorRegistry()
    _Pool(shown, folder)  # type: ignore[no-untyped-call]
    listen(settings, {"/metrics": make_wsgi_app(shown)})


def _place() -> str:
    """Name of this process's place in the pool; no two that live have the same."""
    return str(getattr(current_process(), "index", "parent"))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def listen(settings: ServiceSettings, pages: Mapping[str, WSGIApplication]) -> ThreadingWSGIServer:
    """Serve the pages, by path, in a thread of this process, and say in the log where; port 0 is
    any that is free. The server's `server_port` is the port. Raises PortTaken.
    """
    host, port = settings.metrics_host, settings.metrics_port or 0

    class Server(ThreadingWSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = make_server(host, port, functools.partial(_page, pages), Server, _Quiet)
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "it is taken" if taken else str(error)
        raise PortTaken(
            f"metrics cannot be served at {host}:{port}: {why}; "
            "set NIGHTREEL_METRICS_HOST and NIGHTREEL_METRICS_PORT, 0 for any free port"
        ) from None
    # A forked process that outlives this one would keep the port taken.
    os.register_at_fork(after_in_child=server.socket.close)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info(
        "metrics are at http://%s:%d/metrics",
        f"[{host}]" if ":" in host else host,
        server.server_port,
    )
    return server


def _page(
    pages: Mapping[str, WSGIApplication], environ: WSGIEnvironment, start: StartResponse
) -> Iterable[bytes]:
    page = pages.get(environ["PATH_INFO"])
    if page is None:
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there is " + ", ".join(pages).encode() + b"\n"]
    return page(environ, start)


class _Quiet(WSGIRequestHandler):
    """Logs no requests, and waits for no client for ever."""

    timeout = SLOWEST_CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it overrides
        """Nothing."""
