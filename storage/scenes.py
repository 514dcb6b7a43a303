"""Scenes: maximal runs of one label, after smoothing over time.

Each sample votes with its whole distribution over the labels. The most likely sequence of a sticky
hidden Markov model (Viterbi's algorithm) is taken, so that a moment's doubt cuts no scene in two;
then runs that are shorter than a scene may be join the neighbour that suits them better. No scene
reaches over a gap: what was not seen is not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, select

from storage.database import reading
from storage.records import Gap, SampleResult, Scene
from storage.schema import jobs
from storage.schema import labels as label_rows
from storage.schema import scenes as scene_rows

SWITCH_COST = 1.25
"""Evidence, in nats, that a change of label must outweigh. A single sample amid a scene changes its
label twice, which no sample's evidence outweighs; two that are sure, or eight of 0.6 to 0.4, do."""

DOUBT = 0.1
"""Added to every share before its logarithm is taken: a sharp softmax is often sure and wrong, so
no sample is worth more than log(1.1 / 0.1) = 2.4 nats, and one outlier cannot outvote a scene."""

VOTE_US = 1_000_000
"""A sample votes in full for an interval of this length; samples that stand closer are much alike
and share the vote, so that sampling more densely changes scenes little."""

MIN_LENGTH_US = 2_000_000
"""Shortest scene between two others."""

Shares = npt.NDArray[np.float64]


def scenes_of(
    samples: Sequence[SampleResult],
    gaps: Sequence[Gap],
    labels: Sequence[str],
    *,
    switch_cost: float = SWITCH_COST,
    min_length_us: int = MIN_LENGTH_US,
) -> list[Scene]:
    """The scenes of one video, in order of time.

    Samples are in order of time; their predictions name positions in `labels`. Every sample is in
    exactly one scene, which ends with its last sample's `end_us`.
    """
    found = labelled_scenes(
        samples, gaps, labels, switch_cost=switch_cost, min_length_us=min_length_us
    )
    return [scene for _, scene in found]


def labelled_scenes(
    samples: Sequence[SampleResult],
    gaps: Sequence[Gap],
    labels: Sequence[str],
    *,
    switch_cost: float = SWITCH_COST,
    min_length_us: int = MIN_LENGTH_US,
) -> list[tuple[int, Scene]]:
    """The same, each scene with the position of its label."""
    found: list[tuple[int, Scene]] = []
    for segment in _segments(samples, gaps):
        shares = _shares(segment, len(labels))
        lengths = np.array([one.end_us - one.start_us for one in segment], dtype=np.float64)
        votes = np.minimum(lengths / VOTE_US, 1.0)[:, np.newaxis]
        evidence = votes * np.log(shares + DOUBT)
        path = _most_likely_path(evidence, switch_cost)
        for start, end, label in _runs(path, evidence, lengths, min_length_us):
            scene = _scene(segment[start:end], shares[start:end, label], label, labels[label])
            found.append((label, scene))
    return found


def _segments(samples: Sequence[SampleResult], gaps: Sequence[Gap]) -> list[Sequence[SampleResult]]:
    """Stretches of samples that no gap interrupts."""
    after_gap = {gap.end_us for gap in gaps}
    cuts = [
        at
        for at, (before, after) in enumerate(pairwise(samples), start=1)
        if before.end_us != after.start_us or after.start_us in after_gap
    ]
    edges = [0, *cuts, len(samples)]
    return [samples[start:end] for start, end in pairwise(edges) if start < end]


def _shares(samples: Sequence[SampleResult], label_count: int) -> Shares:
    """Samples x labels; what the best labels leave over is shared evenly among the others."""
    shares = np.empty((len(samples), label_count))
    for row, sample in zip(shares, samples, strict=True):
        given = sum(prediction.confidence for prediction in sample.predictions)
        others = label_count - len(sample.predictions)
        row[:] = max(1.0 - given, 0.0) / others if others else 0.0
        for prediction in sample.predictions:
            row[prediction.label] = prediction.confidence
    return shares


def _most_likely_path(evidence: Shares, switch_cost: float) -> npt.NDArray[np.intp]:
    """Label of each sample on the path of most evidence, less `switch_cost` for each change."""
    count, label_count = evidence.shape
    every = np.arange(label_count)
    came_from = np.empty((count, label_count), dtype=np.intp)
    score = evidence[0]
    for at in range(1, count):
        best = int(score.argmax())
        switched = score[best] - switch_cost
        stays = score >= switched
        came_from[at] = np.where(stays, every, best)
        score = np.where(stays, score, switched) + evidence[at]
    path = np.empty(count, dtype=np.intp)
    path[-1] = score.argmax()
    for at in range(count - 1, 0, -1):
        path[at - 1] = came_from[at, path[at]]
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


def _scene(samples: Sequence[SampleResult], shares: Shares, label: int, name: str) -> Scene:
    agreeing = sum(
        bool(sample.predictions) and sample.predictions[0].label == label for sample in samples
    )
    return Scene(
        start_us=samples[0].start_us,
        end_us=samples[-1].end_us,
        label=name,
        confidence=float(shares.mean()),
        peak=float(shares.max()),
        samples=len(samples),
        agreeing=agreeing / len(samples),
    )


def scenes(engine: Engine, job_id: int, video_id: int | None = None) -> dict[int, list[Scene]]:
    """The scenes of the job's closed videos, or of one of them, in order of time; by video."""
    query = (
        select(scene_rows, label_rows.c.name)
        .join(jobs, jobs.c.id == scene_rows.c.job_id)
        .join(
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
                row.name,
                row.confidence,
                row.peak,
                row.samples,
                row.agreeing,
            )
            found.setdefault(row.video_id, []).append(scene)
    return found
