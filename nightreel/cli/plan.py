"""`nightreel plan`: what a run would take, before anything is spent on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from nightreel.cli.options import format_option
from nightreel.cli.output import Column, duration, say, write_rows
from nightreel.cli.request import Request, request_options
from storage.exits import ExitCode

if TYPE_CHECKING:
    from scheduler.archive import Unreadable
    from storage.records import ArchiveFile, FrameRange, Sampling, VideoInfo

MIB = 1 << 20

PLAN = (
    Column("videos", "Videos", justify="right"),
    Column("hours", "Hours", lambda value: f"{value:,.2f}", "right"),
    Column("samples", "Frames", lambda value: f"{value:,}", "right"),
    Column("image_calls", "Image calls", lambda value: f"{value:,}", "right"),
    Column("text_calls", "Text calls", lambda value: f"{value:,}", "right"),
    Column("mib", "MiB to send", lambda value: f"{value:,.1f}", "right"),
    Column("time_s", "Time", duration, "right"),
    Column("credits", "Credits", lambda value: f"{value:,.4f}", "right"),
)


@click.command(
    epilog="""\b
Examples:
  nightreel plan ~/Videos
  nightreel plan archive/ --labels labels.yaml --every 2s --api http://gpu-box:9001 --rate 50
  nightreel plan archive/ --api https://serverless.roboflow.com --price-per-1000 0.2""",
)
@request_options
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Calls a second to reckon with.",
)
@click.option(
    "--price-per-1000",
    "price",
    type=click.FloatRange(0),
    default=0.2,
    show_default=True,
    help="Credits for a thousand calls; the default is the least that the hosted API bills.",
)
@format_option
def plan(request: Request, rate: float, price: float, form: str) -> int:
    """Say what classifying videos would take: frames, calls, bytes, time and cost.

    PATH is what `nightreel run` takes. The videos are indexed, and not decoded. With --api, the API
    is asked by one call whether it takes lists of pictures, as a run would ask it. What is known
    from earlier jobs is not deducted. Ends with 3 where a file cannot be read as a video.
    """
    from scheduler.estimate import estimate
    from storage.records import Fit

    sampling = request.sampling()
    served = request.served()
    labels = request.labels(served.input_size)
    rejected: list[str] = []
    videos = _videos(request.files(), sampling, rejected)
    embeds, batch = _way(request.api_url)
    found = estimate(
        videos,
        labels,
        fit=Fit(request.fit),
        embeds=embeds,
        batch=batch,
        input_size=served.input_size,
    )
    row = {
        "videos": found.videos,
        "hours": found.duration_us / 3.6e9,
        "samples": found.samples,
        "image_calls": found.image_calls,
        "text_calls": found.text_calls,
        "mib": found.bytes_sent / MIB,
        "time_s": found.seconds_at(rate),
        "credits": found.credits_at(price),
    }
    write_rows([row], PLAN, form)
    for line in rejected:
        say(line)
    return ExitCode.INCOMPLETE if rejected else ExitCode.OK


def _way(api_url: str | None) -> tuple[bool, int]:
    """Whether the API embeds, and how many pictures it takes a call; the one at home is known."""
    from workers.settings import MAX_BATCH, WorkerSettings

    if api_url is None:
        return True, MAX_BATCH
    from workers.api import ApiClient

    endpoint = ApiClient(WorkerSettings(api_url=api_url)).endpoint()
    return endpoint.embeds, endpoint.batch


def _videos(
    files: Sequence[ArchiveFile | Unreadable], sampling: Sampling, rejected: list[str]
) -> Iterator[tuple[VideoInfo, Sequence[FrameRange]]]:
    """Each video's facts and ranges, copies once; what is no video is told in `rejected`."""
    from scheduler.archive import Unreadable
    from scheduler.probing import probe_all
    from scheduler.settings import SchedulerSettings
    from storage.records import ArchiveFile, shown_path
    from workers.probing import Asked

    for file in files:
        if isinstance(file, Unreadable):
            rejected.append(f"{shown_path(os.fsencode(file.path))}: {file.reason}")
    seen: set[str | None] = set()
    for one in probe_all(
        [Asked(file, None) for file in files if isinstance(file, ArchiveFile)],
        sampling,
        SchedulerSettings().task_seconds * 1_000_000,
        processes=os.cpu_count() or 1,
        stop=threading.Event(),
    ):
        if one.info is None:
            rejected.append(f"{one.file.shown}: {one.reason}")
        elif one.content_id not in seen:
            seen.add(one.content_id)
            yield one.info, one.ranges
