"""The scheduler as a process, until SIGTERM or SIGINT: `nightreel scheduler` feeds every submitted
job; `python -m scheduler --job ID` feeds the job of one run."""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import socket
import sys
import threading

from celery import Celery
from pydantic import ValidationError
from sqlalchemy import Engine

from scheduler.feeder import Feeder, QueueUnavailable, check_broker, publisher
from scheduler.settings import SchedulerSettings
from storage.database import DatabaseError, check, connect
from storage.exits import ExitCode
from storage.settings import SecretUnreadable, StorageSettings, complaint
from workers import logs
from workers.app import make_app, refusal
from workers.limits import is_resting
from workers.metrics import PortTaken
from workers.settings import QueueSettings, ServiceSettings
from workers.shared import Shared

log = logging.getLogger("scheduler")


def main() -> int:
    """Feed, sweep and close until told to end; return an exit code."""
    parser = argparse.ArgumentParser(prog="nightreel scheduler", description=__doc__)
    parser.add_argument("--job", type=int, default=None, help="feed this job alone")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        service = ServiceSettings()
        logs.configure(service)
        settings = SchedulerSettings()
        secret = settings.secret()
        engine = connect(StorageSettings().database_url)
        check(engine)
        app = make_app()
        check_broker(app)
        if arguments.job is None:
            _serve_all(engine, app, settings, service, secret, stop)
        else:
            _feeder(engine, app, settings, job_id=arguments.job).run(stop)
    except DatabaseError as error:
        return _end(error, ExitCode.DATABASE)
    except QueueUnavailable as error:
        return _end(refusal(error) or error, ExitCode.QUEUE)
    except ValidationError as error:
        return _end(complaint(error), ExitCode.USAGE)
    except (PortTaken, SecretUnreadable) as error:
        return _end(error, ExitCode.USAGE)
    return ExitCode.OK


def _end(why: object, code: ExitCode) -> int:
    log.error("the scheduler does not start: %s", why)
    return code


def _feeder(
    engine: Engine, app: Celery, settings: SchedulerSettings, *, job_id: int | None
) -> Feeder:
    shared = _shared()
    return Feeder(
        engine,
        publisher(app),
        settings,
        job_id=job_id,
        name=f"{socket.gethostname()}:{secrets.token_hex(4)}",
        resting=lambda: is_resting(shared),
        waiting=shared.waiting,
    )


def _shared() -> Shared:
    queue = QueueSettings()
    return Shared(queue.address(), queue.queue)


def _serve_all(  # noqa: PLR0917
    engine: Engine,
    app: Celery,
    settings: SchedulerSettings,
    service: ServiceSettings,
    secret: str | None,
    stop: threading.Event,
) -> None:
    from scheduler.metrics import (  # noqa: PLC0415 - of the service alone
        Health,
        LedgerCollector,
        serve,
        watch,
    )
    from scheduler.notify import Notifier  # noqa: PLC0415

    feeder = _feeder(engine, app, settings, job_id=None)
    health = Health()
    waiting = _shared().waiting
    serve(service, LedgerCollector(engine, waiting, lambda: bool(feeder.leads)), health)
    # Two schedulers may deliver at once: an event is claimed. A thread of its own, so that a slow
    # receiver holds up nobody; what it had taken comes due again.
    threading.Thread(
        target=Notifier(engine, secret).run, args=(stop,), name="webhooks", daemon=True
    ).start()
    watch(health, stop)
    feeder.run(stop, health)


if __name__ == "__main__":
    sys.exit(main())
