"""From vectors to labels: cosines, confidences and the best labels, for many samples at once.

The numbers are those that workers commit, to the last bit: sums are formed in float64 and rounded
to six decimals, far below what a JPEG disturbs, so that a number depends neither on how many
samples are scored together nor on when.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

LOGIT_SCALE = np.float32(100.0)
"""CLIP's own: confidence over a label set is softmax(100 x cosine)."""

Half = npt.NDArray[np.float16]
Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp]
Changes = npt.NDArray[np.float64]

_CHUNK = 64
"""Vectors multiplied at once. So few are worth no second thread to BLAS; with more, its threads
wait for each other, and on a busy machine each product takes ten times as long."""

_BLOCK = 8 * _CHUNK
"""Vectors widened at once, small enough for a core's cache."""

Wide = TypeVar("Wide", np.float32, np.float64)


def similarities(vectors: Half | Single, labels: Single) -> Single:
    """Cosines, samples x labels, of unit vectors as they are stored and the labels' vectors. Of a
    sample of several squares, whose vectors stand one after the other, the best counts."""
    return _rounded(best_products(vectors, labels, np.float64))


def best_products(
    vectors: Half | Single, directions: Single, precision: type[Wide]
) -> npt.NDArray[Wide]:
    """The same before they are rounded: scalar products, samples x directions, whose sums are
    formed in `precision`."""
    factor = np.ascontiguousarray(directions.T, dtype=precision)
    squares = vectors.reshape(-1, len(factor))
    found = np.empty((len(squares), len(directions)), dtype=precision)
    for at, wide in _widened(squares, precision):
        _multiply(wide, factor, found[at : at + len(wide)])
    return _best_of_squares(found, len(vectors))


def picture_changes(vectors: Half | Single) -> Changes:
    """How much each sample's picture differs from the one before: 1 - cosine of their unit vectors
    (samples x dimension; of several squares the mean); 0 for the first."""
    changes = np.zeros(len(vectors))
    before = None
    for at, wide in _widened(vectors, np.float64):
        before = _compare(wide, before, changes[at : at + len(wide)])
    return changes


def similarities_and_changes(vectors: Half | Single, labels: Single) -> tuple[Single, Changes]:
    """`similarities` and `picture_changes`, by reading the vectors once."""
    factor = np.ascontiguousarray(labels.T, dtype=np.float64)
    squares = vectors.shape[1] // len(factor)
    found = np.empty((len(vectors) * squares, len(labels)))
    changes = np.zeros(len(vectors))
    before = None
    for at, wide in _widened(vectors, np.float64):
        end = at + len(wide)
        _multiply(wide.reshape(-1, len(factor)), factor, found[at * squares : end * squares])
        before = _compare(wide, before, changes[at:end])
    return _rounded(_best_of_squares(found, len(vectors))), changes


def _widened(
    vectors: Half | Single, precision: type[Wide]
) -> Iterator[tuple[int, npt.NDArray[Wide]]]:
    """The vectors in a wider type, as many at once as suit a core's cache, and which is the first;
    each time in the same memory."""
    widened = np.empty((min(len(vectors), _BLOCK), vectors.shape[1]), dtype=precision)
    for at in range(0, len(vectors), _BLOCK):
        part = vectors[at : at + _BLOCK]
        widened[: len(part)] = part
        yield at, widened[: len(part)]


def _multiply(wide: npt.NDArray[Wide], factor: npt.NDArray[Wide], out: npt.NDArray[Wide]) -> None:
    # A stack of chunks is one call, within which other threads may run.
    stacked = len(wide) // _CHUNK * _CHUNK
    np.matmul(
        wide[:stacked].reshape(-1, _CHUNK, len(factor)),
        factor,
        out=out[:stacked].reshape(-1, _CHUNK, factor.shape[1]),
    )
    np.matmul(wide[stacked:], factor, out=out[stacked:])


def _compare(wide: Changes, before: Changes | None, out: Changes) -> Changes:
    """Write how much each differs from the one before; return the last of them."""
    # Of unit vectors side by side, the squared length is their number.
    squares = max(round(float(wide[0] @ wide[0])), 1)
    out[1:] = np.vecdot(wide[1:], wide[:-1])
    out[0] = squares if before is None else wide[0] @ before
    np.maximum(1.0 - out / squares, 0.0, out=out)
    last: Changes = wide[-1].copy()
    return last


def _best_of_squares(products: npt.NDArray[Wide], samples: int) -> npt.NDArray[Wide]:
    if len(products) == samples:
        return products
    best: npt.NDArray[Wide] = products.reshape(samples, -1, products.shape[1]).max(axis=1)
    return best


def _rounded(products: Changes) -> Single:
    products *= 1e6
    return np.asarray(np.rint(products, out=products) / 1e6, dtype=np.float32)


def best_labels(similarity: Single, top_n: int) -> tuple[Positions, Single, Single]:
    """Positions, cosines and confidences of each sample's best labels, best first.

    Each is samples x min(top_n, labels). Confidence is softmax(100 x cosine) over all labels.
    """
    shares = np.exp(LOGIT_SCALE * (similarity - similarity.max(axis=1, keepdims=True)))
    shares /= shares.sum(axis=1, keepdims=True)
    best = _falling(similarity)[:, :top_n]
    place = best + np.arange(0, similarity.size, similarity.shape[1])[:, np.newaxis]
    return best, similarity.take(place), shares.take(place)


def _falling(similarity: Single) -> Positions:
    """Positions in falling order of each row's numbers, equal ones in rising order: what a stable
    argsort gives, in a quarter of its time.

    Number and position are sorted as one integer. A float's bits, read as an integer, rise with it
    where it is positive and fall where it is negative; 0 is added to have one zero alone.
    """
    bits = (similarity + np.float32(0)).view(np.int32)
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (~rising).astype(np.int64) << 32
    keys += np.arange(similarity.shape[1])
    keys.sort(axis=1)
    return np.asarray(keys & 0xFFFFFFFF, dtype=np.intp)


def centroid(vectors: Single | Half) -> Single:
    """The direction between several unit vectors, n x dimension."""
    mean = vectors.astype(np.float32).mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean), dtype=np.float32)
