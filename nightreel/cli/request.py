"""What `run`, `plan` and `submit` are asked in the same words: files, sampling, labels, the API."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nightreel.cli.options import Duration, Rate, Share

if TYPE_CHECKING:
    from scheduler.archive import Unreadable
    from storage.records import ArchiveFile, LabelSet, Sampling

_OPTIONS = (
    click.argument("paths", nargs=-1, required=True, metavar="PATH..."),
    click.option(
        "--label", "label_texts", multiple=True, metavar="TEXT", help="A label; repeat it."
    ),
    click.option(
        "--labels",
        "labels_file",
        type=click.Path(path_type=Path),
        help="YAML file of labels: prompts, example pictures, thresholds, flags.",
    ),
    click.option("--fps", type=Rate(), help="Samples a second: 1, 0.5, 1/5.  [default: 1]"),
    click.option("--every", type=Duration(), help="Time between samples: 2s, 500ms, 1min."),
    click.option("--keyframes", is_flag=True, help="Every keyframe and nothing else (fastest)."),
    click.option("--all-frames", is_flag=True, help="Every frame (slowest)."),
    click.option(
        "--exact",
        is_flag=True,
        help="Take the first frame of each interval, where otherwise its keyframe serves (slower).",
    ),
    click.option(
        "--fit",
        type=click.Choice(["crop", "pad", "squash", "tiles"]),
        default="crop",
        show_default=True,
        help="How a frame becomes the model's square: crop as the API does; pad or squash see all; "
        "tiles sends three squares, of which the best counts.",
    ),
    click.option(
        "--skip-duplicates",
        is_flag=True,
        help="Do not send a frame that shows what was sent last; it takes over that result.",
    ),
    click.option(
        "--audit-skips",
        type=Share(),
        help="Share of the duplicates to send all the same, and to tell how many differ: 1%.",
    ),
    click.option(
        "--recursive/--no-recursive", default=True, show_default=True, help="Look below folders."
    ),
)

_AT_HOME = (
    click.option(
        "--api",
        "api_url",
        envvar="NIGHTREEL_API_URL",
        metavar="URL",
        help="CLIP HTTP API to use; without it one is served on this machine.",
    ),
    click.option(
        "--engine",
        envvar="NIGHTREEL_ENGINE",
        type=click.Choice(["auto", "clip", "offline"]),
        default="auto",
        show_default=True,
        help="Engine of the API at home: CLIP where its weights are had, else the offline one.",
    ),
)

_API_OF_THE_WORKERS = click.option(
    "--api",
    "api_url",
    envvar="NIGHTREEL_API_URL",
    metavar="URL",
    required=True,
    help="CLIP HTTP API that the workers use: it says which model the results are of.",
)


@dataclass(frozen=True, slots=True)
class Served:
    """What the API says of itself before any call that costs."""

    engine: str
    model: str
    input_size: int
    notice: str | None


@dataclass(frozen=True, slots=True)
class Request:
    """The options as they were given."""

    paths: tuple[str, ...]
    label_texts: tuple[str, ...]
    labels_file: Path | None
    fps: Fraction | None
    every: Fraction | None
    keyframes: bool
    all_frames: bool
    exact: bool
    fit: str
    skip_duplicates: bool
    audit_skips: Fraction | None
    api_url: str | None
    engine: str
    recursive: bool

    @property
    def names(self) -> list[str]:
        """The paths as a job's key holds them: the same from every working directory."""
        return [_absolute(path) for path in self.paths]

    def files(self) -> list[ArchiveFile | Unreadable]:
        """The files that are meant. Raises ArchiveError, and UsageError where there are none."""
        from scheduler.archive import find

        found = list(find(self.paths, recursive=self.recursive))
        if not found:
            raise click.UsageError(
                "no video is found below the folders named: name the files themselves if their "
                "endings are unusual."
            )
        return found

    def served(self) -> Served:
        """The API that is to be used, asked without a call that costs."""
        from workers.settings import WorkerSettings

        # Read here, though the workers use them: a wrong one must not be found in the night.
        settings = (
            WorkerSettings() if self.api_url is None else WorkerSettings(api_url=self.api_url)
        )
        settings.key()
        if self.api_url is None:
            from nightreel.local import describe_engine

            at_home = describe_engine(self.engine)
            return Served(at_home.engine, at_home.model, at_home.input_size, at_home.notice)
        from workers.api import ApiClient

        identity = ApiClient(settings).identity()
        return Served("api", identity.model, identity.input_size, identity.notice)

    def labels(self, input_size: int) -> LabelSet:
        """The label set, its example pictures prepared for the model."""
        from scheduler import labels
        from storage.records import Fit

        if self.labels_file is not None:
            loader = labels.picture_loader(input_size, Fit(self.fit))
            return labels.read_labels(self.labels_file, loader)
        return labels.label_set_of(self.label_texts) if self.label_texts else labels.seasons()

    def check_labels(self, labels: LabelSet) -> None:
        """Refuse example pictures where the API only compares, and prompts that are too long for
        it; it is asked about what is doubtful alone.

        Raises LabelsError that names label and prompt.
        """
        from scheduler.labels import check_examples, check_fit, may_not_fit
        from workers.api import ApiClient
        from workers.settings import WorkerSettings

        def only_compares() -> bool:
            if self.api_url is None:  # it is not started for that: it embeds, if it is let to
                return WorkerSettings().api_way == "compare"
            with closing(ApiClient(WorkerSettings(api_url=self.api_url))) as client:
                return client.only_compares()

        check_examples(labels, only_compares)
        if not may_not_fit(labels):
            return
        with ExitStack() as stack:
            url = self.api_url
            if url is None:
                from nightreel.local import ApiAtHome

                url = stack.enter_context(ApiAtHome(self.engine)).url
            check_fit(labels, ApiClient(WorkerSettings(api_url=url)).refused_texts)

    def sampling(self) -> Sampling:
        """How frames are chosen. Raises UsageError where options contradict each other."""
        from storage.records import Sampling, SamplingMode

        if self.label_texts and self.labels_file is not None:
            raise click.UsageError(
                "--label beside --labels: put all labels into the file, or none."
            )
        asked = [
            name
            for name, given in (
                ("--fps", self.fps is not None),
                ("--every", self.every is not None),
                ("--keyframes", self.keyframes),
                ("--all-frames", self.all_frames),
            )
            if given
        ]
        if len(asked) > 1:
            raise click.UsageError(f"{' beside '.join(asked)}: give one of them.")
        if self.exact and (self.keyframes or self.all_frames):
            raise click.UsageError(
                "--exact chooses within an interval: give it with --fps or --every."
            )
        if self.audit_skips and not self.skip_duplicates:
            raise click.UsageError("--audit-skips audits what --skip-duplicates skips: give both.")
        skipping = self.skip_duplicates, self.audit_skips or Fraction(0)
        if self.keyframes:
            return Sampling(SamplingMode.KEYFRAMES, None, *skipping)
        if self.all_frames:
            return Sampling(SamplingMode.EVERY_FRAME, None, *skipping)
        mode = SamplingMode.FIRST if self.exact else SamplingMode.PREFER_KEYFRAME
        rate = 1 / self.every if self.every is not None else self.fps or Fraction(1)
        return Sampling(mode, rate, *skipping)


def request_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options; the command gets them together, as its first argument."""
    return _asked(command, (*_OPTIONS, *_AT_HOME))


def farm_request_options(command: Callable[..., int]) -> Callable[..., int]:
    """The same for a job that other machines work on: the API is theirs, and none is started."""
    return _asked(command, (*_OPTIONS, _API_OF_THE_WORKERS), engine="clip")


def _asked(
    command: Callable[..., int], options: Sequence[Callable[..., Any]], **fixed: str
) -> Callable[..., int]:
    @functools.wraps(command)
    def with_request(**given: Any) -> int:
        given |= fixed
        request = Request(**{field.name: given.pop(field.name) for field in fields(Request)})
        return command(request, **given)

    for option in reversed(options):
        with_request = option(with_request)
    return with_request


def _absolute(path: str) -> str:
    if path == "-":
        return path
    if path.startswith("@") and not os.path.lexists(path):
        return f"@{os.path.abspath(path[1:])}"
    return os.path.abspath(path)
