"""The two Celery tasks: claim a range in the ledger, run it, commit it; claim a file, plan it.

What a failure means is decided here by the exception's type and nowhere else: an outage puts the
task back and spends no attempt, a fault of the task spends one, a refusal of the key or the
credits holds the whole job.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import setup_logging, worker_init, worker_ready
from pydantic import ValidationError
from sqlalchemy import Engine, Table

from storage import ledger, results
from storage.database import (
    DatabaseError,
    DatabaseUnavailable,
    check,
    connect,
    outlasting,
    with_retries,
)
from storage.exits import ExitCode
from storage.labels import label_set, label_vectors, store_label_vectors
from storage.ledger import BUDGET_SPENT, BudgetSpent, Claim, IncompatiblePlan
from storage.ranges import StoredRange, stored_range
from storage.records import LabelSet, RangeResult, SampleResult, Usage
from storage.schema import probes, tasks
from storage.scoring import similarities
from storage.settings import SecretUnreadable, StorageSettings, complaint
from workers import logs, metrics, watchdog
from workers.api import ApiClient, ApiError, AtRest, JobPaused, JobStopped, Outage, Vectors
from workers.app import CLASSIFY_RANGE, PROBE_FILE, app
from workers.budget import Budget
from workers.calls import labels_key, prompts_of, range_calls
from workers.classify import (
    LabelPrompts,
    LabelVectors,
    LeaseLost,
    classify_range,
    embed_labels,
    predictions,
    prompt_weights,
)
from workers.footage.decode import FootageError, read_range
from workers.metrics import Outcome
from workers.probing import UNREADABLE, FileUnreadable, plan_file
from workers.settings import (
    LogFormat,
    QueueSettings,
    ServiceSettings,
    WorkerSettings,
)
from workers.shared import Shared

log = logging.getLogger(__name__)

OUTAGE_DELAY_S = 15.0
"""How long a task rests after an outage that named no time of its own."""
FAULT_BACKOFF_S = 5.0
"""How long a task rests after its first fault; twice as long after each other one."""
PLACE_BACKOFF_S = 15.0
"""The same where the file could not be had: a mount takes a while to come back."""
FIRST_REST_S = 2.0
LONGEST_REST_S = 15.0
API_OUTAGE = "api-outage"
HOLDS: tuple[tuple[type[Exception], str], ...] = (
    (JobStopped, "api-refused"),
    (JobPaused, "api-paused"),
    (BudgetSpent, BUDGET_SPENT),
)
"""What pauses a whole job, and as which kind of pause."""


@dataclass(slots=True)
class Account:
    """What one attempt at a task costs."""

    client: ApiClient
    budget: Budget
    committed: bool = False
    _before: Usage = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.client.spent

    def spent(self, decode_seconds: float = 0.0) -> Usage:
        """What was called since the attempt began."""
        now, before = self.client.spent, self._before
        return Usage(
            now.image_calls - before.image_calls,
            now.text_calls - before.text_calls,
            now.bytes_sent - before.bytes_sent,
            now.api_seconds - before.api_seconds,
            decode_seconds,
        )

    def on_the_bill_of(self, result: RangeResult) -> RangeResult:
        """The result with all that it has cost."""
        return replace(result, usage=self.spent(result.usage.decode_seconds))


class Process:
    """What a worker process holds: settings, its own database engine and its own API client."""

    def __init__(self) -> None:
        self.settings = WorkerSettings()
        self.engine: Engine = connect(StorageSettings().database_url)
        queue = QueueSettings()
        self.shared = Shared(queue.address(), queue.queue)
        self.client = ApiClient(self.settings, self.shared)
        prefix = self.settings.worker_name or socket.gethostname()
        self.name = f"{prefix}/{os.getpid()}"
        self.unreadable = 0
        """Files one after the other whose folders are not here."""
        self._vectors: dict[tuple[int, str], Vectors] = {}

    @contextmanager
    def paying(self, claim: Claim) -> Iterator[Account]:
        """Within, calls are taken from the job's budget. What was called and is not committed is
        recorded afterwards, and what was taken and not called is returned."""
        account = Account(self.client, Budget(self.engine, claim.job_id))
        self.client.wire.purse = account.budget
        try:
            yield account
        finally:
            spent = account.spent()
            metrics.api_spent(spent)
            try:
                account.budget.close()
                if not account.committed and spent.bytes_sent:
                    key = claim.job_id, claim.task_id, claim.fence
                    outlasting(lambda: results.record_usage(self.engine, *key, spent))
            except DatabaseError as error:
                log.warning("its usage is not recorded: %s", error)

    def run(self, claim: Claim, lost: threading.Event, budget: Budget) -> RangeResult:
        """Return what the claimed range gives, from stored vectors where there are any: then no
        picture is decoded or sent."""
        content = claim.video_id, claim.sampling, claim.fit, claim.model, claim.frame_range
        stored = outlasting(lambda: stored_range(self.engine, *content))
        if stored is not None:
            return _rescore(stored, self._label_vectors(claim), claim.top_n)
        path = _path_that_opens(claim)  # before anything is paid for
        self._check_model(claim)
        endpoint = self.client.endpoint(claim.job_id)
        labels = self._label_vectors(claim) if endpoint.embeds else self._label_prompts(claim)
        budget.reserve(
            range_calls(
                len(claim.frame_range.buckets) * claim.fit.squares,
                embeds=endpoint.embeds,
                batch=endpoint.batch,
                prompts=len(labels.prompts) if isinstance(labels, LabelPrompts) else 0,
            )
        )
        decoded = read_range(
            path,
            claim.info,
            claim.frame_range,
            claim.sampling,
            size=self.client.identity().input_size,
            fit=claim.fit,
        )
        try:
            return classify_range(
                decoded,
                sampling=claim.sampling,
                fit=claim.fit,
                client=self.client,
                labels=labels,
                top_n=claim.top_n,
                in_flight=self.settings.api_in_flight,
                lost=lost.is_set,
            )
        finally:
            decoded.close()

    def _label_vectors(self, claim: Claim) -> LabelVectors:
        """The label set as this model sees it."""

        def ask(labels: LabelSet) -> Vectors:
            self._check_model(claim)
            if any(label.examples for label in labels.labels):
                self.client.endpoint(claim.job_id)  # how many pictures it takes at once
            return embed_labels(labels, self.client)

        return LabelVectors(self._asked_once(claim.label_set_id, claim.model, ask))

    def _label_prompts(self, claim: Claim) -> LabelPrompts:
        """The label set for an endpoint that only compares."""
        labels = outlasting(lambda: label_set(self.engine, claim.label_set_id))
        if any(label.examples for label in labels.labels):
            raise JobStopped(
                "this API compares prompts only and cannot use example pictures: "
                "give prompts, or an API with /clip/embed_image"
            )
        weights = self._asked_once(
            claim.label_set_id,
            labels_key(claim.model, embeds=False),
            lambda labels: prompt_weights(labels, self.client).weights,
        )
        return LabelPrompts(prompts_of(labels), weights)

    def _asked_once(
        self, label_set_id: int, model: str, ask: Callable[[LabelSet], Vectors]
    ) -> Vectors:
        """What the API says of a label set: asked once, then kept in the database, and what the
        database kept first is what every worker scores with."""
        key = label_set_id, model
        if key not in self._vectors:
            stored = self._stored_labels(key)
            if stored is None:
                with self.shared.turn(f"labels:{label_set_id}:{model}"):
                    stored = self._stored_labels(key)
                    if stored is None:
                        asked = outlasting(lambda: label_set(self.engine, label_set_id))
                        mine = ask(asked)
                        outlasting(lambda: store_label_vectors(self.engine, *key, mine))
                        stored = self._stored_labels(key)
            self._vectors[key] = mine if stored is None else stored
        return self._vectors[key]

    def _stored_labels(self, key: tuple[int, str]) -> Vectors | None:
        return outlasting(lambda: label_vectors(self.engine, *key))

    def _check_model(self, claim: Claim) -> None:
        served = self.client.identity().model
        if served != claim.model:
            raise JobStopped(
                f"the job asks for {claim.model} and this worker's API serves {served}: "
                "point NIGHTREEL_API_URL at the job's API, or submit the job anew"
            )


def _rescore(stored: StoredRange, labels: LabelVectors, top_n: int) -> RangeResult:
    similarity = similarities(stored.vectors, labels.matrix)
    samples = tuple(
        SampleResult(t.bucket, t.t_us, t.start_us, t.end_us, best, t.reused_from, t.audit_of)
        for t, best in zip(stored.samples, predictions(similarity, top_n), strict=True)
    )
    return RangeResult(samples, stored.gaps, None, 0)


def _path_that_opens(claim: Claim) -> str:
    """The first of the video's known places where its file still lies."""
    for path_raw in claim.path_raws:
        if os.path.exists(path_raw):
            return os.fsdecode(path_raw)
    latest = os.fsdecode(claim.path_raws[0]) if claim.path_raws else ""
    raise FileUnreadable("the file is gone from every place it was known at", latest)


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
        sender.quiet = service.log_format is LogFormat.JSON  # no banner among the lines
        metrics.serve(service)
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


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> Process:  # keyed by process, so that a fork starts anew
    return Process()


@contextmanager
def _heartbeat(
    process: Process, row_id: int, fence: int, table: Table = tasks
) -> Iterator[threading.Event]:
    """Extend the lease every third of it; set the event once it belongs to another worker."""
    lost, done = threading.Event(), threading.Event()
    lease_s = process.settings.lease_s

    def beat() -> None:
        while not done.wait(lease_s / 3):
            try:
                alive = ledger.heartbeat(process.engine, row_id, fence, lease_s, table)
            except Exception as error:  # noqa: BLE001 - a missed beat is the lease's business
                log.warning("a heartbeat failed: %s", type(error).__name__)
                continue
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
    process = _process(os.getpid())
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
) -> None:
    backoff_s = first_backoff_s * 2 ** (attempts - 1)
    most = process.settings.max_attempts
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
    _spend_attempt(process, row_id, fence, attempts, UNREADABLE, str(error), table, PLACE_BACKOFF_S)
    if error.folder_missing:
        process.unreadable += 1
        time.sleep(min(LONGEST_REST_S, FIRST_REST_S * 2 ** (process.unreadable - 1)))
    return Outcome.FAULT, UNREADABLE


@app.task(name=PROBE_FILE)  # type: ignore[untyped-decorator]
def probe(probe_id: int) -> None:
    """Plan one file of a submitted job, or leave the ledger able to."""
    process = _process(os.getpid())
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
