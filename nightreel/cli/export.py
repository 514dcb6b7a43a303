"""`nightreel export`: tables for other tools, timelines for editors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import job_asked, one_video, unseen, videos_asked
from nightreel.cli.extras import needs
from nightreel.cli.options import database_option, job_option
from nightreel.cli.originals import spare_originals
from nightreel.cli.output import counted, say, to_standard_output
from storage.exits import ExitCode

if TYPE_CHECKING:
    from storage.ledger import Job

KINDS = ("samples", "predictions", "scenes", "summaries", "flags")
TABLE_ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TIMELINE_ENDINGS = {
    ".vtt": "vtt",
    ".ffmetadata": "ffmetadata",
    ".ffmeta": "ffmetadata",
    ".edl": "edl",
    ".otio": "otio",
}
out_option = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; its ending names the format.  [default: standard output]",
)


@click.group()
def export() -> None:
    """Write tables of a job for other tools, and scenes of a video for editors and players."""


@export.command(
    epilog="""\b
Examples:
  nightreel export table scenes -o scenes.csv
  nightreel export table predictions -o predictions.parquet
  nightreel export table samples match.mp4 --as jsonl | head"""
)
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("video", required=False)
@out_option
@click.option(
    "--as", "form", type=click.Choice(["csv", "jsonl", "parquet"]), help="Format, if not by ending."
)
@job_option
@database_option
def table(  # noqa: PLR0917 - one parameter an option
    kind: str,
    video: str | None,
    output: Path | None,
    form: str | None,
    job_id: int | None,
    database_url: str,
) -> int:
    """All rows of one kind, of all videos or of VIDEO, as the database's views hold them."""
    from nightreel.interrupts import terminated_as_interrupted
    from storage.export import Format, Kind, export_file, export_rows
    from storage.flags import watches

    chosen = Format(_chosen(form, output, TABLE_ENDINGS))
    if chosen is Format.PARQUET:
        needs("pyarrow")
        if output is None:
            raise click.UsageError("Parquet is a file: name it with -o FILE.parquet.")
    engine, job = job_asked(database_url, job_id)
    if output is not None:
        spare_originals(engine, output)
    only = videos_asked(engine, job, video)
    lacking = unseen(engine, job, only)
    if Kind(kind) is Kind.FLAGS and not watches(engine, job.id):
        lacking.append(f"job {job.id} has no label with a `threshold`: it cannot flag anything")
    if output is None:
        with to_standard_output():
            export_rows(engine, job.id, Kind(kind), sys.stdout, chosen, video_ids=only)
    else:
        try:
            with terminated_as_interrupted():
                count = export_file(engine, job, Kind(kind), output, chosen, video_ids=only)
        except OSError as error:
            raise _unwritable(output, error) from None
        say(f"{output}: {counted(count, 'row')}")
    _say_notes(job, lacking)
    return ExitCode.OK


@export.command(
    epilog="""\b
Examples:
  nightreel export timeline match.mp4 -o match.vtt
  nightreel export timeline match.mp4 -o match.otio
  nightreel export timeline match.mp4 --as ffmetadata > chapters.txt
  ffmpeg -i match.mp4 -i chapters.txt -map_metadata 1 -codec copy chaptered.mp4"""
)
@click.argument("video")
@out_option
@click.option(
    "--as",
    "form",
    type=click.Choice(["vtt", "ffmetadata", "edl", "otio"]),
    help="Format, if not by ending: WebVTT, FFmpeg chapters, CMX 3600, OpenTimelineIO.",
)
@job_option
@database_option
def timeline(
    video: str, output: Path | None, form: str | None, job_id: int | None, database_url: str
) -> int:
    """The scenes of VIDEO as subtitles, chapters, an edit decision list or a timeline."""
    from storage.export import about
    from storage.footage import footage_of
    from storage.scenes import scenes
    from storage.timelines import TimelineFormat, edl, ffmetadata, otio, webvtt
    from storage.whole_files import whole

    chosen = TimelineFormat(_chosen(form, output, TIMELINE_ENDINGS))
    engine, job = job_asked(database_url, job_id)
    if output is not None:
        spare_originals(engine, output)
    video_id = one_video(engine, job, video)
    lacking = unseen(engine, job, [video_id])
    found = scenes(engine, job.id, video_id).get(video_id, [])
    footage = footage_of(engine, video_id)
    rate = None if footage.info is None else footage.info.frame_rate
    match chosen:
        case TimelineFormat.WEBVTT:
            text = webvtt(found)
        case TimelineFormat.FFMETADATA:
            text = ffmetadata(found, footage.name)
        case TimelineFormat.EDL:
            try:
                text = edl(found, footage.name, rate)
            except ValueError as error:
                raise click.UsageError(f"{video}: {error}, such as .otio.") from None
        case TimelineFormat.OTIO:
            needs("opentimelineio")
            text = otio(
                found,
                footage.path_raw,
                0 if footage.info is None else footage.info.duration_us,
                rate,
                **about(engine, job),
            )
    if output is None:
        with to_standard_output():
            sys.stdout.write(text)
    else:
        try:
            with whole(output) as part:
                part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _unwritable(output, error) from None
        say(f"{output}: {counted(len(found), 'scene')}")
    _say_notes(job, lacking)
    return ExitCode.OK


def _say_notes(job: Job, lacking: Sequence[str]) -> None:
    for note in (job.notice, *lacking):
        if note:
            say(f"note: {note}")


def _chosen(form: str | None, output: Path | None, endings: dict[str, str]) -> str:
    if form is not None:
        return form
    known = ", ".join(sorted(endings))
    if output is None:
        raise click.UsageError(f"name a file with -o (its ending one of {known}), or give --as.")
    if output.suffix.lower() not in endings:
        raise click.UsageError(f"{output}: no format ends so; use one of {known}, or give --as.")
    return endings[output.suffix.lower()]


def _unwritable(path: Path, error: OSError) -> click.UsageError:
    return click.UsageError(f"{path} cannot be written ({error.strerror or error}).")
