"""`nightreel plan`: what a run would take, before anything is spent on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from nightreel.cli.options import FiniteFloat, database_option, format_option
from nightreel.cli.output import Column, duration, say, write_rows
from nightreel.cli.request import Request, request_options
from storage.exits import ExitCode

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from scheduler.archive import Unreadable
    from storage.records import ArchiveFile, FrameRange, Sampling, VideoInfo

MIB = 1 << 20

PLAN = (
    Column("videos", "Videos", justify="right"),
    Column("hours", "Hours", lambda value: f"{value:,.2f}", "right"),
    Column("samples", "Frames", lambda value: f"{value:,}", "right"),
    Column("embedded", "Already embedded", lambda value: f"{value:,}", "right"),
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
    type=FiniteFloat(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Calls a second to reckon with.",
)
@click.option(
    "--price-per-1000",
    "price",
    type=FiniteFloat(0),
    default=0.2,
    show_default=True,
    help="Credits for a thousand calls; the default is the least that the hosted API bills.",
)
@database_option
@format_option
def plan(request: Request, rate: float, price: float, database_url: str, form: str) -> int:
    """Say what classifying videos would take: frames, calls, bytes, time and cost.

    PATH is what `nightreel run` takes. The videos are indexed, and not decoded. With --api, the API
    is asked by one call whether it takes lists of pictures, as a run would ask it. Frames whose
    embeddings the results database holds from earlier jobs cost nothing again. Ends with 3 where a
    file cannot be read as a video.
    """
    from scheduler.estimate import Planned, estimate
    from storage.embedded import embedded_ranges, has_label_vectors
    from storage.records import Fit
    from workers.calls import labels_key

    sampling = request.sampling()
    served = request.served()
    labels = request.labels(served.input_size)
    rejected: list[str] = []
    embeds, batch = _way(request.api_url)
    results, fit = _results(database_url), Fit(request.fit)

    def planned() -> Iterator[Planned]:
        for content_id, info, ranges in _videos(request.files(), sampling, rejected):
            stored = [False] * len(ranges)
            if results is not None and embeds:
                key = content_id, sampling, fit, served.model
                stored = embedded_ranges(results, *key, ranges)
            yield Planned(info, ranges, stored)

    asked_of = labels_key(served.model, embeds=embeds)
    found = estimate(
        planned(),
        labels,
        labels_known=results is not None and has_label_vectors(results, labels.digest, asked_of),
        fit=fit,
        embeds=embeds,
        batch=batch,
        input_size=served.input_size,
    )
    row = {
        "videos": found.videos,
        "hours": found.duration_us / 3.6e9,
        "samples": found.samples,
        "embedded": found.embedded,
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


def _results(database_url: str) -> Engine | None:
    """The results database; None where no run has made one of this release's tables yet."""
    from storage import database

    engine = database.connect(database_url)
    click.get_current_context().call_on_close(engine.dispose)
    try:
        database.check(engine)
    except database.SchemaOutdated:
        return None
    return engine


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
) -> Iterator[tuple[str, VideoInfo, Sequence[FrameRange]]]:
    """Each video's content, facts and ranges, copies once; what is no video is told in
    `rejected`."""
    from scheduler.archive import Unreadable
    from scheduler.probing import probe_all
    from scheduler.settings import SchedulerSettings
    from storage.records import ArchiveFile, shown_path
    from workers.probing import Asked

    for file in files:
        if isinstance(file, Unreadable):
            rejected.append(f"{shown_path(os.fsencode(file.path))}: {file.reason}")
    seen: set[str] = set()
    for one in probe_all(
        [Asked(file, None) for file in files if isinstance(file, ArchiveFile)],
        sampling,
        SchedulerSettings().task_seconds * 1_000_000,
        processes=os.cpu_count() or 1,
        stop=threading.Event(),
    ):
        if one.info is None or one.content_id is None:
            rejected.append(f"{one.file.shown}: {one.reason}")
        elif one.content_id not in seen:
            seen.add(one.content_id)
            yield one.content_id, one.info, one.ranges
