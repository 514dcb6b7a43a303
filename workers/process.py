"""What one worker process holds, and how it makes a claimed range's result of that."""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from sqlalchemy import Engine

from storage import results
from storage.database import DatabaseError, connect, outlasting
from storage.labels import label_set
from storage.ledger import Claim, planning_goes_on
from storage.ranges import StoredRange, stored_range
from storage.records import ArchiveFile, LabelSet, RangeResult, SampleResult, Usage
from storage.scoring import similarities
from storage.settings import StorageSettings
from workers import metrics
from workers.api import ApiClient, JobStopped, Outage, Vectors
from workers.budget import Budget
from workers.calls import labels_key, prompts_of, range_calls
from workers.classify import (
    LabelPrompts,
    LabelVectors,
    classify_range,
    embed_labels,
    predictions,
    prompt_weights,
)
from workers.endpoint import UNNAMED
from workers.footage.decode import read_range
from workers.once import KeptAnswers
from workers.places import place_of
from workers.probing import FileReplaced
from workers.settings import QueueSettings, WorkerSettings
from workers.shared import Shared

log = logging.getLogger(__name__)


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
        self.kept = KeptAnswers(self.engine, self.shared)
        prefix = self.settings.worker_name or socket.gethostname()
        self.name = f"{prefix}/{os.getpid()}"
        self.unreadable = 0
        """Files one after the other whose folders are not here."""

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
        self.client.work_for(claim.job_id, functools.partial(self.kept.of_endpoint, claim.job_id))
        content = claim.video_id, claim.sampling, claim.fit, claim.model, claim.frame_range
        stored = outlasting(lambda: stored_range(self.engine, *content))
        if stored is not None:
            return _rescore(stored, self._label_vectors(claim), claim.top_n)
        place = self._place(claim)  # before anything is paid for
        self._check_model(claim)
        endpoint = self.client.endpoint()
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
            place.path,
            claim.info,
            claim.frame_range,
            claim.sampling,
            size=self.client.identity().input_size,
            fit=claim.fit,
        )
        try:
            result = classify_range(
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
        place_of([place], claim.content_id)  # nor was it replaced while it was read
        return result

    def _place(self, claim: Claim) -> ArchiveFile:
        """The file to read. Raises FileUnreadable, and FileReplaced once no place can turn up."""
        if not claim.files and not outlasting(lambda: planning_goes_on(self.engine)):
            raise FileReplaced
        return place_of(claim.files, claim.content_id)

    def _label_vectors(self, claim: Claim) -> LabelVectors:
        """The label set as this model sees it."""

        def ask(labels: LabelSet) -> Vectors:
            self._check_model(claim)
            if any(label.examples for label in labels.labels):
                self.client.endpoint()  # how many pictures it takes at once
            return embed_labels(labels, self.client)

        return LabelVectors(self.kept.of_labels(claim.label_set_id, claim.model, ask))

    def _label_prompts(self, claim: Claim) -> LabelPrompts:
        """The label set for an endpoint that only compares."""
        labels = outlasting(lambda: label_set(self.engine, claim.label_set_id))
        if any(label.examples for label in labels.labels):
            raise JobStopped(
                "this API compares prompts only and cannot use example pictures: "
                "give prompts, or an API with /clip/embed_image"
            )
        weights = self.kept.of_labels(
            claim.label_set_id,
            labels_key(claim.model, embeds=False),
            lambda labels: prompt_weights(labels, self.client).weights,
        )
        return LabelPrompts(prompts_of(labels), weights)

    def _check_model(self, claim: Claim) -> None:
        identity = self.client.identity()
        if identity.model != claim.model:
            self.client.forget()
            if not identity.named and not claim.model.startswith(UNNAMED):
                raise Outage(
                    f"the job asks for {claim.model} and this worker's API does not say what it "
                    "serves: point NIGHTREEL_API_URL at the job's API"
                )
            raise JobStopped(
                f"the job asks for {claim.model} and this worker's API serves {identity.model}: "
                "point NIGHTREEL_API_URL at the job's API, or submit the job anew"
            )


def _rescore(stored: StoredRange, labels: LabelVectors, top_n: int) -> RangeResult:
    similarity = similarities(stored.vectors, labels.matrix)
    samples = tuple(
        SampleResult(t.bucket, t.t_us, t.start_us, t.end_us, best, t.reused_from, t.audit_of)
        for t, best in zip(stored.samples, predictions(similarity, top_n), strict=True)
    )
    return RangeResult(samples, stored.gaps, None, 0)


def current() -> Process:
    """This process's own; made when it is asked for first, so after any fork."""
    return _made(os.getpid())


@functools.lru_cache(maxsize=1)
def _made(pid: int) -> Process:  # keyed by process, so that a fork starts anew
    return Process()
