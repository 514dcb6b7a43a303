"""What a worker does as it starts: check that it could run a task, then log, count and watch, and
see that the memory of pictures is given back."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

from celery.apps import worker as celery_worker
from celery.signals import setup_logging, worker_init, worker_ready
from pydantic import ValidationError

from storage.database import DatabaseError, DatabaseUnavailable, check, connect
from storage.exits import ExitCode
from storage.settings import SecretUnreadable, StorageSettings, complaint
from workers import logs, metrics, watchdog
from workers.settings import LogFormat, QueueSettings, ServiceSettings, WorkerSettings
from workers.shared import Shared

log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""
_MAPPED_BYTES = 2**20
"""Size from which on memory is mapped apart, and given back as it is freed: every plane of a 4K
picture. What takes less comes by the dozen, and mapping it costs time."""


@setup_logging.connect  # type: ignore[untyped-decorator]
def _set_up_logging(**_: object) -> None:
    """Keep Celery from setting up logging of its own."""
    logs.configure(ServiceSettings())


@worker_init.connect  # type: ignore[untyped-decorator]
def _begin(sender: Any, **_: object) -> None:
    """End a worker that could run no task, rather than let it drop one message after another."""
    code = ExitCode.USAGE
    try:
        service = ServiceSettings()
        WorkerSettings().key()
        QueueSettings().address()
        StorageSettings()
        logs.configure(service)
        _check_database()
        if service.log_format is LogFormat.JSON:
            sender.quiet = True  # no banner among the lines
            celery_worker.safe_say = logs.say
        metrics.serve(service)
        _give_memory_back()
    except ValidationError as error:
        said = complaint(error)
    except (SecretUnreadable, metrics.PortTaken) as error:
        said = str(error)
    except DatabaseError as error:
        said, code = str(error), ExitCode.DATABASE
    else:
        return
    log.error("the worker does not start: %s", said)
    raise SystemExit(code)


def _give_memory_back() -> None:
    """Fix the size from which on memory is mapped apart, in the pool's processes too.

    Else glibc raises it to that of the first picture that is freed; later ones come from heaps, in
    which they leave holes: 60 MB more in a process after a few tasks at 4K.
    """
    # Other C libraries have no such size.
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _check_database() -> None:
    """Raise DatabaseError where the database can never serve; one that is away is waited for."""
    engine = connect(StorageSettings().database_url)
    try:
        check(engine)
    except DatabaseUnavailable as error:
        log.warning("%s; the worker starts and waits for it", error)
    finally:
        engine.dispose()


@worker_ready.connect  # type: ignore[untyped-decorator]
def _watch(**_: object) -> None:
    queue = QueueSettings()
    shared = Shared(queue.address(), queue.queue)
    watchdog.start(shared, ServiceSettings().stall_s)
