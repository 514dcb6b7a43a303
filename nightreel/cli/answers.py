"""Commands that ask the results database: summary, scenes, coverage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import click

from nightreel.cli.asked import SECOND_US, job_asked, not_all_read, unseen, videos_asked
from nightreel.cli.numbers import NUMBER, numbered
from nightreel.cli.options import database_option, format_option, job_option
from nightreel.cli.output import Column, clock, duration, percent, write_rows
from storage.exits import ExitCode

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.ledger import Job
    from storage.summaries import VideoSummary


def _top(labels: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{one['label']} {percent(one['share'])}" for one in labels[:3])


SUMMARY = (
    NUMBER,
    Column("video", "Video"),
    Column("copies", "Copies", lambda paths: f"+{len(paths)}" if paths else "", "right"),
    Column("state", "State"),
    Column("duration_s", "Duration", duration, "right"),
    Column("analysed", "Analysed", percent, "right"),
    Column("scenes", "Scenes", justify="right"),
    Column("labels", "Top labels (share of time)", _top),
    Column("longest", "Longest scene"),
    Column("flags", "Flags", ", ".join),
    Column("reason", "Reason"),
)
SCENES = (
    NUMBER,
    Column("video", "Video"),
    Column("start_s", "Start", clock, "right"),
    Column("end_s", "End", clock, "right"),
    Column("duration_s", "Length", duration, "right"),
    Column("label", "Label"),
    Column("confidence", "Mean", lambda value: f"{value:.2f}", "right"),
    Column("peak", "Peak", lambda value: f"{value:.2f}", "right"),
    Column("samples", "Frames", justify="right"),
    Column("agreeing", "Agreeing", percent, "right"),
)
COVERAGE = (
    NUMBER,
    Column("video", "Video"),
    Column("state", "State"),
    Column("duration_s", "Duration", duration, "right"),
    Column("analysed_s", "Analysed", duration, "right"),
    Column("waiting_s", "Waiting", duration, "right"),
    Column("gaps_s", "Gaps", duration, "right"),
    Column(
        "gaps",
        "Not analysed",
        lambda gaps: "; ".join(
            f"{clock(g['start_s'])}-{clock(g['end_s'])} {g['kind']}"
            f"{': ' + g['detail'] if g['detail'] else ''}"
            for g in gaps
        ),
    ),
    Column("reason", "Reason"),
)


@click.command()
@click.argument("video", required=False)
@job_option
@database_option
@format_option
def summary(video: str | None, job_id: int | None, database_url: str, form: str) -> int:
    """One row a video: duration, how much is analysed, scenes, top labels with their share of time.

    VIDEO is a path, a file name or an id; without it all videos of the job are shown.
    """
    engine, job = job_asked(database_url, job_id)
    unread = not_all_read(engine, job)
    return write_summary(engine, job, form, videos_asked(engine, job, video), unread)


def write_summary(
    engine: Engine,
    job: Job,
    form: str,
    video_ids: Collection[int] | None = None,
    unread: Sequence[str] = (),
) -> int:
    """Print the summary of a job's videos (None: of all); return INCOMPLETE if any of them is not
    all analysed, or some are not known yet, which `unread` says."""
    from storage.records import VideoState
    from storage.summaries import summaries

    rows = [
        _summary_row(one)
        for one in summaries(engine, job.id)
        if video_ids is None or one.video_id in video_ids
    ]
    columns = [c for c in SUMMARY if form != "table" or _worth_showing(c.key, rows)]
    write_rows(rows, numbered(columns, rows, form), form, [job.notice, *unread])
    complete = not unread and all(row["state"] == VideoState.COMPLETE for row in rows)
    return ExitCode.OK if complete else ExitCode.INCOMPLETE


def _worth_showing(key: str, rows: Sequence[dict[str, Any]]) -> bool:
    """A table leaves out what makes it too wide and the columns that hold nothing; data keeps all
    its fields."""
    if key == "longest":
        return False
    return key not in ("copies", "flags", "reason", "waiting_s") or any(row[key] for row in rows)


def _summary_row(one: VideoSummary) -> dict[str, Any]:
    return {
        "video_id": one.video_id,
        "video": one.path,
        "copies": list(one.paths[1:]),
        "state": str(one.state),
        "duration_s": one.duration_us / SECOND_US if one.duration_us else None,
        "analysed": one.analysed_us / one.duration_us if one.duration_us else None,
        "scenes": one.scenes if one.duration_us else None,
        "labels": [
            {
                "label": share.label,
                "share": round(share.share, 4),
                "first_s": share.first_us / SECOND_US,
                "last_s": share.last_us / SECOND_US,
            }
            for share in one.labels
        ],
        "longest": None
        if one.longest is None
        else {
            "label": one.longest.label,
            "start_s": one.longest.start_us / SECOND_US,
            "end_s": one.longest.end_us / SECOND_US,
        },
        "flags": [flag.reason for flag in one.flags],
        "reason": one.reason,
    }


@click.command()
@click.argument("video", required=False)
@job_option
@database_option
@format_option
def scenes(video: str | None, job_id: int | None, database_url: str, form: str) -> int:
    """One row a scene: start, end, label, mean and peak confidence, samples and their agreement.

    VIDEO is a path, a file name or an id; without it the scenes of all videos are shown.
    """
    from storage.scenes import scenes as stored

    engine, job = job_asked(database_url, job_id)
    only = videos_asked(engine, job, video)
    lacking = unseen(engine, job, only)
    meant = _videos(engine, job, only)
    found = stored(engine, job.id, meant[0][1] if len(meant) == 1 else None)
    rows = [
        {
            "video_id": video_id,
            "video": path,
            "start_s": scene.start_us / SECOND_US,
            "end_s": scene.end_us / SECOND_US,
            "duration_s": (scene.end_us - scene.start_us) / SECOND_US,
            "label": scene.label,
            "confidence": round(scene.confidence, 4),
            "peak": round(scene.peak, 4),
            "samples": scene.samples,
            "agreeing": round(scene.agreeing, 4),
        }
        for path, video_id in meant
        for scene in found.get(video_id, ())
    ]
    write_rows(rows, numbered(SCENES, rows, form), form, [job.notice, *lacking])
    return ExitCode.OK


@click.command()
@click.argument("video", required=False)
@job_option
@database_option
@format_option
def coverage(video: str | None, job_id: int | None, database_url: str, form: str) -> int:
    """What was analysed and what was not, with the reason of each gap.

    Analysed and gaps add up to the duration of every video. Ends with 3 if anything is missing.
    """
    from storage.coverage import coverage as stored
    from storage.records import VideoState

    engine, job = job_asked(database_url, job_id)
    unread = not_all_read(engine, job)
    only = videos_asked(engine, job, video)
    of_video = {one.video_id: one for one in stored(engine, job.id)}
    found = [(path, of_video[video_id]) for path, video_id in _videos(engine, job, only)]
    rows = [
        {
            "video_id": one.video_id,
            "video": path,
            "state": str(one.state),
            "duration_s": one.duration_us / SECOND_US,
            "analysed_s": one.analysed_us / SECOND_US,
            "waiting_s": one.waiting_us / SECOND_US,
            "gaps_s": one.gap_us / SECOND_US,
            "gaps": [
                {
                    "start_s": gap.start_us / SECOND_US,
                    "end_s": gap.end_us / SECOND_US,
                    "kind": str(gap.kind),
                    "detail": gap.detail,
                }
                for gap in one.gaps
            ],
            "reason": one.reason or one.reason_kind,
        }
        for path, one in found
    ]
    columns = [c for c in COVERAGE if form != "table" or _worth_showing(c.key, rows)]
    write_rows(rows, numbered(columns, rows, form), form, [job.notice, *unread])
    complete = not unread and all(row["state"] == VideoState.COMPLETE for row in rows)
    return ExitCode.OK if complete else ExitCode.INCOMPLETE


def _videos(engine: Engine, job: Job, only: Collection[int] | None) -> list[tuple[str, int]]:
    """Path and id of each video of the job, or of these, in order of path."""
    from storage.summaries import places

    return sorted(
        (path, video_id)
        for video_id, path in places(engine, job.id).items()
        if only is None or video_id in only
    )
