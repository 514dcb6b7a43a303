"""One frame range: decode its samples, embed them through the API, score the labels.

Decoding and HTTP overlap: this thread decodes and encodes, a few threads wait for answers, and at
most `in_flight` requests are under way; as many answers may wait behind a late one, so that memory
is bounded.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

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
from workers.api import ApiClient, FrameRefused, Vectors
from workers.calls import prompts_of
from workers.footage.decode import DecodedSample
from workers.footage.duplicates import Duplicates, is_audited
from workers.footage.picture import Picture, encode_jpeg, tiles

LOGIT_SCALE = 100.0
"""CLIP's own: confidence over a label set is softmax(100 x cosine)."""


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
            parts.append(_centroid(np.stack([of_text[p] for p in label.prompts])))
        if label.examples:
            parts.append(_centroid(np.stack(list(_embed_examples(label.examples, client)))))
        rows.append(np.mean(parts, axis=0))
    return np.stack(rows).astype(np.float32)


def _embed_examples(jpegs: Sequence[bytes], client: ApiClient) -> Iterator[Vectors]:
    size = client.endpoint().batch
    for at in range(0, len(jpegs), size):
        for answer in client.embed_images(jpegs[at : at + size]):
            if isinstance(answer, FrameRefused):
                raise answer
            yield answer


def _centroid(vectors: Vectors) -> Vectors:
    mean = vectors.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean), dtype=np.float32)


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


def predictions_of(similarity: npt.NDArray[np.floating], top_n: int) -> tuple[Prediction, ...]:
    """Return the best `top_n` labels of one sample, best first.

    `similarity`: labels, cosines. Confidence is softmax(100 x cosine) over all labels.
    """
    scaled = LOGIT_SCALE * (similarity - similarity.max())
    shares = np.exp(scaled)
    shares /= shares.sum()
    best = np.argsort(-similarity, kind="stable")[:top_n]
    return tuple(
        Prediction(int(label), float(similarity[label]), float(shares[label])) for label in best
    )


def score_vectors(vectors: npt.NDArray[np.float16], labels: LabelVectors) -> Vectors:
    """Return similarities, samples x labels float32, from vectors as they are stored. Of a sample
    of several squares, whose vectors stand one after the other, the best counts.

    Summed in float64 and rounded to six decimals, far below what a JPEG disturbs, so that a number
    does not depend on how many samples were scored together: one computed now and one recomputed
    from the database years later are the same.
    """
    wide = labels.matrix.T.astype(np.float64)
    squares = vectors.astype(np.float64).reshape(-1, len(wide)) @ wide
    best = squares.reshape(len(vectors), -1, wide.shape[1]).max(axis=1)
    return np.asarray(np.round(best, 6), dtype=np.float32)


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
    top_n: int
    in_flight: int
    pool: ThreadPoolExecutor
    samples: list[SampleResult] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float16]] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _jpegs: list[bytes] = field(default_factory=list)
    """Of the squares of those slots that are sent."""
    _waiting: deque[tuple[list[_Slot], Future[_Answers]]] = field(default_factory=deque)
    _last_sent: _Answers = field(default_factory=list)
    """What duplicates take over."""

    def add(self, slot: _Slot, picture: Picture) -> None:
        """Send a sample, or let it wait for what it takes over."""
        self._slots.append(slot)
        if slot.reused_from is None:
            squares = tiles(picture) if self.fit is Fit.TILES else (picture,)
            self._jpegs.extend(encode_jpeg(square) for square in squares)

    @property
    def full(self) -> bool:
        """Whether so much is ready that it should be sent: whole calls, of whole samples."""
        return len(self._jpegs) >= self._batch * self.fit.squares

    def send(self) -> None:
        """Send what is ready; waits for older answers while too many are under way."""
        if len(self._waiting) == 2 * self.in_flight:
            self._collect()
        if self._slots:
            self._waiting.append((self._slots, self.pool.submit(self._ask, self._jpegs)))
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
        if isinstance(self.labels, LabelVectors):
            vector = np.concatenate(squares).astype("<f2")
            self.vectors.append(vector)
            similarity = score_vectors(vector[np.newaxis], self.labels)[0]
        else:
            cosines = [np.round(self.labels.weights @ square, 6) for square in squares]
            similarity = np.max(cosines, axis=0)
        self.samples.append(
            SampleResult(
                slot.bucket,
                slot.t_us,
                slot.start_us,
                slot.end_us,
                predictions_of(similarity, self.top_n),
                slot.reused_from,
                slot.audit_of,
            )
        )


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
    pipeline = _Pipeline(client, labels, fit, top_n, in_flight, pool)
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
    vectors = np.stack(pipeline.vectors) if pipeline.vectors else None
    return RangeResult(
        samples=tuple(pipeline.samples),
        gaps=tuple(sorted(pipeline.gaps, key=lambda gap: gap.start_us)),
        vectors=vectors.astype("<f2").tobytes() if vectors is not None else None,
        dimension=vectors.shape[1] if vectors is not None else 0,
        usage=Usage(decode_seconds=decode_s),
    )


def _slot(item: DecodedSample, sampling: Sampling, duplicates: Duplicates | None) -> _Slot:
    source = duplicates.source(item.bucket, item.picture) if duplicates is not None else None
    audited = source is not None and is_audited(item.bucket, item.picture, sampling.audit)
    sources = (None, source) if audited else (source, None)
    return _Slot(item.bucket, item.t_us, item.start_us, item.end_us, *sources)
