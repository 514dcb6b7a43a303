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
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, select

from storage.columns import Curves, Ints, SampleColumns
from storage.database import reading
from storage.records import Gap, SampleResult, Scene
from storage.schema import jobs
from storage.schema import labels as label_rows
from storage.schema import scenes as scene_rows
from storage.scoring import Single

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
Path = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class SceneColumns:
    """Scenes of one video in order of time, as `records.Scene` describes them."""

    start_us: Ints
    end_us: Ints
    label: Ints
    """Position of the label, or UNKNOWN."""
    confidence: Shares
    peak: Shares
    samples: Ints
    agreeing: Shares

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The columns as the table has them."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


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
    """The same, each scene with the position of its label, or UNKNOWN; `changes` as in
    `scenes_of_videos`."""
    (found,) = scenes_of_videos(
        [(samples.curves(len(labels)), gaps, changes)],
        stickiness_us=stickiness_us,
        min_length_us=min_length_us,
        margin=margin,
    )
    return [
        (label, Scene(start_us, end_us, _name(label, labels), *described))
        for start_us, end_us, label, *described in zip(
            *(column.tolist() for column in found.columns().values()), strict=True
        )
    ]


def _name(label: int, names: Sequence[str]) -> str:
    return UNKNOWN_NAME if label == UNKNOWN else names[label]


def scenes_of_videos(
    videos: Sequence[tuple[Curves, Sequence[Gap], Shares | None]],
    *,
    stickiness_us: int = STICKINESS_US,
    min_length_us: int = MIN_LENGTH_US,
    margin: float = MARGIN,
) -> list[SceneColumns]:
    """The scenes of each of many videos under the same labels, which takes a fraction of the time
    that one by one does.

    Each comes with its gaps, and with how much the picture of each sample differs from the one
    before, in any unit (`scoring.picture_changes`); without that, boundaries stay where the labels
    put them.
    """
    all_shares = [samples.shares() for samples, _, _ in videos]
    evidence = [
        _evidence(shares, samples.end_us - samples.start_us, margin).T
        for shares, (samples, _, _) in zip(all_shares, videos, strict=True)
    ]
    parts = [
        (video, slice(start, end))
        for video, (samples, gaps, _) in enumerate(videos)
        for start, end in _segments(samples, gaps)
    ]
    # A label that comes and goes changes it twice.
    switch_cost = stickiness_us / VOTE_US * SURE / 2
    paths = _most_likely_paths([evidence[video][here] for video, here in parts], switch_cost)
    found: list[list[tuple[int, int]]] = [[] for _ in videos]
    for (video, here), path in zip(parts, paths, strict=True):
        samples, _, changes = videos[video]
        lengths = (samples.end_us[here] - samples.start_us[here]).astype(np.float64)
        runs = _runs(path, evidence[video][here], lengths, min_length_us)
        if changes is not None:
            runs = _at_cuts(runs, changes[here])
        found[video] += [
            (here.start + start, state if state < len(all_shares[video]) else UNKNOWN)
            for start, _, state in runs
        ]
    return [
        _described(samples, shares, begun)
        for (samples, _, _), shares, begun in zip(videos, all_shares, found, strict=True)
    ]


def _segments(samples: Curves, gaps: Sequence[Gap]) -> list[tuple[int, int]]:
    """Stretches [start, end) of samples that no gap interrupts."""
    after_gap = np.isin(samples.start_us[1:], [gap.end_us for gap in gaps])
    cuts = np.flatnonzero((samples.end_us[:-1] != samples.start_us[1:]) | after_gap) + 1
    edges = [0, *cuts.tolist(), len(samples)]
    return [(start, end) for start, end in pairwise(edges) if start < end]


def _evidence(shares: Single, lengths_us: Ints, margin: float) -> Single:
    """Nats that each sample gives to each label and, last, to "unknown": that one has as much as
    the second best label and the margin together, so it beats a best label that leads by less.
    Labels x samples, as the shares are."""
    best = second = np.full(shares.shape[1], -np.inf, dtype=np.float32)
    for share in shares:
        best, second = np.maximum(best, share), np.maximum(second, np.minimum(best, share))
    states = np.vstack([shares, second + np.float32(margin)]) if len(shares) > 1 else shares
    votes = np.minimum(lengths_us / VOTE_US, 1.0).astype(np.float32)
    return np.asarray(votes * np.log(states + np.float32(DOUBT)))


def _at_cuts(runs: Sequence[tuple[int, int, int]], changes: Shares) -> list[tuple[int, int, int]]:
    """The same runs, each boundary moved to the sample beside it that begins a new shot."""
    edges = np.array([start for start, _, _ in runs] + [runs[-1][1]])
    inner = edges[1:-1]
    beside = np.maximum(changes[inner - 1], changes[np.minimum(inner + 1, len(changes) - 1)])
    for at in (np.flatnonzero(beside > CUT * changes[inner]) + 1).tolist():
        near = range(max(edges[at] - 1, edges[at - 1] + 1), min(edges[at] + 2, edges[at + 1]))
        best = max(near, key=changes.__getitem__)
        if changes[best] > CUT * changes[edges[at]]:
            edges[at] = best
    return [
        (start, end, run[2])
        for (start, end), run in zip(pairwise(edges.tolist()), runs, strict=True)
    ]


def _most_likely_paths(evidence: Sequence[Shares | Single], switch_cost: float) -> list[Path]:
    """Label of each sample on the path of most evidence, less `switch_cost` for each change; of
    each stretch of samples."""
    found: dict[int, Path] = {}
    for group in _alike_long([len(one) for one in evidence]):
        paths = _paths([evidence[at] for at in group], switch_cost)
        found.update(zip(group, paths, strict=True))
    return [found[at] for at in range(len(evidence))]


def _alike_long(lengths: Sequence[int]) -> list[list[int]]:
    """Positions of stretches, the longest first, in groups that fill at least half of a rectangle
    each."""
    groups: list[list[int]] = []
    filled = 0
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        filled += lengths[at]
        if groups and 2 * filled >= lengths[groups[-1][0]] * (len(groups[-1]) + 1):
            groups[-1].append(at)
        else:
            groups.append([at])
            filled = lengths[at]
    return groups


def _paths(evidence: Sequence[Shares | Single], switch_cost: float) -> list[Path]:
    """The paths of stretches, the longest of which comes first. A step in time is one for all of
    them, since in Python it costs little more than for one."""
    longest, labels = evidence[0].shape
    # What one instruction works on stands side by side: the stretches.
    scores = np.zeros((longest, labels, len(evidence)))
    for place, one in enumerate(evidence):
        scores[: len(one), :, place] = one
    from_best = np.empty((longest, len(evidence)))
    before: Shares | None = None
    for score, best in zip(scores, from_best, strict=True):
        if before is not None:
            # Whoever comes from another label comes from the best one.
            np.add(score, before, out=score)
        np.subtract(np.maximum.reduce(score), switch_cost, out=best)
        before = np.maximum(score, best)
    leaving = scores < from_best[:, np.newaxis]
    return [
        _path(scores[: len(one), :, place], leaving[: len(one), :, place])
        for place, one in enumerate(evidence)
    ]


def _path(scores: Shares, leaving: npt.NDArray[np.bool_]) -> Path:
    """The path to the end's best label; samples x labels, and whether the best path that goes on
    with a label comes to it anew after that sample."""
    path = np.empty(len(scores), dtype=np.intp)
    left: dict[int, Path] = {}
    end = len(scores)
    while end:
        label = int(scores[end - 1].argmax())
        if label not in left:
            left[label] = leaving[:, label].nonzero()[0]
        before = int(left[label].searchsorted(end - 1))
        start = int(left[label][before - 1]) + 1 if before else 0
        path[start:end] = label
        end = start
    return path


def _runs(
    path: Path, evidence: Single, lengths: Shares, min_length_us: int
) -> list[tuple[int, int, int]]:
    """Runs [start, end) of one label; too short ones joined to a neighbour, the shortest first."""
    edges = [0, *(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
    runs = [(start, end, int(path[start])) for start, end in pairwise(edges)]
    while len(runs) > 1:
        spans = np.add.reduceat(lengths, [start for start, _, _ in runs])
        at = int(spans.argmin())
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


def _described(samples: Curves, shares: Single, begun: Sequence[tuple[int, int]]) -> SceneColumns:
    """The scenes of a video, which hold all its samples, by the first sample and label of each."""
    if not begun:
        none = np.empty(0)
        return SceneColumns(*(none.astype(kind) for kind in "qqqddqd"))
    starts, labels = np.array(begun, dtype=np.int64).reshape(-1, 2).T
    counts = np.diff(starts, append=len(samples))
    of_sample = np.repeat(labels, counts)
    unknown = of_sample == UNKNOWN
    # Of an unknown one is told how sure the best label was, which was not enough.
    told = of_sample.copy()
    told[unknown] = shares[:, unknown].argmax(axis=0)
    share = shares[told, np.arange(len(samples))].astype(np.float64)
    agreeing = (samples.best == of_sample) & ~unknown
    return SceneColumns(
        samples.start_us[starts],
        samples.end_us[starts + counts - 1],
        labels,
        np.add.reduceat(share, starts) / counts,
        np.maximum.reduceat(share, starts),
        counts,
        np.add.reduceat(agreeing, starts, dtype=np.int64) / counts,
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
