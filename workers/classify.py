"""One frame range: decode its samples, embed them through the API, score the labels.

Decoding and HTTP overlap: this thread decodes and encodes, a few threads wait for answers, and at
most `in_flight` requests are under way, so that memory is bounded by those and one batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from storage.records import (
    Gap,
    GapKind,
    LabelSet,
    Prediction,
    RangeResult,
    SampleResult,
    Usage,
)
from workers.api import ApiClient, FrameRefused, Vectors
from workers.footage.decode import DecodedSample
from workers.footage.picture import encode_jpeg

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
    texts = list(dict.fromkeys(p for label in labels.labels for p in label.prompts))
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
    prompts = tuple(dict.fromkeys(p for label in labels.labels for p in label.prompts))
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
    """Return similarities, samples x labels float32, from vectors as they are stored.

    Summed in float64 and rounded to six decimals, far below what a JPEG disturbs, so that a number
    does not depend on how many samples were scored together: one computed now and one recomputed
    from the database years later are the same.
    """
    product = vectors.astype(np.float64) @ labels.matrix.T.astype(np.float64)
    return np.round(product, 6).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A sample without its picture, which is not needed once it is encoded."""

    bucket: int
    t_us: int
    start_us: int
    end_us: int


@dataclass(slots=True)
class _Found:
    """What a range has given so far."""

    samples: list[SampleResult] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float16]] = field(default_factory=list)


def classify_range(
    decoded: Iterable[DecodedSample | Gap],
    *,
    client: ApiClient,
    labels: Labels,
    top_n: int,
    in_flight: int,
    lost: Callable[[], bool] = lambda: False,
) -> RangeResult:
    """Return all that one range gives: its samples with their best labels, its gaps, its vectors.

    `decoded` comes from `footage.decode.read_range`; a picture that the API refuses becomes a gap
    over the interval it answers for. `lost` is asked between pictures. Raises ApiError for what
    stops a whole task, LeaseLost, and whatever `decoded` raises.
    """
    before = (
        client.spent.image_calls,
        client.spent.text_calls,
        client.spent.bytes_sent,
        client.spent.seconds,
    )
    found = _Found()
    batch_size = client.endpoint().batch if isinstance(labels, LabelVectors) else 1
    decode_s = 0.0
    batch: list[tuple[_Slot, bytes]] = []
    waiting: deque[tuple[list[_Slot], Future[list[Vectors | FrameRefused]]]] = deque()

    def ask(jpegs: list[bytes]) -> list[Vectors | FrameRefused]:
        if isinstance(labels, LabelVectors):
            return client.embed_images(jpegs)
        return [client.compare(jpeg, labels.prompts) for jpeg in jpegs]

    def send() -> None:
        if len(waiting) == in_flight:
            collect()
        waiting.append(([slot for slot, _ in batch], pool.submit(ask, [jpeg for _, jpeg in batch])))
        batch.clear()

    def collect() -> None:
        slots, answers = waiting.popleft()
        for slot, answer in zip(slots, answers.result(), strict=True):
            _record(found, slot, answer, labels, top_n)

    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="api")
    try:
        start = time.perf_counter()
        for item in decoded:
            if lost():
                raise LeaseLost
            if isinstance(item, Gap):
                found.gaps.append(item)
            else:
                slot = _Slot(item.bucket, item.t_us, item.start_us, item.end_us)
                batch.append((slot, encode_jpeg(item.picture)))
            decode_s += time.perf_counter() - start
            if len(batch) == batch_size:
                send()
            start = time.perf_counter()
        if batch:
            send()
        while waiting:
            collect()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    spent = client.spent
    vectors = np.stack(found.vectors) if found.vectors else None
    return RangeResult(
        samples=tuple(found.samples),
        gaps=tuple(sorted(found.gaps, key=lambda gap: gap.start_us)),
        vectors=vectors.astype("<f2").tobytes() if vectors is not None else None,
        dimension=vectors.shape[1] if vectors is not None else 0,
        usage=Usage(
            image_calls=spent.image_calls - before[0],
            text_calls=spent.text_calls - before[1],
            bytes_sent=spent.bytes_sent - before[2],
            api_seconds=spent.seconds - before[3],
            decode_seconds=decode_s,
        ),
    )


def _record(
    found: _Found,
    slot: _Slot,
    answer: Vectors | FrameRefused,
    labels: Labels,
    top_n: int,
) -> None:
    if isinstance(answer, FrameRefused):
        kind = GapKind.API_REFUSED_FRAME
        found.gaps.append(Gap(slot.start_us, slot.end_us, kind, str(answer)))
        return
    if isinstance(labels, LabelVectors):
        vector = answer.astype("<f2")
        found.vectors.append(vector)
        similarity = score_vectors(vector[np.newaxis], labels)[0]
    else:
        similarity = np.round(labels.weights @ answer, 6)
    found.samples.append(
        SampleResult(
            slot.bucket, slot.t_us, slot.start_us, slot.end_us, predictions_of(similarity, top_n)
        )
    )
