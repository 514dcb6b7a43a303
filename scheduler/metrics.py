"""The ledger as Prometheus reads it, and whether the scheduler is well."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from storage.database import DatabaseError
from storage.exits import ExitCode
from storage.ledger.census import Census, take_census
from workers.metrics import listen
from workers.settings import ServiceSettings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

SHARE = 1 / 20
"""Most of the time that goes into counting rows, however often it is asked for."""
AWAY_REST_S = 5.0
"""How long a database that was away is not asked."""
WELL_S = 60.0
"""A loop that has not stepped for longer is not well."""
HANGS_S = 300.0
"""A loop that has not even gone round in vain for longer will not by itself."""
LOOKS = 20
"""Looks within that time."""


class Health:
    """Whether the loop still turns. Told by the loop, asked by others' threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turned = self._stepped = clock()
        self._trouble: str | None = None

    def stepped(self) -> None:
        """The loop has gone round."""
        self._turned = self._stepped = self._clock()
        self._trouble = None

    def troubled(self, why: str) -> None:
        """The loop went round in vain."""
        self._turned = self._clock()
        self._trouble = why

    @property
    def complaint(self) -> str | None:
        """What is wrong; None where all is well."""
        waited_s = self._clock() - self._stepped
        if waited_s <= WELL_S:
            return None
        return f"no step for {waited_s:.0f} s: {self._trouble or 'the loop hangs'}"

    @property
    def hangs(self) -> bool:
        """Whether the loop has stood within one step for `HANGS_S`. A database that is away, and
        says so, is waited for."""
        return self._clock() - self._turned > HANGS_S


def watch(health: Health, stop: threading.Event) -> None:
    """End this process once its loop hangs, so that its supervisor starts it anew: what hangs
    within the database hears of nothing else."""

    def look() -> None:
        while not stop.wait(HANGS_S / LOOKS):
            if health.hangs:
                log.error("%s: it ends, to be started anew", health.complaint)
                os._exit(ExitCode.UNEXPECTED)

    threading.Thread(target=look, name="watchdog", daemon=True).start()


class LedgerCollector(Collector):
    """The gauges, asked of the database at each scrape, and seldom where that takes long."""

    def __init__(
        self,
        engine: Engine,
        waiting: Callable[[], int | None],
        leading: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`waiting` is the length of the queue, None where Redis is away or refuses; `leading` says
        whether this scheduler is the one that feeds."""
        self._engine = engine
        self._waiting = waiting
        self._leading = leading
        self._clock = clock
        self._one_at_a_time = threading.Lock()
        self._census: Census | None = None
        self._good_until = clock()

    def collect(self) -> Iterator[Metric]:
        """The gauges; what the database or the queue would say is left out while it is away."""
        census, waiting = self._asked(), self._waiting()
        up = GaugeMetricFamily(
            "nightreel_up", "Whether the service answers the scheduler", labels=["service"]
        )
        up.add_metric(["database"], census is not None)
        up.add_metric(["queue"], waiting is not None)
        yield up
        yield _gauge("leader", "Whether this scheduler is the one that feeds", self._leading())
        if waiting is not None:
            yield _gauge("queue_length", "Messages in the queue that no worker has taken", waiting)
        if census is None:
            return
        age = "Seconds since the oldest message was sent that no worker has taken"
        yield _gauge("queue_age_seconds", age, census.queue_age_s)
        yield _by_state("jobs", "Jobs", census.jobs)
        yield _by_state("videos", "Videos, once in each job that has them", census.videos)
        yield _by_state("probes", "Files of submitted jobs, to be planned", census.probes)
        yield _by_state("tasks", "Ranges of frames", census.tasks)
        yield _by_state("events", "Webhooks", census.events)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering asks no database."""
        return []

    def _asked(self) -> Census | None:
        with self._one_at_a_time:
            began = self._clock()
            if began < self._good_until:
                return self._census
            try:
                self._census = take_census(self._engine)
                took_s = self._clock() - began
                self._good_until = began + took_s / SHARE
            except DatabaseError:
                self._census = None
                self._good_until = self._clock() + AWAY_REST_S
            return self._census


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"nightreel_{name}", text, value=float(value))


def _by_state(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"nightreel_{name}", f"{text}, by state", labels=["state"])
    for state, count in counts.items():
        family.add_metric([state], count)
    return family


def serve(
    settings: ServiceSettings, collector: LedgerCollector, health: Health
) -> ThreadingWSGIServer | None:
    """Serve `/metrics` and `/healthz` from a thread; None, and nothing, with no port set. Raises
    `workers.metrics.PortTaken`."""
    if settings.metrics_port is None:
        return None
    registry = CollectorRegistry()
    registry.register(collector)

    def healthz(_environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        complaint = health.complaint
        status = "200 OK" if complaint is None else "503 Service Unavailable"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{complaint or 'well'}\n".encode()]

    return listen(settings, {"/metrics": make_wsgi_app(registry), "/healthz": healthz})
