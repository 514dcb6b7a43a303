"""Search: the samples whose stored vectors are nearest to a text's, or to another sample's."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from storage.records import Fit
from storage.scoring import Half, Single, best_products, centroid
from storage.vectors import END_US, START_US, T_US, VideoVectors, ahead

APART_US = 5_000_000
"""Samples of a video that stand closer show the same moment, of which the best is told."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A moment that resembles what was asked for."""

    video_id: int
    t_us: int
    score: float
    """Cosine in [-1, 1]."""


def search(
    stored: Iterable[VideoVectors], query: Single, *, top: int = 20, apart_us: int = APART_US
) -> list[Hit]:
    """The `top` moments nearest to the query (a unit vector), the best first.

    Of a video's samples less than `apart_us` apart only the best counts. A video's vectors come one
    after another, as `storage.vectors` gives them; each is read once. ValueError where the query
    is of another dimension, or `top` below 1.
    """
    if top < 1:
        raise ValueError(f"top={top}: ask for one moment or more")
    best: list[tuple[float, int, int]] = []
    with ahead(stored) as videos:
        for video_id, of_video in groupby(videos, key=lambda one: one.video_id):
            scored = [(_scores(one, query), one.times[:, T_US]) for one in of_video]
            scores = np.concatenate([scores for scores, _ in scored])
            times = np.concatenate([times for _, times in scored])
            floor = best[0][0] if len(best) == top else -np.inf
            for at in _apart(scores, times, floor, top, apart_us):
                hit = (float(scores[at]), -video_id, -int(times[at]))
                if len(best) < top:
                    heapq.heappush(best, hit)
                else:
                    heapq.heappushpop(best, hit)
    # Stored vectors are rounded to half precision, so their length is not quite 1.
    return [
        Hit(-video_id, -t_us, round(min(max(score, -1.0), 1.0), 6))
        for score, video_id, t_us in sorted(best)[::-1]
    ]


def _scores(stored: VideoVectors, query: Single) -> Single:
    vectors = stored.vectors
    dimension = vectors.shape[1] // Fit(stored.fit).squares
    if query.shape != (dimension,):
        raise ValueError(f"a query of shape {query.shape}: the stored vectors have ({dimension},)")
    return best_products(vectors, query[np.newaxis], np.float32)[:, 0]


def _apart(
    scores: Single, times: npt.NDArray[np.int64], floor: float, top: int, apart_us: int
) -> Iterator[int]:
    """Positions of the video's best samples above the floor, none near a better one."""
    above = np.flatnonzero(scores > floor)
    taken: list[int] = []
    for at in above[np.argsort(-scores[above], kind="stable")]:
        if all(abs(int(times[at] - times[other])) >= apart_us for other in taken):
            taken.append(int(at))
            yield int(at)
            if len(taken) == top:
                return


def vector_at(stored: VideoVectors, t_us: int) -> tuple[int, Half] | None:
    """Time and unit vector of the sample that answers for this moment of the video, None where none
    does; of several squares the direction between them."""
    at = int(np.searchsorted(stored.times[:, START_US], t_us, side="right")) - 1
    if at < 0 or t_us >= stored.times[at, END_US]:
        return None
    squares = stored.vectors[at].reshape(Fit(stored.fit).squares, -1)
    vector = squares[0] if len(squares) == 1 else centroid(squares).astype(np.float16)
    return int(stored.times[at, T_US]), vector
