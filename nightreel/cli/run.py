"""`nightreel run`: the whole job on one machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nightreel.cli.options import Duration, Rate, database_option, format_option
from storage.exits import ExitCode

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from nightreel.local import LocalFarm
    from storage.records import Fit, JobSpec, LabelSet, Sampling

POLL_S = 0.25


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
def run(
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
    from nightreel.cli.answers import write_summary  # noqa: PLC0415 - `--help` must be quick
    from nightreel.cli.output import say  # noqa: PLC0415
    from scheduler.archive import find  # noqa: PLC0415
    from scheduler.submit import job_spec  # noqa: PLC0415
    from storage import database, ledger  # noqa: PLC0415
    from storage.records import Fit  # noqa: PLC0415

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
    one_run = _Run(
        results,
        job.id,
        spec,
        farm_settings={
            "database_url": database_url,
            "workers": workers or os.cpu_count() or 1,
            "engine": served.engine,
            "api_url": api_url,
            "broker_url": os.environ.get("NIGHTREEL_BROKER_URL"),
        },
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
        from nightreel.local import describe_engine  # noqa: PLC0415

        at_home = describe_engine(engine)
        return _Served(at_home.engine, at_home.model, at_home.input_size, at_home.notice)
    from workers.api import ApiClient  # noqa: PLC0415
    from workers.settings import WorkerSettings  # noqa: PLC0415

    identity = ApiClient(WorkerSettings(api_url=api_url)).identity()
    return _Served("api", identity.model, identity.input_size, identity.notice)


def _sampling(
    fps: Fraction | None, every: Fraction | None, keyframes: bool, all_frames: bool, exact: bool
) -> Sampling:
    from storage.records import Sampling, SamplingMode  # noqa: PLC0415

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
    from scheduler import labels  # noqa: PLC0415

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


@dataclass(slots=True)
class _Run:
    """One run of a job: planning in a thread, the farm when there is work, progress meanwhile."""

    engine: Engine
    job_id: int
    spec: JobSpec
    farm_settings: dict[str, object]
    video_ids: set[int] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _fault: BaseException | None = None

    def carry_out(self, files: Sequence[object]) -> None:
        """Bring the job to its end, or raise what stopped it; either way it can be resumed."""
        from nightreel.progress import ProgressDisplay  # noqa: PLC0415
        from storage import ledger  # noqa: PLC0415

        ledger.resume_job(self.engine, self.job_id)
        ledger.recover(self.engine, self.job_id)
        # What failed by a passing fault (a disk away, a file locked) is worth another night.
        ledger.retry_job(self.engine, self.job_id)
        planning = threading.Thread(target=self._plan, args=(files,), name="planning")
        with _terminated_as_interrupted(), ProgressDisplay() as display:
            try:
                planning.start()
                with ExitStack() as stack:
                    self._watch(display, planning, stack)
            finally:
                self._stop.set()
                planning.join()
                ledger.recover(self.engine, self.job_id)
        if self._fault is not None:
            raise self._fault

    def _plan(self, files: Sequence[object]) -> None:
        from scheduler.settings import SchedulerSettings  # noqa: PLC0415
        from scheduler.submit import submit  # noqa: PLC0415
        from storage import ledger  # noqa: PLC0415

        try:
            submitted = submit(
                self.engine,
                self.job_id,
                self.spec.sampling,
                files,
                task_seconds=SchedulerSettings().task_seconds,
                processes=max(1, (os.cpu_count() or 1) // 2),
            )
            try:
                for one in submitted:
                    self.video_ids.add(one.video_id)
                    if self._stop.is_set():
                        return
            finally:
                submitted.close()
            ledger.finish_planning(self.engine, self.job_id)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._fault = error

    def _watch(
        self, display: ProgressDisplay, planning: threading.Thread, stack: ExitStack
    ) -> None:
        from nightreel.progress import Snapshot  # noqa: PLC0415
        from storage import ledger  # noqa: PLC0415

        farm: LocalFarm | None = None
        while True:
            planned = not planning.is_alive()
            if self._fault is not None:
                return
            status = ledger.status(self.engine, self.job_id)
            if status.held is not None:
                raise JobHeld(f"{status.held}; the same command resumes")
            if farm is None and status.open_tasks:
                farm = stack.enter_context(self._farm())
            if farm is not None:
                for name in farm.check():
                    display.say(f"the {name} process ended and was started again")
            elif planned:
                ledger.close_finished(self.engine, self.job_id)
                status = ledger.status(self.engine, self.job_id)
            display.show(
                Snapshot(
                    status.closed_videos,
                    status.videos,
                    status.closed_tasks,
                    status.tasks,
                    status.samples,
                    status.covered_us,
                    status.duration_us,
                    not planned,
                )
            )
            if planned and status.finished:
                return
            self._stop.wait(POLL_S)

    def _farm(self) -> LocalFarm:
        from nightreel.local import LocalFarm  # noqa: PLC0415

        if self.farm_settings["broker_url"] is not None:
            from scheduler.feeder import check_broker  # noqa: PLC0415
            from workers.app import make_app  # noqa: PLC0415

            check_broker(make_app())
        return LocalFarm(job_id=self.job_id, **self.farm_settings)  # type: ignore[arg-type]


class JobHeld(Exception):
    """The job is held because the API refuses key, credits or model."""

    code = ExitCode.API


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and a closed terminal end a run as Ctrl-C does: children stopped, job resumable."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
