"""From vectors to labels: cosines, confidences and the best labels, for many samples at once.

The numbers are those that workers commit, to the last bit: sums are formed in float64 and rounded
to six decimals, far below what a JPEG disturbs, so that a number depends neither on how many
samples are scored together nor on when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

LOGIT_SCALE = np.float32(100.0)
"""CLIP's own: confidence over a label set is softmax(100 x cosine)."""

Half = npt.NDArray[np.float16]
Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp]
Changes = npt.NDArray[np.float64]

LEFT_OUT = np.float32(-1)
"""Stands for the confidence of a label that is not among a sample's best."""

_CHUNK = 64
"""Vectors multiplied at once. So few are worth no second thread to BLAS; with more, its threads
wait for each other, and on a busy machine each product takes ten times as long."""

_BLOCK = 2 * _CHUNK
"""Vectors widened at once, small enough for a core's cache."""

_HALF_DIGITS, _FLOAT_DIGITS = 10, 23
_SIGN_AND_NUMBER = np.int32(-(1 << 31) | 0x7FFF << _FLOAT_DIGITS - _HALF_DIGITS)
_BIAS = np.float32(2.0 ** (127 - 15))
"""IEEE 754: binary16 to binary32."""

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
    for at, wide in _widened([squares], precision):
        _multiply(wide, factor, found[at : at + len(wide)])
    return _best_of_squares(found, len(vectors))


def picture_changes(vectors: Sequence[Half]) -> Changes:
    """How much each sample's picture differs from the one before: 1 - cosine of their unit vectors
    (samples x dimension; of several squares the mean); 0 for the first. The matrices are parts of
    one that stand one after the other."""
    changes = np.zeros(sum(map(len, vectors)))
    before = None
    for at, wide in _widened(vectors, np.float64):
        before = _compare(wide, before, changes[at : at + len(wide)])
    return _as_changes(changes)


def similarities_and_changes(vectors: Sequence[Half], labels: Single) -> tuple[Single, Changes]:
    """`similarities` and `picture_changes` of such parts, by reading them once."""
    count = sum(map(len, vectors))
    changes = np.zeros(count)
    factor = np.ascontiguousarray(labels.T, dtype=np.float64)
    squares = vectors[0].shape[1] // len(factor) if vectors else 1
    found = np.empty((count * squares, len(labels)))
    before = None
    for at, wide in _widened(vectors, np.float64):
        end = at + len(wide)
        _multiply(wide.reshape(-1, len(factor)), factor, found[at * squares : end * squares])
        before = _compare(wide, before, changes[at:end])
    return _rounded(_best_of_squares(found, count)), _as_changes(changes)


def _widened(
    parts: Sequence[Half | Single], precision: type[Wide]
) -> Iterator[tuple[int, npt.NDArray[Wide]]]:
    """The vectors in a wider type, as many at once as suit a core's cache, and which is the first;
    each time in the same memory."""
    left = sum(map(len, parts))
    if not left:
        return
    widened = np.empty((min(left, _BLOCK), parts[0].shape[1]), dtype=precision)
    bits = np.empty(widened.shape, dtype=np.int32)
    first = filled = 0
    for part in parts:
        taken = 0
        while taken < len(part):
            some = part[taken : taken + len(widened) - filled]
            here = slice(filled, filled + len(some))
            _widen(some, widened[here], bits[here])
            taken, filled = taken + len(some), here.stop
            if filled == min(left, len(widened)):
                yield first, widened[:filled]
                first, left, filled = first + filled, left - filled, 0


def _widen(vectors: Half | Single, out: npt.NDArray[Wide], bits: npt.NDArray[np.int32]) -> None:
    """The same numbers in a wider type. numpy takes halves one by one, which is most of what
    reading stored vectors costs; shifted into place, their bits are floats that are too small by a
    power of two (exact also for subnormal halves; stored vectors hold no infinity)."""
    if vectors.dtype != np.float16:
        out[...] = vectors
        return
    np.copyto(bits, vectors.view(np.int16))
    np.left_shift(bits, _FLOAT_DIGITS - _HALF_DIGITS, out=bits)
    np.bitwise_and(bits, _SIGN_AND_NUMBER, out=bits)
    np.multiply(bits.view(np.float32), _BIAS, out=out)


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
    """Write each one's product with the one before, of the very first with itself; return the
    last of them."""
    out[1:] = np.vecdot(wide[1:], wide[:-1])
    out[0] = wide[0] @ (wide[0] if before is None else before)
    last: Changes = wide[-1].copy()
    return last


def _as_changes(products: Changes) -> Changes:
    if len(products):
        # Of unit vectors side by side, the squared length is their number.
        products /= max(round(float(products[0])), 1)
        products[0] = 1.0
    return np.maximum(1.0 - products, 0.0)


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
    keys = _falling_keys(similarity)
    keys.sort(axis=1)
    best = _positions(keys[:, :top_n])
    place = best + np.arange(0, similarity.size, similarity.shape[1])[:, np.newaxis]
    return best, similarity.take(place), np.ascontiguousarray(_confidences(similarity)).take(place)


def kept_confidences(similarity: Single, top_n: int) -> tuple[Positions, Single]:
    """The same numbers without their order: position of each sample's best label, and labels x
    samples the confidence, or LEFT_OUT for what is not among the best."""
    keys = _falling_keys(similarity)
    by_label = np.ascontiguousarray(keys.T)
    kept = _confidences(similarity).T.copy()
    if top_n < similarity.shape[1]:
        last = np.partition(keys, top_n - 1, axis=1)[:, top_n - 1]
        # Not by a mask: which label is left out is a matter of chance, and a branch costs more.
        stays = (by_label <= last).astype(np.float32)
        kept *= stays
        kept += LEFT_OUT * (np.float32(1) - stays)
    return _positions(by_label.min(axis=0)), kept


def _confidences(similarity: Single) -> Single:
    # What is reduced over the labels is so many times faster where the samples stand side by side.
    by_label = np.ascontiguousarray(similarity.T)
    shares = np.exp(LOGIT_SCALE * (by_label - by_label.max(axis=0)))
    total = np.zeros_like(shares[0])
    for share in shares:  # in this order, whatever the number of samples
        total += share
    return np.asarray((shares / total).T, dtype=np.float32)


def _falling_keys(similarity: Single) -> npt.NDArray[np.int64]:
    """Integers that rise where each row's numbers fall, and among equal ones with the position,
    which is their lower half: sorted, they give what a stable argsort gives, in a quarter of its
    time.

    A float's bits, read as an integer, rise with it where it is positive and fall where it is
    negative; 0 is added to have one zero alone.
    """
    bits = (similarity + np.float32(0)).view(np.int32)
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (~rising).astype(np.int64) << 32
    keys += np.arange(similarity.shape[1])
    return keys


def _positions(keys: npt.NDArray[np.int64]) -> Positions:
    return np.asarray(keys & 0xFFFFFFFF, dtype=np.intp)


def centroid(vectors: Single | Half) -> Single:
    """The direction between several unit vectors, n x dimension."""
    mean = vectors.astype(np.float32).mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean), dtype=np.float32)
