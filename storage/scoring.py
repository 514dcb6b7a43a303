"""From vectors to labels: cosines, confidences and the best labels, for many samples at once.

The numbers are those that workers commit, to the last bit: sums are formed in float64 and rounded
to six decimals, far below what a JPEG disturbs, so that a number depends neither on how many
samples are scored together nor on when.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

LOGIT_SCALE = np.float32(100.0)
"""CLIP's own: confidence over a label set is softmax(100 x cosine)."""

Half = npt.NDArray[np.float16]
Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp]

_CHUNK = 64
"""Vectors multiplied at once. So few are worth no second thread to BLAS; with more, its threads
wait for each other, and on a busy machine each product takes ten times as long."""

_BLOCK = 8 * _CHUNK
"""Vectors widened at once, small enough for a core's cache."""

Wide = TypeVar("Wide", np.float32, np.float64)


def similarities(vectors: Half | Single, labels: Single) -> Single:
    """Cosines, samples x labels, of unit vectors as they are stored and the labels' vectors. Of a
    sample of several squares, whose vectors stand one after the other, the best counts."""
    found = best_products(vectors, labels, np.float64)
    found *= 1e6
    return np.asarray(np.rint(found, out=found) / 1e6, dtype=np.float32)


def best_products(
    vectors: Half | Single, directions: Single, precision: type[Wide]
) -> npt.NDArray[Wide]:
    """The same before they are rounded: scalar products, samples x directions, whose sums are
    formed in `precision`."""
    factor = np.ascontiguousarray(directions.T, dtype=precision)
    squares = vectors.reshape(-1, len(factor))
    found = np.empty((len(squares), len(directions)), dtype=precision)
    widened = np.empty((min(len(squares), _BLOCK), len(factor)), dtype=precision)
    for at in range(0, len(squares), _BLOCK):
        part = squares[at : at + _BLOCK]
        widened[: len(part)] = part
        # A stack of chunks is one call, within which other threads may run.
        stacked = len(part) // _CHUNK * _CHUNK
        np.matmul(
            widened[:stacked].reshape(-1, _CHUNK, len(factor)),
            factor,
            out=found[at : at + stacked].reshape(-1, _CHUNK, len(directions)),
        )
        rest = slice(at + stacked, at + len(part))
        np.matmul(widened[stacked : len(part)], factor, out=found[rest])
    if len(squares) == len(vectors):
        return found
    best: npt.NDArray[Wide] = found.reshape(len(vectors), -1, len(directions)).max(axis=1)
    return best


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
