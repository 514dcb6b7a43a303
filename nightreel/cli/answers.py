"""Commands that ask the results database: summary, scenes, coverage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import click

from nightreel.cli.options import database_option, format_option, job_option
from nightreel.cli.output import Column, clock, duration, percent, write_rows
from storage.exits import ExitCode

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from scheduler.submit import Submitted
    from storage.summaries import VideoSummary

SECOND_US = 1e6


def _top(labels: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{one['label']} {percent(one['share'])}" for one in labels[:3])


SUMMARY = (
    Column("video", "Video"),
    Column("state", "State"),
    Column("duration_s", "Duration", duration, "right"),
    Column("analysed", "Analysed", percent, "right"),
    Column("scenes", "Scenes", justify="right"),
    Column("labels", "Top labels (share of time)", _top),
    Column("flags", "Flags", ", ".join),
    Column("reason", "Reason"),
)
SCENES = (
    Column("video", "Video"),
    Column("start_s", "Start", clock, "right"),
    Column("end_s", "End", clock, "right"),
    Column("duration_s", "Length", duration, "right"),
    Column("label", "Label"),
    Column("confidence", "Confidence", lambda value: f"{value:.2f}", "right"),
    Column("peak", "Peak", lambda value: f"{value:.2f}", "right"),
    Column("samples", "Samples", justify="right"),
    Column("agreeing", "Agreeing", percent, "right"),
)
COVERAGE = (
    Column("video", "Video"),
    Column("state", "State"),
    Column("duration_s", "Duration", duration, "right"),
    Column("analysed_s", "Analysed", duration, "right"),
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
    engine, job = _job(database_url, job_id)
    return write_summary(engine, job, form, _only(engine, job, video))


def write_summary(
    engine: Engine,
    job_id: int,
    form: str,
    video_ids: Collection[int] | None = None,
    unreadable: Collection[Submitted] = (),
) -> int:
    """Print the summary of a job's videos (all of them for None), then of files that could not be
    looked at; return INCOMPLETE if any of these is not all analysed."""
    from storage import ledger, summaries  # noqa: PLC0415
    from storage.records import VideoState, shown_path  # noqa: PLC0415

    rows = [_summary_row(one) for one in summaries.summary(engine, job_id, video_ids)]
    for one in unreadable:
        empty = {"video_id": None, "duration_s": None, "analysed": None, "scenes": None}
        name = shown_path(one.file.path.encode("utf-8", "surrogateescape"))
        rejected = str(VideoState.REJECTED)
        rows.append(
            {"video": name, "state": rejected, "labels": [], "flags": [], "reason": one.reason}
            | empty
        )
    columns = [c for c in SUMMARY if form != "table" or _worth_showing(c.key, rows)]
    write_rows(rows, columns, form, [ledger.job(engine, job_id).notice])
    complete = all(row["state"] == VideoState.COMPLETE for row in rows)
    return ExitCode.OK if complete else ExitCode.INCOMPLETE


def _worth_showing(key: str, rows: Sequence[dict[str, Any]]) -> bool:
    """A table leaves out the columns that hold nothing; data keeps all its fields."""
    return key not in ("flags", "reason") or any(row[key] for row in rows)


def _summary_row(one: VideoSummary) -> dict[str, Any]:
    return {
        "video_id": one.video_id,
        "video": one.path,
        "state": str(one.state),
        "duration_s": _seconds(one.duration_us),
        "analysed": one.analysed_us / one.duration_us if one.duration_us else None,
        "scenes": one.scenes if one.duration_us else None,
        "labels": [{"label": share.label, "share": round(share.share, 4)} for share in one.labels],
        "flags": list(one.flags),
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
    from storage import ledger  # noqa: PLC0415
    from storage import scenes as stored  # noqa: PLC0415

    engine, job = _job(database_url, job_id)
    rows = [
        {
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
        for path, scene in stored.scenes(engine, job, _only(engine, job, video))
    ]
    write_rows(rows, SCENES, form, [ledger.job(engine, job).notice])
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
    from storage import coverage as stored  # noqa: PLC0415
    from storage.records import VideoState  # noqa: PLC0415

    engine, job = _job(database_url, job_id)
    found = stored.coverage(engine, job, _only(engine, job, video))
    rows = [
        {
            "video": one.path,
            "state": str(one.state),
            "duration_s": _seconds(one.duration_us),
            "analysed_s": _seconds(one.analysed_us),
            "gaps_s": _seconds(one.gap_us),
            "gaps": [
                {
                    "start_s": gap.start_us / SECOND_US,
                    "end_s": gap.end_us / SECOND_US,
                    "kind": str(gap.kind),
                    "detail": gap.detail,
                }
                for gap in one.gaps
            ],
            "reason": one.reason,
        }
        for one in found
    ]
    columns = [c for c in COVERAGE if form != "table" or c.key == "gaps" or _worth_showing(c.key, rows)]
    write_rows(rows, columns, form)
    complete = all(row["state"] == VideoState.COMPLETE for row in rows)
    return ExitCode.OK if complete else ExitCode.INCOMPLETE


def _seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / SECOND_US


def _job(database_url: str, job_id: int | None) -> tuple[Engine, int]:
    from storage import database, ledger  # noqa: PLC0415

    engine = database.connect(database_url)
    database.check(engine)
    return engine, ledger.job(engine, job_id).id


def _only(engine: Engine, job_id: int, video: str | None) -> list[int] | None:
    """The videos that a person's word means; None means all."""
    from storage import summaries  # noqa: PLC0415

    return None if video is None else summaries.find_videos(engine, job_id, video)
