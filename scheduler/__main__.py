"""The scheduler as a process: `python -m scheduler [--job ID]`, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading

from scheduler.feeder import Feeder, QueueUnavailable, check_broker, publisher
from scheduler.settings import SchedulerSettings
from storage.database import DatabaseError, check, connect
from storage.exits import ExitCode
from storage.settings import StorageSettings
from workers.app import make_app
from workers.limits import is_resting
from workers.settings import QueueSettings
from workers.shared import Shared


def main() -> int:
    """Feed, sweep and close until told to end; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m scheduler", description=__doc__)
    parser.add_argument("--job", type=int, default=None, help="feed this job alone")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    app = make_app()
    try:
        engine = connect(StorageSettings().database_url)
        check(engine)
        check_broker(app)
    except DatabaseError as error:
        print(f"scheduler: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.DATABASE
    except QueueUnavailable as error:
        print(f"scheduler: {error}", file=sys.stderr)  # noqa: T201
        return ExitCode.QUEUE
    queue = QueueSettings()
    shared = Shared(queue.broker_url.get_secret_value(), queue.queue)
    Feeder(
        engine,
        publisher(app),
        SchedulerSettings(),
        job_id=arguments.job,
        resting=lambda: is_resting(shared),
    ).run(stop)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
