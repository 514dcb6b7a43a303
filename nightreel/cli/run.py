"""`nightreel run`: the whole job on one machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nightreel.cli.options import Duration, Rate, database_option, format_option

if TYPE_CHECKING:
    from storage.records import Fit, JobSpec, LabelSet, Sampling


@click.command(
    epilog="""\b
Examples:
  nightreel run ~/Videos
  nightreel run a.mp4 b.mkv --label "construction site" --label "open field" --every 2s
  nightreel run archive/ --labels labels.yaml --db postgresql://me@db/nightreel
  find /archive -name '*.mp4' -print0 | nightreel run -

The same command resumes what was interrupted and adds new and changed files only.""",
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--label", "label_texts", multiple=True, metavar="TEXT", help="A label; repeat it.")
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    help="YAML file of labels: prompts, example pictures, thresholds, flags.",
)
@click.option("--fps", type=Rate(), help="Samples a second: 1, 0.5, 1/5.  [default: 1]")
@click.option("--every", type=Duration(), help="Time between samples: 2s, 500ms, 1min.")
@click.option("--keyframes", is_flag=True, help="Every keyframe and nothing else (fastest).")
@click.option("--all-frames", is_flag=True, help="Every frame (slowest).")
@click.option(
    "--exact",
    is_flag=True,
    help="Take the first frame of each interval, where otherwise its keyframe serves (slower).",
)
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "squash"]),
    default="crop",
    show_default=True,
    help="How a frame becomes the model's square: crop as the API does; pad or squash see all.",
)
@click.option(
    "--top",
    "top_n",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Labels kept for each frame, best first.",
)
@database_option
@click.option(
    "--api",
    "api_url",
    envvar="NIGHTREEL_API_URL",
    metavar="URL",
    help="CLIP HTTP API to use; without it one is served on this machine.",
)
@click.option(
    "--engine",
    envvar="NIGHTREEL_ENGINE",
    type=click.Choice(["auto", "clip", "offline"]),
    default="auto",
    show_default=True,
    help="Engine of the API at home: CLIP where its weights are had, else the coarse offline one.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=None,
    help="Worker processes.  [default: one a core]",
)
@click.option(
    "--recursive/--no-recursive", default=True, show_default=True, help="Look below folders."
)
@format_option
def run(  # noqa: PLR0917 - one parameter an option
    paths: tuple[str, ...],
    label_texts: tuple[str, ...],
    labels_file: Path | None,
    fps: Fraction | None,
    every: Fraction | None,
    keyframes: bool,
    all_frames: bool,
    exact: bool,
    fit: str,
    top_n: int,
    database_url: str,
    api_url: str | None,
    engine: str,
    workers: int | None,
    recursive: bool,
    form: str,
) -> int:
    """Classify the scenes of videos on this machine.

    PATH is a folder, a file, a glob, @FILE (a manifest, one path a line) or - (a manifest on
    standard input). Broker, API, workers and scheduler are started for the run and ended with it.
    Prints one row a video: duration, analysed, scenes, top labels with their share of time.
    """
    from nightreel.cli.answers import write_summary
    from nightreel.cli.output import say
    from nightreel.running import Run
    from scheduler.archive import find
    from scheduler.submit import job_spec
    from storage import database, ledger
    from storage.records import Fit

    sampling = _sampling(fps, every, keyframes, all_frames, exact)
    if label_texts and labels_file is not None:
        raise click.UsageError("--label beside --labels: put all labels into the file, or none.")
    names = [_absolute(path) for path in paths]
    served = _served(api_url, engine)
    labels = _labels(label_texts, labels_file, served.input_size, Fit(fit))
    files = list(find(paths, recursive=recursive))
    if not files:
        raise click.UsageError(
            "no video is found below the folders named: name the files themselves if their "
            "endings are unusual."
        )
    database_url = _absolute_sqlite(database_url)
    results = database.connect(database_url)
    for revision in database.upgrade(results):
        say(f"database: schema {revision} applied")
    spec = job_spec(
        names=names,
        sampling=sampling,
        fit=Fit(fit),
        top_n=top_n,
        labels=labels,
        model=served.model,
        notice=served.notice,
    )
    job = ledger.open_job(results, spec)
    say(_opening(job.id, job.created, len(files), spec))
    if served.notice:
        say(f"NOTE: {served.notice}")
    one_run = Run(
        engine=results,
        job_id=job.id,
        sampling=sampling,
        database_url=database_url,
        workers=workers or os.cpu_count() or 1,
        api_engine=served.engine,
        api_url=api_url,
        broker_url=os.environ.get("NIGHTREEL_BROKER_URL"),
    )
    one_run.carry_out(files)
    return write_summary(results, job, form, one_run.video_ids)


@dataclass(frozen=True, slots=True)
class _Served:
    """What the API says of itself before any call that costs."""

    engine: str
    model: str
    input_size: int
    notice: str | None


def _served(api_url: str | None, engine: str) -> _Served:
    if api_url is None:
        from nightreel.local import describe_engine

        at_home = describe_engine(engine)
        return _Served(at_home.engine, at_home.model, at_home.input_size, at_home.notice)
    from workers.api import ApiClient
    from workers.settings import WorkerSettings

    identity = ApiClient(WorkerSettings(api_url=api_url)).identity()
    return _Served("api", identity.model, identity.input_size, identity.notice)


def _sampling(
    fps: Fraction | None, every: Fraction | None, keyframes: bool, all_frames: bool, exact: bool
) -> Sampling:
    from storage.records import Sampling, SamplingMode

    asked = [
        name
        for name, given in (
            ("--fps", fps is not None),
            ("--every", every is not None),
            ("--keyframes", keyframes),
            ("--all-frames", all_frames),
        )
        if given
    ]
    if len(asked) > 1:
        raise click.UsageError(f"{' beside '.join(asked)}: give one of them.")
    if exact and (keyframes or all_frames):
        raise click.UsageError("--exact chooses within an interval: give it with --fps or --every.")
    if keyframes:
        return Sampling(SamplingMode.KEYFRAMES, None)
    if all_frames:
        return Sampling(SamplingMode.EVERY_FRAME, None)
    mode = SamplingMode.FIRST if exact else SamplingMode.PREFER_KEYFRAME
    return Sampling(mode, 1 / every if every is not None else fps or Fraction(1))


def _labels(texts: Sequence[str], file: Path | None, size: int, fit: Fit) -> LabelSet:
    from scheduler import labels

    if file is not None:
        return labels.read_labels(file, labels.picture_loader(size, fit))
    return labels.label_set_of(texts) if texts else labels.seasons()


def _absolute(path: str) -> str:
    """A name as the job's key holds it: the same from every working directory."""
    if path == "-":
        return path
    if path.startswith("@"):
        return f"@{os.path.abspath(path[1:])}"
    return os.path.abspath(path)


def _absolute_sqlite(url: str) -> str:
    """Children run in another directory, so a relative SQLite file is made absolute."""
    prefix = "sqlite:///"
    if url.startswith(prefix) and not url.startswith((f"{prefix}/", f"{prefix}:")):
        return prefix + os.path.abspath(url.removeprefix(prefix))
    return url


def _opening(job_id: int, created: bool, files: int, spec: JobSpec) -> str:
    verb = "new" if created else "known"
    return (
        f"job {job_id} ({verb}): {files} file{'s' * (files != 1)}, labels {spec.labels.name} "
        f"({len(spec.labels.labels)}), sampling {spec.sampling}, model {spec.model}"
    )
