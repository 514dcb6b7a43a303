"""One frame range: decode its samples, embed them through the API, score the labels.

Decoding and HTTP overlap: this thread decodes and encodes, a few threads wait for answers, and at
most `in_flight` requests are under way. The pictures of as many more are ready, and answers, which
are small, wait for several times as many behind a late one: memory is bounded.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.records import (
    Fit,
    Gap,
    GapKind,
    LabelSet,
    Prediction,
    RangeResult,
    SampleResult,
    Sampling,
    Usage,
)
from storage.scoring import Single, best_labels, centroid, similarities
from workers.api import ApiClient, FrameRefused, Vectors
from workers.calls import prompts_of
from workers.footage.decode import DecodedSample
from workers.footage.duplicates import Duplicates, is_audited
from workers.footage.picture import Picture, encode_jpeg, tiles

ANSWERS_BEHIND = 16
"""Answers that may wait to be taken in order, in multiples of the requests in flight."""


class LeaseLost(Exception):
    """The range belongs to another worker now; whatever was found here must not be written."""


@dataclass(frozen=True, slots=True)
class LabelVectors:
    """A label set as directions: the dot product with a picture's unit vector is its similarity."""

    matrix: Vectors
    """Labels x dimension, float32."""


@dataclass(frozen=True, slots=True)
class LabelPrompts:
    """A label set for an endpoint that only compares: prompts, and how they add up to labels."""

    prompts: tuple[str, ...]
    weights: Vectors
    """Labels x prompts, float32: similarity = weights @ cosines of the prompts."""


Labels = LabelVectors | LabelPrompts


def embed_labels(labels: LabelSet, client: ApiClient) -> Vectors:
    """Return the vectors of a label set, labels x dimension float32.

    Several prompts of a label are averaged as unit vectors (prompt ensemble), as are several
    example pictures (nearest centroid); a label with both gets the mean of the two, so that its
    similarity is the mean of the two cosines. Raises ApiError.
    """
    texts = prompts_of(labels)
    of_text = dict(zip(texts, client.embed_texts(texts), strict=True)) if texts else {}
    rows = []
    for label in labels.labels:
        parts = []
        if label.prompts:
            parts.append(centroid(np.stack([of_text[p] for p in label.prompts])))
        if label.examples:
            parts.append(centroid(np.stack(list(_embed_examples(label.examples, client)))))
        rows.append(np.mean(parts, axis=0))
    return np.stack(rows).astype(np.float32)


def _embed_examples(jpegs: Sequence[bytes], client: ApiClient) -> Iterator[Vectors]:
    size = client.endpoint().batch
    for at in range(0, len(jpegs), size):
        for answer in client.embed_images(jpegs[at : at + size]):
            if isinstance(answer, FrameRefused):
                raise answer
            yield answer


def prompt_weights(labels: LabelSet, client: ApiClient) -> LabelPrompts:
    """Return the same ensemble for an endpoint that only compares.

    The cosine with the unit mean of n prompts is the sum of their cosines over n times the length
    of the mean, and that length follows from the prompts' cosines with each other:
    |mean|^2 = sum of all pairwise cosines / n^2. Raises ApiError.
    """
    prompts = prompts_of(labels)
    column = {prompt: at for at, prompt in enumerate(prompts)}
    weights = np.zeros((len(labels.labels), len(prompts)), dtype=np.float32)
    for row, label in enumerate(labels.labels):
        n = len(label.prompts)
        length = 1.0
        if n > 1:
            pairs = sum(float(client.compare_texts(p, label.prompts).sum()) for p in label.prompts)
            length = max(pairs, 1e-6) ** 0.5 / n
        for prompt in label.prompts:
            weights[row, column[prompt]] += 1.0 / (n * length)
    return LabelPrompts(prompts, weights)


def predictions(similarity: Single, top_n: int) -> Iterator[tuple[Prediction, ...]]:
    """Yield for each row of similarities, samples x labels, its best `top_n` labels, best first."""
    for sample in zip(*(found.tolist() for found in best_labels(similarity, top_n)), strict=True):
        yield tuple(Prediction(*one) for one in zip(*sample, strict=True))


def squares_of(picture: Picture, fit: Fit) -> tuple[Picture, ...]:
    """The squares of one sample that are sent."""
    return tiles(picture) if fit is Fit.TILES else (picture,)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A sample without its picture, which is not needed once it is encoded."""

    bucket: int
    t_us: int
    start_us: int
    end_us: int
    reused_from: int | None
    audit_of: int | None


_Answers = list[Vectors | FrameRefused]


@dataclass(slots=True)
class _Pipeline:
    """What of a range waits for answers, and what it has given so far."""

    client: ApiClient
    labels: Labels
    fit: Fit
    in_flight: int
    pool: ThreadPoolExecutor
    gaps: list[Gap] = field(default_factory=list)
    _answered: list[_Slot] = field(default_factory=list)
    _rows: list[npt.NDArray[Any]] = field(default_factory=list)
    """Of each answered slot its vectors as they are stored, or its cosines with the prompts; those
    of several squares one after the other."""
    _slots: list[_Slot] = field(default_factory=list)
    _jpegs: list[bytes] = field(default_factory=list)
    """Of the squares of those slots that are sent."""
    _waiting: deque[tuple[list[_Slot], Future[_Answers]]] = field(default_factory=deque)
    _last_sent: _Answers = field(default_factory=list)
    """What duplicates take over."""
    _unanswered: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        # Half of them are on the wire, the others prepared to be.
        self._unanswered = threading.Semaphore(2 * self.in_flight)

    def add(self, slot: _Slot, picture: Picture) -> None:
        """Send a sample, or let it wait for what it takes over."""
        self._slots.append(slot)
        if slot.reused_from is None:
            self._jpegs.extend(encode_jpeg(square) for square in squares_of(picture, self.fit))

    @property
    def full(self) -> bool:
        """Whether so much is ready that it should be sent: whole calls, of whole samples."""
        return len(self._jpegs) >= self._batch * self.fit.squares

    def send(self) -> None:
        """Send what is ready; waits for answers while too many requests are unanswered, or too many
        answers stand behind a late one."""
        while self._waiting and (
            self._waiting[0][1].done() or len(self._waiting) == ANSWERS_BEHIND * self.in_flight
        ):
            self._collect()
        if self._slots:
            self._unanswered.acquire()
            # In a copy of the context, so that what is logged there names the task too.
            future = self.pool.submit(copy_context().run, self._ask, self._jpegs)
            future.add_done_callback(lambda _: self._unanswered.release())
            self._waiting.append((self._slots, future))
            self._slots, self._jpegs = [], []

    def finish(self) -> None:
        """Send the rest and wait for all answers."""
        self.send()
        while self._waiting:
            self._collect()

    @property
    def _batch(self) -> int:
        return self.client.endpoint().batch if isinstance(self.labels, LabelVectors) else 1

    def _ask(self, jpegs: list[bytes]) -> _Answers:
        if isinstance(self.labels, LabelVectors):
            calls = [jpegs[at : at + self._batch] for at in range(0, len(jpegs), self._batch)]
            return [answer for call in calls for answer in self.client.embed_images(call)]
        return [self.client.compare(jpeg, self.labels.prompts) for jpeg in jpegs]

    def _collect(self) -> None:
        slots, future = self._waiting.popleft()
        answers = iter(future.result())
        for slot in slots:
            if slot.reused_from is not None:
                self._record(slot, self._last_sent)
                continue
            mine = list(itertools.islice(answers, self.fit.squares))
            if slot.audit_of is None:
                self._last_sent = mine
            self._record(slot, mine)

    def _record(self, slot: _Slot, answers: _Answers) -> None:
        squares: list[Vectors] = []
        for answer in answers:
            if isinstance(answer, FrameRefused):
                kind = GapKind.API_REFUSED_FRAME
                self.gaps.append(Gap(slot.start_us, slot.end_us, kind, str(answer)))
                return
            squares.append(answer)
        row = np.concatenate(squares)
        self._answered.append(slot)
        self._rows.append(row.astype("<f2") if isinstance(self.labels, LabelVectors) else row)

    def result(self, top_n: int) -> RangeResult:
        """What the range has given, scored in one go."""
        gaps = tuple(sorted(self.gaps, key=lambda gap: gap.start_us))
        if not self._answered:
            return RangeResult((), gaps, None, 0)
        rows = np.stack(self._rows)
        # Both ways a label's similarity is a sum over the numbers of a row.
        if isinstance(self.labels, LabelVectors):
            matrix, vectors, dimension = self.labels.matrix, rows.tobytes(), rows.shape[1]
        else:
            matrix, vectors, dimension = self.labels.weights, None, 0
        best = predictions(similarities(rows, matrix), top_n)
        samples = tuple(
            SampleResult(
                slot.bucket,
                slot.t_us,
                slot.start_us,
                slot.end_us,
                found,
                slot.reused_from,
                slot.audit_of,
            )
            for slot, found in zip(self._answered, best, strict=True)
        )
        return RangeResult(samples, gaps, vectors, dimension)


def classify_range(
    decoded: Iterable[DecodedSample | Gap],
    *,
    sampling: Sampling,
    fit: Fit,
    client: ApiClient,
    labels: Labels,
    top_n: int,
    in_flight: int,
    lost: Callable[[], bool] = lambda: False,
) -> RangeResult:
    """Return all that one range gives: its samples with their best labels, its gaps, its vectors;
    of its usage only the time of decoding, since what was called is known to the client.

    `decoded` comes from `footage.decode.read_range` with this sampling and fit; a picture that the
    API refuses becomes a gap over the interval it answers for, and over those of its duplicates
    that were not sent. `lost` is asked between pictures. Raises ApiError for what stops a whole
    task, LeaseLost, and whatever `decoded` raises.
    """
    decode_s = 0.0
    duplicates = Duplicates() if sampling.skip_duplicates else None
    # Twice as many threads as the client lets onto the wire: the others prepare and read.
    pool = ThreadPoolExecutor(2 * in_flight, thread_name_prefix="api")
    pipeline = _Pipeline(client, labels, fit, in_flight, pool)
    try:
        start = time.perf_counter()
        for item in decoded:
            if lost():
                raise LeaseLost
            if isinstance(item, Gap):
                pipeline.gaps.append(item)
            else:
                pipeline.add(_slot(item, sampling, duplicates), item.picture)
            decode_s += time.perf_counter() - start
            if pipeline.full:
                pipeline.send()
            start = time.perf_counter()
        pipeline.finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return replace(pipeline.result(top_n), usage=Usage(decode_seconds=decode_s))


def _slot(item: DecodedSample, sampling: Sampling, duplicates: Duplicates | None) -> _Slot:
    source = duplicates.source(item.bucket, item.picture) if duplicates is not None else None
    audited = source is not None and is_audited(item.bucket, item.picture, sampling.audit)
    sources = (None, source) if audited else (source, None)
    return _Slot(item.bucket, item.t_us, item.start_us, item.end_us, *sources)
