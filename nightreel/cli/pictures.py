"""Commands that open a video again: annotate, sheet."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import job_asked, microseconds, one_video, unseen
from nightreel.cli.extras import needs
from nightreel.cli.options import FiniteFloat, database_option, job_option
from nightreel.cli.originals import original_of, spare_originals
from nightreel.cli.output import counted, say
from storage.exits import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

    from nightreel.reports.drawing import Told
    from storage.ledger import Job
    from storage.records import VideoInfo

_NAMED = 10
"""Missing characters that are named at most."""
out_option = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File to write.",
)


@click.command(
    epilog="""\b
Examples:
  nightreel annotate match.mp4 -o labelled.mp4
  nightreel annotate match.mp4 -o goal.mp4 --range 0:12:00-0:13:30 --scale 0.5"""
)
@click.argument("video")
@out_option
@click.option("--range", "span", metavar="FROM-TO", help="Only this part: 0:12:00-0:13:30.")
@click.option(
    "--scale",
    type=FiniteFloat(0, 4, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the picture, of the video's own.",
)
@job_option
@database_option
def annotate(  # noqa: PLR0917 - one parameter an option
    video: str,
    output: Path,
    span: str | None,
    scale: float,
    job_id: int | None,
    database_url: str,
) -> int:
    """Write VIDEO with the label and confidence of the moment on every frame, and a strip of its
    scenes along the bottom. Frames keep their times; sound, chapters and such subtitles as the
    output can hold are kept. Writes H.264 into .mp4, .m4v, .mov or .mkv.
    """
    needs("matplotlib")
    from nightreel.interrupts import terminated_as_interrupted
    from nightreel.progress import bar
    from nightreel.reports.annotate import annotate as drawn
    from workers.footage.rejection import FootageError

    engine, job = job_asked(database_url, job_id)
    spare_originals(engine, output)
    path, info, told = _opened(engine, job, video)
    start_us, end_us = _span(span, info.duration_us)
    try:
        with terminated_as_interrupted(), bar("annotating") as show:
            length_us = (end_us or info.duration_us) - start_us
            frames = drawn(
                path,
                info,
                told,
                output,
                start_us,
                end_us,
                Fraction(scale).limit_denominator(1000),
                lambda t_us: show(t_us - start_us, length_us),
                lambda what: say(f"left out: {what}"),
            )
    except FootageError as error:
        raise click.UsageError(str(error)) from None
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    except OSError as error:
        raise click.UsageError(f"{output} cannot be written ({error.strerror}).") from None
    say(f"{output}: {counted(frames, 'frame')}")
    _say_notes(job, told.labels)
    return ExitCode.OK


@click.command(
    epilog="""\b
Examples:
  nightreel sheet match.mp4 -o match.jpg
  nightreel sheet match.mp4 -o match.png --top 24"""
)
@click.argument("video")
@out_option
@click.option(
    "--top",
    "most",
    type=click.IntRange(1, 1000),
    default=60,
    show_default=True,
    help="Most scenes shown; the longest are.",
)
@job_option
@database_option
def sheet(video: str, output: Path, most: int, job_id: int | None, database_url: str) -> int:
    """Write a contact sheet of VIDEO: a picture of each scene, its label, its times. The ending
    of the file, .jpg or .png, names the format."""
    needs("matplotlib")
    from nightreel.reports.sheet import contact_sheet
    from storage.whole_files import whole
    from workers.footage.rejection import FootageError

    if output.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise click.UsageError(f"{output}: name a file that ends with .jpg or .png.")
    engine, job = job_asked(database_url, job_id)
    spare_originals(engine, output)
    path, info, told = _opened(engine, job, video)
    if not told.scenes:
        raise click.UsageError(f"{video}: it has no scenes; see `nightreel coverage {video}`.")
    title = f"{Path(path).name.encode('utf-8', 'backslashreplace').decode()}  -  {job.name}"
    file, form = BytesIO(), "PNG" if output.suffix.lower() == ".png" else "JPEG"
    try:
        contact_sheet(path, info, told, title, most=most).save(file, form, quality=90)
        with whole(output) as part:
            part.write_bytes(file.getbuffer())
    except FootageError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.UsageError(f"{output} cannot be written ({error.strerror}).") from None
    say(f"{output}: {min(most, len(told.scenes))} of {counted(len(told.scenes), 'scene')}")
    _say_notes(job, [title, *told.labels])
    return ExitCode.OK


def _say_notes(job: Job, drawn: Sequence[str]) -> None:
    """The engine's notice, and which characters of what was drawn cannot be read."""
    from nightreel.reports.lettering import boxed

    if job.notice:
        say(f"note: {job.notice}")
    missing = boxed(drawn)
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        say(f"note: the font lacks {' '.join(missing[:_NAMED])}{more}: boxes are drawn for them")


def _opened(engine: Engine, job: Job, video: str) -> tuple[str, VideoInfo, Told]:
    """The video's file, what probing found, and what the job says of it; what it has not seen is
    told at once."""
    from nightreel.reports.drawing import Told
    from storage.columns import columns_in
    from storage.database import reading
    from storage.footage import footage_of
    from storage.labels import labels_in
    from storage.results import gaps_in
    from storage.scenes import UNKNOWN, scenes

    video_id = one_video(engine, job, video)
    footage = footage_of(engine, video_id)
    if footage.info is None:
        raise click.UsageError(f"{video}: it was rejected; see `nightreel coverage {video}`.")
    for lacking in unseen(engine, job, [video_id]):
        say(f"note: {lacking}")
    with reading(engine) as connection:
        labels = [label.name for label in labels_in(connection, job.id)]
        samples = columns_in(connection, job.id, video_id)
        gaps = gaps_in(connection, job.id, video_id)
    position = {name: at for at, name in enumerate(labels)}
    found = scenes(engine, job.id, video_id).get(video_id, [])
    path = original_of(footage)
    placed = [(position.get(one.label, UNKNOWN), one) for one in found]
    duration_us = footage.info.duration_us
    return path, footage.info, Told(samples, placed, gaps, labels, duration_us, job.notice)


def _span(text: str | None, duration_us: int) -> tuple[int, int | None]:
    """Start and end of a range in microseconds. Raises UsageError."""
    if text is None:
        return 0, None
    start, dash, end = text.partition("-")
    if not dash:
        raise click.UsageError(f"--range {text!r}: write FROM-TO, such as 0:12:00-0:13:30.")
    start_us = microseconds(start) if start.strip() else 0
    end_us = microseconds(end) if end.strip() else None
    if start_us >= (duration_us if end_us is None else min(end_us, duration_us)):
        raise click.UsageError(
            f"--range {text!r} holds nothing of a video of {duration_us / 1e6:.3f} s."
        )
    return start_us, end_us
