"""The Celery app: the queue's front door.

A message is the id of a row of the ledger and nothing else. Redis carries hints; whatever it loses
or repeats, the ledger decides, so the settings below choose plain redelivery over guarantees that a
broker cannot give. No result backend, no countdowns: outcomes and delays stand in the ledger.
"""

from __future__ import annotations

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as redis_transport
from pydantic import SecretStr, ValidationError
from redis.exceptions import RedisError, ResponseError

from storage.settings import SecretUnreadable
from workers.settings import QueueSettings
from workers.shared import require_room

CLASSIFY_RANGE = "nightreel.classify_range"
PROBE_FILE = "nightreel.probe_file"
"""Names of the two tasks, so that the scheduler can publish without importing their code."""


class _QoS(redis_transport.QoS):
    """What a worker holds of the queue; frees the place of a message also where Redis does not take
    its acknowledgement.

    kombu 5.7 keeps the place then. Once all are kept nothing is fetched any more, so the broken
    connection is never noticed, and the worker is deaf for ever after Redis was away.
    """

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]
        except (RedisError, OSError):
            # The message comes again, and the ledger turns it down.
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
            raise


redis_transport.Channel.QoS = _QoS


class _Transport(redis_transport.Transport):
    """Takes a Redis that refuses for one that is away, and is connected to none before it has taken
    something.

    To kombu 5.7 an error that Redis answers is a fault of the program, and a worker ends of it. To
    the few commands that kombu sends it tells of the server: full, read-only, unable to persist.
    """

    connection_errors = (*redis_transport.Transport.connection_errors, ResponseError)

    def establish_connection(self) -> virtual.Transport:
        super().establish_connection()  # type: ignore[no-untyped-call]
        try:
            require_room(self._avail_channels[-1].client)
        except (RedisError, OSError):
            self.close_connection(self)  # type: ignore[no-untyped-call]
            raise
        return self


TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:_Transport"))


def refusal(error: BaseException) -> str | None:
    """One line with what Redis said, where its refusal led to `error`; None where it is
    something else."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ResponseError):
        cause = cause.__cause__
    return None if cause is None else f"the queue takes no messages, Redis refuses: {cause}"


def make_app(settings: QueueSettings | None = None) -> Celery:
    """Return the Celery app for the broker that the environment (or `settings`) names. Raises
    SecretUnreadable, and ValidationError for a wrong setting."""
    settings = settings or QueueSettings()
    broker_url = settings.address()
    app = Celery("nightreel", broker=broker_url)
    app.conf.update(
        # Named twice, or Celery takes CELERY_BROKER_URL from the environment before ours.
        broker_read_url=broker_url,
        broker_write_url=broker_url,
        include=["workers.startup", "workers.tasks"],
        task_default_queue=settings.queue,
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        # Acknowledged late, so that a stopped worker's messages come back; not rejected when a
        # child is lost, because a task that kills its worker would then loop for ever.
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        worker_prefetch_multiplier=1,
        worker_max_tasks_per_child=300,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        # The last resort. What can hang has a limit of its own (decoding without progress, calls,
        # the database), and a range that cannot be split may hold ten hours of video.
        task_soft_time_limit=6 * 3600,
        task_time_limit=6 * 3600 + 60,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_acquire_timeout=10,
        broker_transport_options={
            "visibility_timeout": 3600,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 3,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app


def _of_the_environment() -> Celery:
    try:
        return make_app()
    except (SecretUnreadable, ValidationError):
        # Each process that needs the queue says so as it begins; an import must not end it.
        return make_app(QueueSettings.model_construct(broker_url=SecretStr("memory://")))


app = _of_the_environment()
