"""The two Celery tasks: claim a range in the ledger, run it, commit it; claim a file, plan it.

What a failure means is decided here by the exception's type and nowhere else: an outage puts the
task back and spends no attempt, a fault of the task spends one, a refusal of the key or the
credits holds the whole job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine, Table

from storage import ledger, results
from storage.database import outlasting, with_retries
from storage.ledger import BUDGET_SPENT, BudgetSpent, Claim, IncompatiblePlan
from storage.schema import probes, tasks
from workers import logs, metrics
from workers.api import ApiError, AtRest, JobPaused, JobStopped, Outage
from workers.app import CLASSIFY_RANGE, PROBE_FILE, app
from workers.classify import LeaseLost
from workers.footage.decode import FootageError
from workers.metrics import Outcome
from workers.probing import UNREADABLE, FileReplaced, FileUnreadable, plan_file
from workers.process import Process, current
from workers.refusals import API_OUTAGE

log = logging.getLogger(__name__)

OUTAGE_DELAY_S = 15.0
"""How long a task rests after an outage that named no time of its own."""
FAULT_BACKOFF_S = 5.0
"""How long a task rests after its first fault; twice as long after each other one."""
LONGEST_BACKOFF_S = 600.0
"""Longest rest after a fault, however many tries it is given."""
BEAT_AGAIN_S = 1.0
"""Pause after a heartbeat that failed: once the database is back, the scheduler lets workers speak
before it sweeps, and a third of a long lease may be longer than that."""
PLACE_BACKOFF_S = 15.0
"""The same where the file could not be had: a mount takes a while to come back."""
FIRST_REST_S = 2.0
LONGEST_REST_S = 15.0
HOLDS: tuple[tuple[type[Exception], str], ...] = (
    (JobStopped, "api-refused"),
    (JobPaused, "api-paused"),
    (BudgetSpent, BUDGET_SPENT),
)
"""What pauses a whole job, and as which kind of pause."""


@contextmanager
def _heartbeat(
    process: Process, row_id: int, fence: int, table: Table = tasks
) -> Iterator[threading.Event]:
    """Extend the lease every third of it, and soon again where that failed; set the event once it
    belongs to another worker."""
    lost, done = threading.Event(), threading.Event()
    lease_s = process.settings.lease_s

    def beat() -> None:
        failed = False
        while not done.wait(BEAT_AGAIN_S if failed else lease_s / 3):
            try:
                alive = ledger.heartbeat(process.engine, row_id, fence, lease_s, table)
            except Exception as error:  # noqa: BLE001 - a missed beat is the lease's business
                if not failed:
                    log.warning("a heartbeat failed: %s", type(error).__name__)
                failed = True
                continue
            failed = False
            if not alive:
                lost.set()
                return

    thread = threading.Thread(
        target=copy_context().run, args=(beat,), name="heartbeat", daemon=True
    )
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join()


@app.task(name=CLASSIFY_RANGE)  # type: ignore[untyped-decorator]
def classify(task_id: int) -> None:
    """Run one task row to its end, or leave the ledger able to."""
    process = current()
    lease_s = process.settings.lease_s
    try:
        claim = with_retries(lambda: ledger.claim(process.engine, task_id, process.name, lease_s))
    except IncompatiblePlan as error:
        with logs.about(task=task_id):
            log.error("refused: %s", error)
        metrics.task_ended(Outcome.REFUSED, ledger.INCOMPATIBLE)
        return
    if claim is None:
        metrics.task_ended(Outcome.REFUSED)
        return
    with logs.about(job=claim.job_id, video=claim.video_id, task=task_id):
        metrics.task_ended(*_run(process, claim))


def _run(process: Process, claim: Claim) -> tuple[Outcome, str | None]:
    """Run the claimed task; return how that ended, and the kind of trouble."""
    engine, held = process.engine, (claim.task_id, claim.fence)
    began = time.perf_counter()
    try:
        with process.paying(claim) as account, _heartbeat(process, *held) as lost:
            result = process.run(claim, lost, account.budget)
            result = account.on_the_bill_of(result)
            ready = time.perf_counter()
            account.committed = outlasting(lambda: results.commit(engine, *held, result))
        if not account.committed:
            raise LeaseLost
    except LeaseLost:
        log.info("the lease went to another worker, nothing written")
        return Outcome.LOST, None
    except (JobStopped, JobPaused, BudgetSpent) as error:
        return _hold(engine, claim, error)
    except Outage as error:
        # While the endpoint rests every task comes back; that is said once, by the breaker.
        level = logging.DEBUG if isinstance(error, AtRest) else logging.WARNING
        log.log(level, "waits: %s", error)
        delay, said = error.retry_after_s or OUTAGE_DELAY_S, str(error)
        outlasting(lambda: ledger.release(engine, *held, delay, API_OUTAGE, said))
        return Outcome.OUTAGE, API_OUTAGE
    except FileUnreadable as error:
        return _leave_to_others(process, *held, claim.attempts, error)
    except FootageError as error:
        kind, fault = "read-error", str(error)
    except SoftTimeLimitExceeded:
        kind, fault = "time-limit", f"not done after {app.conf.task_soft_time_limit} s"
    except ApiError as error:
        kind, fault = "api-error", str(error)
    except Exception as error:
        log.exception("unexpected")
        kind, fault = "unexpected", f"{type(error).__name__}: {error}"
    else:
        process.unreadable = 0
        ended = time.perf_counter()
        metrics.range_committed(result, ended - began, ended - ready)
        log.info("done: %d frames in %.1f s", len(result.samples), ended - began)
        return Outcome.DONE, None
    _spend_attempt(process, *held, claim.attempts, kind, fault)
    return Outcome.FAULT, kind


def _hold(engine: Engine, claim: Claim, error: Exception) -> tuple[Outcome, str]:
    """Pause the whole job: what stopped this task would stop every other one."""
    kind = next(kind for of_type, kind in HOLDS if isinstance(error, of_type))
    message = str(error)
    log.log(logging.WARNING if kind == BUDGET_SPENT else logging.ERROR, "%s: %s", kind, message)
    outlasting(lambda: ledger.release(engine, claim.task_id, claim.fence, 0, kind, message))
    outlasting(lambda: ledger.pause_job(engine, claim.job_id, kind, message))
    return Outcome.PAUSED, kind


def _spend_attempt(  # noqa: PLR0917
    process: Process,
    row_id: int,
    fence: int,
    attempts: int,
    kind: str,
    fault: str,
    table: Table = tasks,
    first_backoff_s: float = FAULT_BACKOFF_S,
    *,
    final: bool = False,
) -> None:
    backoff_s = min(LONGEST_BACKOFF_S, first_backoff_s * 2 ** (attempts - 1))
    most = attempts if final else process.settings.max_attempts
    state = outlasting(
        lambda: ledger.give_back(process.engine, row_id, fence, kind, fault, most, backoff_s, table)
    )
    log.warning("%s (%s); now %s", kind, fault, state)


def _leave_to_others(  # noqa: PLR0917
    process: Process,
    row_id: int,
    fence: int,
    attempts: int,
    error: FileUnreadable,
    table: Table = tasks,
) -> tuple[Outcome, str]:
    """Put back what this host cannot read, and rest: where the archive is not mounted each message
    would fail at once, and the worst host would take most of them, retries and all."""
    spent = process, row_id, fence, attempts, UNREADABLE, str(error), table, PLACE_BACKOFF_S
    _spend_attempt(*spent, final=isinstance(error, FileReplaced))
    if error.folder_missing:
        process.unreadable += 1
        time.sleep(min(LONGEST_REST_S, FIRST_REST_S * 2 ** (process.unreadable - 1)))
    return Outcome.FAULT, UNREADABLE


@app.task(name=PROBE_FILE)  # type: ignore[untyped-decorator]
def probe(probe_id: int) -> None:
    """Plan one file of a submitted job, or leave the ledger able to."""
    process = current()
    lease_s = process.settings.lease_s
    try:
        claim = with_retries(
            lambda: ledger.claim_probe(process.engine, probe_id, process.name, lease_s)
        )
    except IncompatiblePlan as error:
        with logs.about(probe=probe_id):
            log.error("refused: %s", error)
        metrics.probe_ended(Outcome.REFUSED, ledger.INCOMPATIBLE)
        return
    if claim is None:
        metrics.probe_ended(Outcome.REFUSED)
        return
    held = probe_id, claim.fence
    with logs.about(job=claim.job_id, probe=probe_id):
        try:
            with _heartbeat(process, *held, probes):
                planned = plan_file(process.engine, claim)
        except FileUnreadable as error:
            metrics.probe_ended(*_leave_to_others(process, *held, claim.attempts, error, probes))
            return
        except SoftTimeLimitExceeded:
            kind, fault = "time-limit", f"not done after {app.conf.task_soft_time_limit} s"
        except Exception as error:
            log.exception("unexpected")
            kind, fault = "unexpected", f"{type(error).__name__}: {error}"
        else:
            process.unreadable = 0
            metrics.probe_ended(Outcome.DONE if planned else Outcome.LOST)
            return
        _spend_attempt(process, *held, claim.attempts, kind, fault, probes)
        metrics.probe_ended(Outcome.FAULT, kind)
