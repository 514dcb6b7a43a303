"""Scenes: maximal runs of one label, after smoothing over time.

Each sample votes with its whole distribution over the labels. The most likely sequence of a sticky
hidden Markov model (Viterbi's algorithm) is taken, so that a moment's doubt cuts no scene in two;
one of its states is "unknown", which wins where no label leads the next by a margin. Then runs that
are shorter than a scene may be join the neighbour that suits them better, and a boundary moves to
the shot cut beside it, if there is one. No scene reaches over a gap: what was not seen is not
claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, select

from storage.columns import SampleColumns
from storage.database import reading
from storage.records import Gap, SampleResult, Scene
from storage.schema import jobs
from storage.schema import labels as label_rows
from storage.schema import scenes as scene_rows

STICKINESS_US = 2_000_000
"""How long a label of which the samples are sure must last amid a scene to cut it in two; what they
are less sure of must last longer. Measured on tapes joined from real clips (benchmarks/scenes.py):
one second finds fewer of the scenes, three lose short ones."""

DOUBT = 0.1
"""Added to every share before its logarithm is taken: a sharp softmax is often sure and wrong, so
no sample is worth more than log(1.1 / 0.1) = 2.4 nats, and one outlier cannot outvote a scene."""

SURE = float(np.log((1 + DOUBT) / DOUBT))
"""Nats by which a sample that is sure of a label prefers it to any other."""

MARGIN = 0.1
"""Lead in confidence over the next label that a label must have, or nothing is claimed."""

VOTE_US = 1_000_000
"""A sample votes in full for an interval of this length; samples that stand closer are much alike
and share the vote, so that sampling more densely changes scenes little."""

MIN_LENGTH_US = 2_000_000
"""Shortest scene between two others."""

CUT = 2.0
"""A shot cut is a place where the picture changes so many times more than at a boundary beside
it."""

UNKNOWN = -1
"""Stands for the position of a label where no label is claimed."""
UNKNOWN_NAME = "unknown"

Shares = npt.NDArray[np.float64]


def scenes_of(
    samples: Sequence[SampleResult],
    gaps: Sequence[Gap],
    labels: Sequence[str],
    *,
    stickiness_us: int = STICKINESS_US,
    min_length_us: int = MIN_LENGTH_US,
    margin: float = MARGIN,
) -> list[Scene]:
    """The scenes of one video, in order of time.

    Samples are in order of time; their predictions name positions in `labels`. Every sample is in
    exactly one scene, which ends with its last sample's `end_us`.
    """
    found = labelled_scenes(
        SampleColumns.of(samples),
        gaps,
        labels,
        stickiness_us=stickiness_us,
        min_length_us=min_length_us,
        margin=margin,
    )
    return [scene for _, scene in found]


def labelled_scenes(
    samples: SampleColumns,
    gaps: Sequence[Gap],
    labels: Sequence[str],
    *,
    changes: Shares | None = None,
    stickiness_us: int = STICKINESS_US,
    min_length_us: int = MIN_LENGTH_US,
    margin: float = MARGIN,
) -> list[tuple[int, Scene]]:
    """The same, each scene with the position of its label, or UNKNOWN.

    `changes` says for each sample how much its picture differs from the one before, in any unit
    (`picture_changes`); without it boundaries stay where the labels put them.
    """
    found: list[tuple[int, Scene]] = []
    shares = samples.shares(len(labels))
    evidence = _evidence(shares, samples.end_us - samples.start_us, margin)
    lengths = (samples.end_us - samples.start_us).astype(np.float64)
    # A label that comes and goes changes it twice.
    switch_cost = stickiness_us / VOTE_US * SURE / 2
    for start, end in _segments(samples, gaps):
        here = slice(start, end)
        path = _most_likely_path(evidence[here], switch_cost)
        runs = _runs(path, evidence[here], lengths[here], min_length_us)
        if changes is not None:
            runs = _at_cuts(runs, changes[here])
        for first, last, state in runs:
            label = state if state < len(labels) else UNKNOWN
            part = slice(start + first, start + last)
            found.append((label, _scene(samples, part, shares, label, labels)))
    return found


def picture_changes(vectors: npt.NDArray[np.float16]) -> Shares:
    """How much each sample's picture differs from the one before: 1 - cosine of their unit vectors
    (samples x dimension; of several squares the mean); 0 for the first."""
    wide = vectors.astype(np.float32)
    # Of unit vectors side by side, the squared length is their number.
    squares = np.round((wide[:1] ** 2).sum(axis=1))
    cosines = np.einsum("ij,ij->i", wide[1:], wide[:-1]) / np.maximum(squares, 1)
    changes = np.maximum(1.0 - cosines.astype(np.float64), 0.0)
    return np.concatenate([[0.0], changes])[: len(vectors)]


def _segments(samples: SampleColumns, gaps: Sequence[Gap]) -> list[tuple[int, int]]:
    """Stretches [start, end) of samples that no gap interrupts."""
    after_gap = np.isin(samples.start_us[1:], [gap.end_us for gap in gaps])
    cuts = np.flatnonzero((samples.end_us[:-1] != samples.start_us[1:]) | after_gap) + 1
    edges = [0, *cuts.tolist(), len(samples)]
    return [(start, end) for start, end in pairwise(edges) if start < end]


def _evidence(shares: Shares, lengths_us: npt.NDArray[np.int64], margin: float) -> Shares:
    """Nats that each sample gives to each label and, last, to "unknown": that one has as much as
    the second best label and the margin together, so it beats a best label that leads by less."""
    if shares.shape[1] < 2:
        states = shares
    else:
        second = np.partition(shares, -2, axis=1)[:, -2:-1]
        states = np.hstack([shares, second + margin])
    votes = np.minimum(lengths_us / VOTE_US, 1.0)[:, np.newaxis]
    return np.asarray(votes * np.log(states + DOUBT))


def _at_cuts(runs: Sequence[tuple[int, int, int]], changes: Shares) -> list[tuple[int, int, int]]:
    """The same runs, each boundary moved to the sample beside it that begins a new shot."""
    edges = [start for start, _, _ in runs] + [runs[-1][1]]
    for at in range(1, len(runs)):
        near = range(max(edges[at] - 1, edges[at - 1] + 1), min(edges[at] + 2, edges[at + 1]))
        best = max(near, key=lambda sample: changes[sample])
        if changes[best] > CUT * changes[edges[at]]:
            edges[at] = best
    return [(start, end, run[2]) for (start, end), run in zip(pairwise(edges), runs, strict=True)]


def _most_likely_path(evidence: Shares, switch_cost: float) -> npt.NDArray[np.intp]:
    """Label of each sample on the path of most evidence, less `switch_cost` for each change."""
    scores = evidence.copy()
    for before, score in pairwise(scores):
        # Whoever comes from another label comes from the best one.
        np.add(score, np.maximum(before, before.max() - switch_cost), out=score)
    best = scores.argmax(axis=1)
    leaving = scores < scores.max(axis=1, keepdims=True) - switch_cost
    at = np.arange(len(scores))[:, np.newaxis]
    # Of each sample and label, the last sample up to there after which the label is come to anew.
    left = np.maximum.accumulate(np.where(leaving, at, -1))
    path = np.empty(len(scores), dtype=np.intp)
    end = len(scores)
    while end:
        label = best[end - 1]
        start = int(left[end - 2, label]) + 1 if end > 1 else 0
        path[start:end] = label
        end = start
    return path


def _runs(
    path: npt.NDArray[np.intp], evidence: Shares, lengths: Shares, min_length_us: int
) -> list[tuple[int, int, int]]:
    """Runs [start, end) of one label; too short ones joined to a neighbour, the shortest first."""
    edges = [0, *(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
    runs = [(start, end, int(path[start])) for start, end in pairwise(edges)]
    while len(runs) > 1:
        spans = [lengths[start:end].sum() for start, end, _ in runs]
        at = int(np.argmin(spans))
        if spans[at] >= min_length_us:
            break
        start, end, _ = runs[at]
        beside = [runs[i] for i in (at - 1, at + 1) if 0 <= i < len(runs)]
        label = max(beside, key=lambda run: evidence[start:end, run[2]].sum())[2]
        runs[at] = (start, end, label)
        runs = _joined(runs)
    return runs


def _joined(runs: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    joined: list[tuple[int, int, int]] = []
    for start, end, label in runs:
        if joined and joined[-1][2] == label:
            joined[-1] = (joined[-1][0], end, label)
        else:
            joined.append((start, end, label))
    return joined


def _scene(
    samples: SampleColumns, part: slice, shares: Shares, label: int, names: Sequence[str]
) -> Scene:
    count = part.stop - part.start
    if label == UNKNOWN:
        # What is told is how sure the best label was, which was not enough.
        name, of_label, agreeing = UNKNOWN_NAME, shares[part].max(axis=1), 0
    else:
        name, of_label = names[label], shares[part, label]
        agreeing = int((samples.label[part, 0] == label).sum())
    return Scene(
        start_us=int(samples.start_us[part.start]),
        end_us=int(samples.end_us[part.stop - 1]),
        label=name,
        confidence=float(of_label.mean()),
        peak=float(of_label.max()),
        samples=count,
        agreeing=agreeing / count,
    )


def scenes(engine: Engine, job_id: int, video_id: int | None = None) -> dict[int, list[Scene]]:
    """The scenes of the job's closed videos, or of one of them, in order of time; by video."""
    query = (
        select(scene_rows, label_rows.c.name)
        .join(jobs, jobs.c.id == scene_rows.c.job_id)
        .outerjoin(
            label_rows,
            (label_rows.c.label_set_id == jobs.c.label_set_id)
            & (label_rows.c.position == scene_rows.c.label),
        )
        .where(scene_rows.c.job_id == job_id)
        .order_by(scene_rows.c.video_id, scene_rows.c.start_us)
    )
    if video_id is not None:
        query = query.where(scene_rows.c.video_id == video_id)
    found: dict[int, list[Scene]] = {}
    with reading(engine) as connection:
        for row in connection.execute(query):
            scene = Scene(
                row.start_us,
                row.end_us,
                UNKNOWN_NAME if row.name is None else row.name,
                row.confidence,
                row.peak,
                row.samples,
                row.agreeing,
            )
            found.setdefault(row.video_id, []).append(scene)
    return found
