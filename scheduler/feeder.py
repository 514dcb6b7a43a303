"""From the ledger to the queue, in a bounded window, and back again for what was lost.

SQL is the truth; Redis holds hints. So this loop may be killed, run twice, or meet a wiped Redis
at any point: what it marked and did not publish, and what was published and forgotten, is found
by the next sweep.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine, Table

from scheduler.settings import SchedulerSettings
from storage import ledger
from storage.database import DatabaseUnavailable
from storage.schema import probes, tasks
from workers import logs
from workers.app import CLASSIFY_RANGE, PROBE_FILE, refusal

if TYPE_CHECKING:
    from scheduler.metrics import Health

log = logging.getLogger(__name__)

BROKER_REST_S = 2.0
LEAD = "scheduler"
PROBES_SHARE = 8
"""Files in the queue to be probed are at most this part of the window, which is four tasks a worker
process: planning runs ahead of work, and a slow disk takes half the workers at most."""
CLOSED_AT_ONCE = 100
PUBLISH_TIMEOUT_S = 5
"""A Redis that does not answer holds up the scheduler no longer than this; workers wait longer,
since they wait for messages."""


class QueueUnavailable(Exception):
    """The queue cannot be reached; the message names the address without its password."""


Publish = Callable[[str, Sequence[int]], None]
"""Sends the ids of rows as messages of a Celery task of that name."""


def publisher(app: Celery) -> Publish:
    """Return what sends ids to the queue; it raises QueueUnavailable where it cannot."""
    options = app.conf.broker_transport_options
    app.conf.broker_transport_options = {**options, "socket_timeout": PUBLISH_TIMEOUT_S}

    def publish(name: str, ids: Sequence[int]) -> None:
        try:
            with app.producer_pool.acquire(block=True, timeout=10) as producer:
                for row_id in ids:
                    app.send_task(
                        name,
                        args=[row_id],
                        producer=producer,
                        ignore_result=True,
                        retry=False,
                    )
        except (OperationalError, OSError) as error:
            raise QueueUnavailable(
                refusal(error) or f"the queue at {broker_address(app)} is unreachable"
            ) from error

    return publish


def broker_address(app: Celery) -> str:
    """The broker's address as it may be shown: without its password."""
    return str(app.connection_for_write().as_uri())


def check_broker(app: Celery) -> None:
    """Return if the queue answers; raise QueueUnavailable if not."""
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=5)
    except (OperationalError, OSError) as error:
        raise QueueUnavailable(
            refusal(error)
            or f"the queue at {broker_address(app)} does not answer: "
            "start Redis there, or set NIGHTREEL_BROKER_URL"
        ) from error


def remove_queue(broker_url: str, queue: str) -> None:
    """Remove a queue of one run from a Redis that goes on; what cannot be removed is left."""
    with suppress(RedisError), Redis.from_url(broker_url, socket_timeout=5) as redis:
        kept = f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}"
        redis.delete(queue, *kept)


class Feeder:
    """Keeps the window full, sweeps what was lost, closes what is finished."""

    def __init__(
        self,
        engine: Engine,
        publish: Publish,
        settings: SchedulerSettings,
        *,
        job_id: int | None = None,
        name: str = "",
        resting: Callable[[], bool] = lambda: False,
        waiting: Callable[[], int | None] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Feeds all submitted jobs, or `job_id` alone. Of several that feed all, one leads: each
        has a `name` of its own. `resting` says whether the workers' API is away, so that tasks are
        better kept; `waiting` how many messages the queue holds, None where it cannot be asked."""
        self._engine = engine
        self._publish = publish
        self._settings = settings
        self._job_id = job_id
        self._name = name
        self._resting = resting
        self._waiting = waiting
        self._clock = clock
        self._unclosable = ledger.Unclosable(clock=clock)
        self._next_sweep = clock()
        if job_id is None:
            self._let_workers_speak()
        self._rest_until = 0.0
        self._trouble = ""
        self.leads: bool | None = None
        """Whether this one leads, or led when it asked last; None before it asked."""

    def step(self) -> int:
        """Sweep if it is time, feed once, close; return the number of messages published.

        Raises DatabaseUnavailable at once, so that an outage is noticed: see `run`.
        """
        now = self._clock()
        if not self._leads():
            return 0
        if now >= self._next_sweep:
            self._next_sweep = now + self._settings.sweep_interval_s
            self._sweep()
        if self._job_id is None:
            for job_id in ledger.finish_probed(self._engine):
                with logs.about(job=job_id):
                    log.info("all files are probed")
        published = self._feed()
        # Last, and not all at once: scenes take a while, and workers shall not wait for them.
        for closed in ledger.close_finished(
            self._engine, self._job_id, CLOSED_AT_ONCE, self._unclosable
        ):
            with logs.about(job=closed.job_id, video=closed.video_id):
                log.info("the video is %s", closed.state)
        return published

    def _leads(self) -> bool:
        if self._job_id is not None:
            return True
        lease_s = self._settings.leader_lease_s
        leads = ledger.lead(self._engine, LEAD, self._name, lease_s)
        if leads != self.leads:
            self.leads = leads
            log.info("this scheduler leads" if leads else "another scheduler leads; waiting")
        return leads

    def _let_workers_speak(self) -> None:
        """Sweep later: while the database was away nobody could extend a lease, and workers that
        live shall do so before theirs count as run out. Whoever starts cannot know."""
        self._next_sweep = self._clock() + self._settings.queued_timeout_s

    def _sweep(self) -> None:
        timeout_s = self._settings.queued_timeout_s
        most = self._settings.max_attempts
        swept = ledger.sweep(self._engine, timeout_s, most, waiting=self._waiting())
        if swept.expired or swept.unqueued or swept.failed:
            log.info(
                "swept: %d leases expired, %d messages unanswered, %d failed",
                swept.expired,
                swept.unqueued,
                swept.failed,
            )

    def _feed(self) -> int:
        if not self._reachable():
            return 0
        published, window = 0, self._settings.window
        at_once = max(1, window // PROBES_SHARE)
        # The ledger's own count is no bound: of work taken back, as a pause does, messages remain.
        room = window + at_once - (self._waiting() or 0)
        if self._job_id is None:
            probe_ids = ledger.feed_probes(self._engine, at_once, most=room)
            published += self._send(PROBE_FILE, probe_ids, probes)
        if self._reachable() and not self._resting():
            most = room - published
            task_ids = ledger.feed(self._engine, window, self._job_id, most=most)
            published += self._send(CLASSIFY_RANGE, task_ids, tasks)
        return published

    def _reachable(self) -> bool:
        return self._clock() >= self._rest_until

    def _send(self, name: str, ids: Sequence[int], table: Table) -> int:
        if not ids:
            return 0
        try:
            self._publish(name, ids)
        except QueueUnavailable as error:
            if str(error) != self._trouble:
                log.warning("%s; %d messages wait in the ledger", error, len(ids))
            self._trouble = str(error)
            ledger.unqueue(self._engine, ids, table)
            self._rest_until = self._clock() + BROKER_REST_S
            return 0
        if self._trouble:
            log.info("the queue takes messages again")
            self._trouble = ""
        return len(ids)

    def run(self, stop: threading.Event, health: Health | None = None) -> None:
        """Step until `stop` is set, and tell `health`. A database that is away is waited for."""
        away, told = False, ""
        while not stop.is_set():
            try:
                self.step()
            except DatabaseUnavailable as error:
                if not away:
                    log.warning("%s; waiting for it", error)
                away = True
                self._let_workers_speak()
                if health is not None:
                    health.troubled(str(error))
            except Exception as error:
                # Whatever it is, it is no reason to leave all jobs alone, or to flood the log.
                said = f"{type(error).__name__}: {error}"
                if said != told:
                    log.exception("a step of the scheduler failed")
                told = said
                if health is not None:
                    health.troubled(said)
            else:
                if away:
                    log.info("the database is back")
                away, told = False, ""
                if health is not None:
                    health.stepped()
            stop.wait(self._settings.feed_interval_s)
        if self.leads:
            # Another need not wait for the lease. Where the database is away, it will.
            with suppress(DatabaseUnavailable):
                ledger.step_down(self._engine, LEAD, self._name)
