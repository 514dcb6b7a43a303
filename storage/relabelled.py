"""Videos under other labels: what their stored vectors say, with nothing read or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Row

from storage.columns import Ints, SampleColumns
from storage.flags import flag_rows
from storage.ledger.closing import standing
from storage.records import FrameRange, Gap, GapKind, Label, TaskState, VideoState
from storage.scenes import SceneColumns, Shares, scenes_of_videos
from storage.scoring import Single, best_labels, similarities, similarities_and_changes
from storage.vectors import VideoVectors

NOT_EMBEDDED = "no stored embedding: its API gave similarities only"

OldRow = Row[*tuple[Any, ...]]
"""A closed video as it stands in the job that it was embedded for: its row of `job_videos`."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A video with the best of the new labels of each sample."""

    old: OldRow
    samples: SampleColumns
    changes: Shares | None
    """How much each sample's picture differs from the one before."""


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """A video as it will stand in the new job: rows, but for those of its samples."""

    row: dict[str, Any]
    task: dict[str, Any] | None
    gaps: list[Gap]
    scenes: SceneColumns
    flags: list[dict[str, Any]]

    @property
    def samples(self) -> int:
        """How many samples it has."""
        return 0 if self.task is None else int(self.task["samples"])


def scored(
    old: OldRow,
    stored: VideoVectors | None,
    *,
    matrix: Single,
    top_n: int,
    with_changes: bool,
) -> Scored:
    """The best `top_n` labels of each sample; `matrix` holds the vectors of all labels."""
    if stored is None:
        return Scored(old, _columns(np.empty((0, 4), np.int64), None, top_n), None)
    if with_changes:
        cosines, changes = similarities_and_changes(stored.vectors, matrix)
        return Scored(old, _columns(stored.times, cosines, top_n), changes)
    return Scored(old, _columns(stored.times, similarities(stored.vectors, matrix), top_n), None)


def _columns(times: Ints, scores: Single | None, top_n: int) -> SampleColumns:
    bucket, t_us, start_us, end_us = times.T
    if scores is None:
        none = np.empty((0, 1))
        return SampleColumns(bucket, t_us, start_us, end_us, none.astype(np.int64), none, none)
    label, similarity, confidence = best_labels(scores, top_n)
    return SampleColumns(
        bucket,
        t_us,
        start_us,
        end_us,
        label.astype(np.int64),
        similarity.astype(np.float64),
        confidence.astype(np.float64),
    )


def answered(
    videos: Sequence[Scored], old_gaps: dict[int, list[Gap]], named: Sequence[Label]
) -> list[Answered]:
    """What the videos show under the labels `named`, by their samples; `old_gaps` by number of
    video."""
    missing = [_missing(one, old_gaps.get(one.old.video_id, ())) for one in videos]
    found = scenes_of_videos(
        [(one.samples, gaps, one.changes) for one, gaps in zip(videos, missing, strict=True)],
        len(named),
    )
    return [
        Answered(*_standing(one, gaps), gaps, scenes, flag_rows(one.samples, named))
        for one, gaps, scenes in zip(videos, missing, found, strict=True)
    ]


def _standing(
    video: Scored, missing: Sequence[Gap]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rows of the video and of its task."""
    old = video.old
    row = {
        "video_id": old.video_id,
        "state": old.state,
        "duration_us": old.duration_us,
        "analysed_us": 0,
        "reason_kind": old.reason_kind,
        "reason": old.reason,
        "opening": 1,
    }
    if old.state == VideoState.REJECTED:
        return row, None
    gap_us = sum(gap.end_us - gap.start_us for gap in missing)
    row["analysed_us"] = old.duration_us - gap_us
    row["state"], (row["reason_kind"], row["reason"]) = standing(row["analysed_us"], missing)
    return row, _task(video.samples, old.duration_us, gap_us)


def _missing(video: Scored, old_gaps: Sequence[Gap]) -> list[Gap]:
    """Gaps over all of the video for which no sample answers: the old ones as far as they still are
    gaps, and what was analysed without being embedded."""
    missing: list[Gap] = []
    if video.old.state == VideoState.REJECTED:
        return missing
    found, duration_us = video.samples, video.old.duration_us
    ends = np.concatenate([[0], found.end_us])
    starts = np.concatenate([found.start_us, [duration_us]])
    open_us = ends < starts
    for start, end in zip(ends[open_us].tolist(), starts[open_us].tolist(), strict=True):
        at = start
        for gap in old_gaps:
            if gap.end_us <= at or gap.start_us >= end:
                continue
            if gap.start_us > at:
                missing.append(Gap(at, gap.start_us, GapKind.NOT_EMBEDDED, NOT_EMBEDDED))
                at = gap.start_us
            missing.append(Gap(at, min(gap.end_us, end), gap.kind, gap.detail))
            at = min(gap.end_us, end)
        if at < end:
            missing.append(Gap(at, end, GapKind.NOT_EMBEDDED, NOT_EMBEDDED))
    return missing


def _task(found: SampleColumns, duration_us: int, gap_us: int) -> dict[str, Any]:
    """One finished task that answers for the whole video."""
    last = int(found.bucket[-1]) + 1 if len(found) else 0
    return {
        "ordinal": 0,
        "bucket_start": 0,
        "bucket_end": last,
        "start_us": 0,
        "end_us": duration_us,
        "plan": FrameRange(0, last, 0, duration_us, None, (), ()).to_json(),
        "state": TaskState.DONE,
        "attempts": 0,
        "fence": 0,
        "not_before_ms": 0,
        "samples": len(found),
        "gap_us": gap_us,
    }
