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

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Engine

from scheduler.settings import SchedulerSettings
from storage import ledger
from storage.database import DatabaseUnavailable, with_retries
from workers.app import CLASSIFY_RANGE

log = logging.getLogger(__name__)

BROKER_REST_S = 2.0


class QueueUnavailable(Exception):
    """The queue cannot be reached; the message names the address without its password."""


def publisher(app: Celery) -> Callable[[Sequence[int]], None]:
    """Return what sends task ids to the queue; it raises QueueUnavailable where it cannot."""

    def publish(task_ids: Sequence[int]) -> None:
        try:
            with app.producer_pool.acquire(block=True, timeout=10) as producer:
                for task_id in task_ids:
                    app.send_task(
                        CLASSIFY_RANGE,
                        args=[task_id],
                        producer=producer,
                        ignore_result=True,
                        retry=False,
                    )
        except (OperationalError, OSError) as error:
            raise QueueUnavailable(f"the queue at {broker_address(app)} is unreachable") from error

    return publish


def broker_address(app: Celery) -> str:
    """The broker's address as it may be shown: without its password."""
    return str(app.connection_for_write().as_uri())


def check_broker(app: Celery) -> None:
    """Return if the queue answers; raise QueueUnavailable if not."""
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=5)
    except (KeyError, ValueError, ImportError):
        raise QueueUnavailable(
            "the queue's address is none of a Redis: set NIGHTREEL_BROKER_URL to redis://HOST:PORT/0"
        ) from None
    except (OperationalError, OSError) as error:
        raise QueueUnavailable(
            f"the queue at {broker_address(app)} does not answer: "
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
        publish: Callable[[Sequence[int]], None],
        settings: SchedulerSettings,
        *,
        job_id: int | None = None,
        resting: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`resting` says whether the workers' API is away, so that tasks are better kept."""
        self._engine = engine
        self._publish = publish
        self._settings = settings
        self._job_id = job_id
        self._resting = resting
        self._clock = clock
        self._next_sweep = clock()
        self._rest_until = 0.0

    def step(self) -> int:
        """Sweep if it is time, close, feed once; return the number of tasks published.

        Raises DatabaseUnavailable where the database stays away.
        """
        now = self._clock()
        if now >= self._next_sweep:
            self._next_sweep = now + self._settings.sweep_interval_s
            swept = with_retries(
                lambda: ledger.sweep(self._engine, self._settings.queued_timeout_s)
            )
            if swept.expired or swept.unqueued or swept.failed:
                log.info(
                    "swept: %d leases expired, %d messages unanswered, %d tasks failed",
                    swept.expired,
                    swept.unqueued,
                    swept.failed,
                )
        for closed in with_retries(lambda: ledger.close_finished(self._engine, self._job_id)):
            log.info("job %d: video %d is %s", closed.job_id, closed.video_id, closed.state)
        if now < self._rest_until or self._resting():
            return 0
        task_ids = with_retries(
            lambda: ledger.feed(self._engine, self._settings.window, self._job_id)
        )
        if not task_ids:
            return 0
        try:
            self._publish(task_ids)
        except QueueUnavailable as error:
            log.warning("%s; %d tasks wait in the ledger", error, len(task_ids))
            with_retries(lambda: ledger.unqueue(self._engine, task_ids))
            self._rest_until = now + BROKER_REST_S
            return 0
        return len(task_ids)

    def run(self, stop: threading.Event) -> None:
        """Step until `stop` is set. A database that is away is waited for."""
        while not stop.is_set():
            try:
                self.step()
            except DatabaseUnavailable as error:
                log.warning("%s; waiting for it", error)
            stop.wait(self._settings.feed_interval_s)
