"""`nightreel plan`: what a run would take, before anything is spent on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    from workers.contract import Body

MIB = 1 << 20

PLAN = (
    Column("videos", "Videos", justify="right"),
    Column("hours", "Hours", lambda value: f"{value:,.2f}", "right"),
    Column("samples", "Frames", lambda value: f"{value:,}", "right"),
    Column("embedded", "Already embedded", lambda value: f"{value:,}", "right"),
    Column("image_calls", "Image calls", lambda value: f"{value:,}", "right"),
    Column("text_calls", "Text calls", lambda value: f"{value:,}", "right"),
    Column("mib", "MiB to send", lambda value: "" if value is None else f"{value:,.1f}", "right"),
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
    type=FiniteFloat(0.001, 1_000_000),
    default=20.0,
    show_default=True,
    help="Calls a second to reckon with.",
)
@click.option(
    "--price-per-1000",
    "price",
    type=FiniteFloat(0, 1_000_000),
    default=0.2,
    show_default=True,
    help="Credits for a thousand calls; the default is the least that the hosted API bills.",
)
@database_option
@format_option
def plan(request: Request, rate: float, price: float, database_url: str, form: str) -> int:
    """Say what classifying videos would take: frames, calls, bytes, time and cost.

    PATH is what `nightreel run` takes. The videos are indexed; some of their frames, or all where
    there are few, are decoded, half a minute long at most, to know what pictures of them weigh.
    With --api, the API is asked by one call whether it takes lists of pictures, as a run would ask
    it. Prompts that may be too long for the API are asked about. Frames whose embeddings the
    results database holds from earlier jobs cost nothing again. Ends with 3 where a file cannot be
    read as a video.
    """
    from scheduler.estimate import Planned, estimate
    from scheduler.weighing import Weighing
    from storage.embedded import embedded_ranges, has_label_vectors
    from storage.records import Fit
    from workers.calls import labels_key

    sampling = request.sampling()
    served = request.served()
    labels = request.labels(served.input_size)
    request.check_labels(labels)
    rejected: list[str] = []
    asked = _ask(request.api_url, served.input_size)
    results, fit = _results(database_url), Fit(request.fit)

    def planned() -> Iterator[Planned]:
        for path, content_id, info, ranges in _videos(request.files(), sampling, rejected):
            stored = [False] * len(ranges)
            if results is not None and asked.embeds:
                key = content_id, sampling, fit, served.model
                stored = embedded_ranges(results, *key, ranges)
            yield Planned(path, info, ranges, stored)

    of_labels = labels_key(served.model, embeds=asked.embeds)
    weighing = Weighing()
    found = estimate(
        weighing.watch(planned()),
        labels,
        labels_known=results is not None and has_label_vectors(results, labels.digest, of_labels),
        fit=fit,
        embeds=asked.embeds,
        batch=asked.batch,
        weight=asked.weight,
        asking_bytes=asked.asking_bytes,
    )
    weighed = weighing.weigh(sampling, served.input_size, fit, processes=os.cpu_count() or 1)
    sent = 0.0 if not found.frames_sent else None if weighed is None else weighed.mean
    row = {
        "videos": found.videos,
        "hours": found.duration_us / 3.6e9,
        "samples": found.samples,
        "embedded": found.embedded,
        "image_calls": found.image_calls,
        "text_calls": found.text_calls,
        "mib": None if sent is None else found.bytes_at(sent) / MIB,
        "time_s": found.seconds_at(rate),
        "credits": found.credits_at(price),
    }
    write_rows([row], PLAN, form)
    for line in rejected:
        say(line)
    if sent is None:
        say("what there is to send is not known: no frame could be decoded in time")
    elif weighed is not None and weighed.frames < weighed.of:
        say(
            f"the MiB are reckoned from {weighed.frames:,} of {weighed.of:,} frames: "
            f"within about {weighed.error:.1%}".replace("%", " %")
        )
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


@dataclass(frozen=True, slots=True)
class _Asked:
    """The API, as far as its price goes."""

    embeds: bool
    batch: int
    weight: Callable[[Body], int]
    """Bytes that a request counts for."""
    asking_bytes: int
    """What a job sends to find the two out; 0 where the way is set."""


def _ask(api_url: str | None, input_size: int) -> _Asked:
    """Ask whether the API embeds, and how many pictures it takes a call; the one at home is
    known."""
    from workers.api import ApiClient
    from workers.contract import pictures_body
    from workers.endpoint import asking_pictures
    from workers.settings import MAX_BATCH, WorkerSettings

    settings = WorkerSettings() if api_url is None else WorkerSettings(api_url=api_url)
    client = ApiClient(settings)
    weight, set_way = client.wire.weight, settings.api_way == "compare"
    asking = 0 if set_way else weight(pictures_body(asking_pictures(input_size)))
    if api_url is None:
        return _Asked(not set_way, 1 if set_way else MAX_BATCH, weight, asking)
    endpoint = client.endpoint()
    return _Asked(endpoint.embeds, endpoint.batch, weight, asking)


def _videos(
    files: Sequence[ArchiveFile | Unreadable], sampling: Sampling, rejected: list[str]
) -> Iterator[tuple[str, str, VideoInfo, Sequence[FrameRange]]]:
    """Each video's path, content, facts and ranges, copies once; what is no video is told in
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
            # Most reasons begin with the path.
            name = f"{one.file.shown}: "
            rejected.append(name + one.reason.removeprefix(name))
        elif one.content_id not in seen:
            seen.add(one.content_id)
            yield one.file.path, one.content_id, one.info, one.ranges
