"""The one Celery task: claim a range in the ledger, run it, commit it.

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
from collections.abc import Iterator
from contextlib import contextmanager

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine

from storage import ledger, results
from storage.database import connect, with_retries
from storage.ledger import Claim, IncompatiblePlan
from storage.records import RangeResult, SampleResult
from storage.settings import StorageSettings
from workers.api import ApiClient, ApiError, JobPaused, JobStopped, Outage
from workers.app import CLASSIFY_RANGE, app
from workers.classify import (
    LabelPrompts,
    LabelVectors,
    LeaseLost,
    classify_range,
    embed_labels,
    predictions_of,
    prompt_weights,
    score_vectors,
)
from workers.footage.decode import FootageError, read_range
from workers.settings import WorkerSettings

log = logging.getLogger(__name__)

OUTAGE_DELAY_S = 15.0
"""How long a task rests after an outage that named no time of its own."""
FAULT_BACKOFF_S = 5.0


class Process:
    """What a worker process holds: settings, its own database engine and its own API client."""

    def __init__(self) -> None:
        self.settings = WorkerSettings()
        self.engine: Engine = connect(StorageSettings().database_url)
        self.client = ApiClient(self.settings)
        prefix = self.settings.worker_name or socket.gethostname()
        self.name = f"{prefix}/{os.getpid()}"
        self._vectors: dict[tuple[int, str], LabelVectors] = {}
        self._prompts: dict[int, LabelPrompts] = {}

    def run(self, claim: Claim, lost: threading.Event) -> RangeResult:
        """Return what the claimed range gives, from stored vectors where there are any: then no
        picture is decoded or sent."""
        stored = results.stored_vectors(
            self.engine, claim.video_id, claim.sampling, claim.fit, claim.model, claim.frame_range
        )
        if stored is not None:
            return _rescore(stored, self._label_vectors(claim), claim.top_n)
        self._check_model(claim)
        labels = self._label_vectors(claim) if self._embeds() else self._label_prompts(claim)
        decoded = read_range(
            _path_that_opens(claim),
            claim.info,
            claim.frame_range,
            claim.sampling,
            size=self.client.identity().input_size,
            fit=claim.fit,
        )
        try:
            return classify_range(
                decoded,
                client=self.client,
                labels=labels,
                top_n=claim.top_n,
                in_flight=self.settings.api_in_flight,
                lost=lost.is_set,
            )
        finally:
            decoded.close()

    def _embeds(self) -> bool:
        return self.client.endpoint().embeds

    def _label_vectors(self, claim: Claim) -> LabelVectors:
        """The label set's vectors: asked of the API once, then kept in the database, and what the
        database kept first is what every worker scores with."""
        key = claim.label_set_id, claim.model
        if key not in self._vectors:
            stored = results.label_vectors(self.engine, *key)
            if stored is None:
                self._check_model(claim)
                labels = results.label_set(self.engine, claim.label_set_id)
                mine = embed_labels(labels, self.client)
                results.store_label_vectors(self.engine, *key, mine)
                stored = results.label_vectors(self.engine, *key)
            self._vectors[key] = LabelVectors(mine if stored is None else stored)
        return self._vectors[key]

    def _label_prompts(self, claim: Claim) -> LabelPrompts:
        """The label set for an endpoint that only compares."""
        if claim.label_set_id not in self._prompts:
            labels = results.label_set(self.engine, claim.label_set_id)
            if any(label.examples for label in labels.labels):
                raise JobStopped(
                    "this API compares prompts only and cannot use example pictures: "
                    "give prompts, or an API with /clip/embed_image"
                )
            self._prompts[claim.label_set_id] = prompt_weights(labels, self.client)
        return self._prompts[claim.label_set_id]

    def _check_model(self, claim: Claim) -> None:
        served = self.client.identity().model
        if served != claim.model:
            raise JobStopped(
                f"the job asks for {claim.model} and this worker's API serves {served}: "
                "point NIGHTREEL_API_URL at the job's API, or submit the job anew"
            )


def _rescore(stored: results.StoredRange, labels: LabelVectors, top_n: int) -> RangeResult:
    similarity = score_vectors(stored.vectors, labels)
    samples = tuple(
        SampleResult(t.bucket, t.t_us, t.start_us, t.end_us, predictions_of(row, top_n))
        for t, row in zip(stored.samples, similarity, strict=True)
    )
    return RangeResult(samples, stored.gaps, None, 0)


def _path_that_opens(claim: Claim) -> str:
    """The first of the video's known places where its file still lies."""
    for path_raw in claim.path_raws:
        if os.path.exists(path_raw):
            return os.fsdecode(path_raw)
    raise FootageError("the file is gone from every place it was known at")


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> Process:  # noqa: ARG001 - keyed by process, so that a fork starts anew
    return Process()


@contextmanager
def _heartbeat(process: Process, claim: Claim) -> Iterator[threading.Event]:
    """Extend the lease every third of it; set the event once it belongs to another worker."""
    lost, done = threading.Event(), threading.Event()
    lease_s = process.settings.lease_s

    def beat() -> None:
        while not done.wait(lease_s / 3):
            try:
                alive = ledger.heartbeat(process.engine, claim.task_id, claim.fence, lease_s)
            except Exception as error:  # noqa: BLE001 - a missed beat is the lease's business
                log.warning("heartbeat of task %d failed: %s", claim.task_id, type(error).__name__)
                continue
            if not alive:
                lost.set()
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
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
    engine, settings = process.engine, process.settings
    try:
        claim = with_retries(
            lambda: ledger.claim(engine, task_id, process.name, settings.lease_s)
        )
    except IncompatiblePlan as error:
        log.error("task %d: %s", task_id, error)
        return
    if claim is None:
        return
    held = task_id, claim.fence
    try:
        with _heartbeat(process, claim) as lost:
            result = process.run(claim, lost)
        written = with_retries(lambda: results.commit(engine, *held, result))
        if not written:
            log.info("task %d: the lease went to another worker, nothing written", task_id)
    except LeaseLost:
        log.info("task %d: the lease went to another worker", task_id)
    except JobStopped as error:
        log.error("job %d stops: %s", claim.job_id, error)
        _hold(engine, claim, "api-refused", error)
    except JobPaused as error:
        log.error("job %d pauses: %s", claim.job_id, error)
        _hold(engine, claim, "api-paused", error)
    except Outage as error:
        log.warning("task %d waits: %s", task_id, error)
        delay = error.retry_after_s or OUTAGE_DELAY_S
        with_retries(lambda: ledger.release(engine, *held, delay, "api-outage", str(error)))
    except FootageError as error:
        _spend_attempt(process, claim, "read-error", error)
    except SoftTimeLimitExceeded:
        limit = app.conf.task_soft_time_limit
        _spend_attempt(process, claim, "time-limit", f"not done after {limit} s")
    except ApiError as error:
        _spend_attempt(process, claim, "api-error", error)
    except Exception as error:
        log.exception("task %d: unexpected", task_id)
        _spend_attempt(process, claim, "unexpected", f"{type(error).__name__}: {error}")


def _hold(engine: Engine, claim: Claim, kind: str, error: ApiError) -> None:
    message = str(error)
    with_retries(lambda: ledger.release(engine, claim.task_id, claim.fence, 0, kind, message))
    with_retries(lambda: ledger.pause_job(engine, claim.job_id, kind, message))


def _spend_attempt(process: Process, claim: Claim, kind: str, error: object) -> None:
    message = str(error)
    state = with_retries(
        lambda: ledger.give_back(
            process.engine,
            claim.task_id,
            claim.fence,
            kind,
            message,
            process.settings.max_attempts,
            FAULT_BACKOFF_S * 2 ** (claim.attempts - 1),
        )
    )
    log.warning("task %d: %s (%s); now %s", claim.task_id, kind, message, state)
