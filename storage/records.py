"""Plain values that every package speaks in.

Times are integer microseconds counted from a video's first presented frame (`_us`), presentation
timestamps are integers in the stream's time base (`pts`), and rates are exact fractions. Nothing
here opens a file, a socket or a database, and nothing but the standard library is imported.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Any, Self

PLAN_VERSION = 1
"""Version of the plan a task carries; a worker refuses a task of another version."""


class SamplingMode(StrEnum):
    """Which frames of a video are analysed."""

    PREFER_KEYFRAME = "prefer-keyframe"
    """One a bucket: its keyframe if it has one, else its first frame (several times faster)."""
    FIRST = "first"
    """One a bucket: always its first frame."""
    KEYFRAMES = "keyframes"
    """Every keyframe and nothing else; the bucket is the keyframe's ordinal."""
    EVERY_FRAME = "every-frame"
    """Every presented frame; the bucket is the frame's ordinal."""


_SKIP_DUPLICATES = "+skip-duplicates"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How frames are chosen: a mode, and for the modes with a time grid a rate in samples a second.

    Bucket k of a video holds all frames with floor((pts - first pts) x time base x rate) = k.
    """

    mode: SamplingMode = SamplingMode.PREFER_KEYFRAME
    rate: Fraction | None = Fraction(1)
    skip_duplicates: bool = False
    """Whether a frame that shows what was sent last is not sent, but takes over its result."""
    audit: Fraction = Fraction(0)
    """Share of the duplicates that are sent all the same, to learn how often skipping is wrong."""

    def __post_init__(self) -> None:
        gridded = self.mode in (SamplingMode.PREFER_KEYFRAME, SamplingMode.FIRST)
        if gridded and (self.rate is None or self.rate <= 0):
            raise ValueError(f"sampling mode {self.mode} needs a rate above 0, not {self.rate}")
        if not gridded and self.rate is not None:
            raise ValueError(f"sampling mode {self.mode} has no rate")
        if not 0 <= self.audit <= 1:
            raise ValueError(f"{self.audit} is no share from 0 to 1")
        if self.audit and not self.skip_duplicates:
            raise ValueError("there is nothing to audit where no duplicate is skipped")

    def __str__(self) -> str:
        """The canonical text, such as `prefer-keyframe@1/5` or `first@1+skip-duplicates:1/100`:
        equal samplings have equal texts."""
        text = str(self.mode) if self.rate is None else f"{self.mode}@{self.rate}"
        if self.skip_duplicates:
            text += _SKIP_DUPLICATES
        return f"{text}:{self.audit}" if self.audit else text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read back what `str()` wrote. ValueError for anything else."""
        frames, audit = text.partition(":")[::2]
        skip_duplicates = frames.endswith(_SKIP_DUPLICATES)
        mode, _, rate = frames.removesuffix(_SKIP_DUPLICATES).partition("@")
        return cls(
            SamplingMode(mode),
            Fraction(rate) if rate else None,
            skip_duplicates,
            Fraction(audit or 0),
        )


class Fit(StrEnum):
    """How a frame of any shape becomes the square that the model reads."""

    CROP = "crop"
    """Shorter side to the model's size, centre cut out: what the API does itself."""
    PAD = "pad"
    """Longer side to the model's size, black bars: all of the picture, smaller."""
    SQUASH = "squash"
    """Both sides to the model's size: all of the picture, distorted."""
    TILES = "tiles"
    """Shorter side to the model's size, and three squares over the longer one: all of a picture up
    to three times as long as wide; a label's best square counts."""

    @property
    def squares(self) -> int:
        """Squares that are sent of a frame."""
        return 3 if self is Fit.TILES else 1


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file of the archive as the file system shows it."""

    path: str
    """Absolute; bytes that are not UTF-8 are surrogate escapes, as `os.fsdecode` leaves them."""
    size_bytes: int
    mtime_ns: int

    @property
    def path_raw(self) -> bytes:
        """The name's own bytes: what is opened."""
        return os.fsencode(self.path)

    @property
    def shown(self) -> str:
        """The name as printable text, for people and for databases: invalid bytes as `\\xff`."""
        return shown_path(self.path_raw)


def shown_path(path_raw: bytes) -> str:
    """A file name's bytes as printable text; bytes that are not UTF-8 and control characters are
    written as `\\xff`, so that a hostile name can neither break a table nor a terminal."""
    text = path_raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What probing a video found. Sizes are those of the upright picture with square pixels."""

    container: str
    codec: str
    pixel_format: str
    stream_index: int
    """The analysed stream's index in the container, pinned here for planner and worker alike."""
    stream_reason: str
    """Why that stream: `only`, `default` or `largest`."""
    width: int
    height: int
    rotation: int
    """Degrees clockwise that turn the coded picture upright: 0, 90, 180 or 270."""
    time_base: Fraction
    """Seconds a tick of pts."""
    frame_rate: Fraction | None
    """Mean frames a second by the index; None for a single frame."""
    frame_count: int
    """Presented frames by the index, not by the header."""
    first_pts: int
    duration_us: int
    """What the video should last: its index's span, or more where its container promises more
    (a truncated file), the rest of which is a gap."""
    indexed_us: int
    """Span that the index covers: from the first frame to the end of the last."""
    header_us: int | None
    """Duration by the header, as it stands there; recorded, not trusted."""
    sequential_reason: str | None
    """None where ranges can be read independently; else why the video is one sequential task."""
    interlaced: bool
    bit_depth: int
    transfer: str
    """Transfer characteristic by name (`bt709`, `smpte2084`, `unknown`, ...)."""
    warnings: tuple[str, ...] = ()
    """What a person should know: disagreeing durations, damaged packets, and the like."""
    created: str | None = None
    """When it was recorded, as the container's metadata writes it; recorded, not trusted."""


@dataclass(frozen=True, slots=True)
class FrameRange:
    """Buckets [bucket_start, bucket_end) of one video, answering for [start_us, end_us) of it:
    the unit of work, retry and loss. The ranges of a video tile its duration without overlap."""

    bucket_start: int
    bucket_end: int
    start_us: int
    end_us: int
    seek_pts: int | None
    """Keyframe to seek to; None reads from the first packet."""
    buckets: tuple[int, ...]
    """Bucket of each wanted frame, ascending."""
    pts: tuple[int, ...]
    """Presentation timestamp of each wanted frame; for a sequential range whose timestamps cannot
    be trusted, empty: the worker then applies the grid to the frames as they come."""

    def to_json(self) -> str:
        """Compact text for the ledger; ascending numbers are written as differences."""
        return json.dumps(
            {
                "v": PLAN_VERSION,
                "b": [self.bucket_start, self.bucket_end],
                "t": [self.start_us, self.end_us],
                "seek": self.seek_pts,
                "buckets": _differences(self.buckets),
                "pts": _differences(self.pts),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read back what `to_json` wrote. ValueError for a plan of another version."""
        plan: dict[str, Any] = json.loads(text)
        if plan.get("v") != PLAN_VERSION:
            raise ValueError(
                f"plan version {plan.get('v')} where this worker reads version {PLAN_VERSION}: "
                "run scheduler and workers of one release"
            )
        (bucket_start, bucket_end), (start_us, end_us) = plan["b"], plan["t"]
        return cls(
            bucket_start,
            bucket_end,
            start_us,
            end_us,
            plan["seek"],
            tuple(itertools.accumulate(plan["buckets"])),
            tuple(itertools.accumulate(plan["pts"])),
        )


def _differences(values: Sequence[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise((0, *values))]


class GapKind(StrEnum):
    """Why an interval of a video was not analysed."""

    TRUNCATED = "truncated"
    """The container promises more than the file holds."""
    DAMAGED = "damaged"
    """The packets are there and do not decode."""
    READ_ERROR = "read-error"
    """The file vanished, changed or could not be read."""
    API_REFUSED_FRAME = "api-refused-frame"
    TASK_FAILED = "task-failed"
    """The task spent all its attempts; its error stands in the ledger."""
    CANCELLED = "cancelled"
    STALLED = "stalled"
    """Decoding made no progress."""
    NOT_EMBEDDED = "not-embedded"
    """Analysed for other labels by an API that gives no embeddings: cannot be asked again."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Interval [start_us, end_us) of a video that was not analysed, and why."""

    start_us: int
    end_us: int
    kind: GapKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One of a sample's best labels."""

    label: int
    """Position of the label in its label set."""
    similarity: float
    """Cosine in [-1, 1], as the API gives it."""
    confidence: float
    """Share of softmax(100 x cosine) over the label set."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """An analysed sample: where it stands in the video, and its best labels, best first."""

    bucket: int
    t_us: int
    """Time of the frame."""
    start_us: int
    end_us: int
    """The interval it answers for: up to the next planned sample."""
    predictions: tuple[Prediction, ...]
    reused_from: int | None = None
    """Bucket of the sample before it whose result it took over, being its duplicate."""
    audit_of: int | None = None
    """Bucket of the sample whose duplicate it is, though it was sent all the same."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a task spent at the API."""

    image_calls: int = 0
    text_calls: int = 0
    bytes_sent: int = 0
    api_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RangeResult:
    """All that a worker commits for one range. Samples and gaps tile the range's interval."""

    samples: tuple[SampleResult, ...]
    gaps: tuple[Gap, ...]
    vectors: bytes | None
    """Unit vectors of the samples in order, float16 little endian, len(samples) x dimension; None
    where the endpoint gives none."""
    dimension: int
    """Numbers a sample: those of the vectors of all its squares, one after the other."""
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Label:
    """A class to look for: by prompts, by example pictures, by samples, or by several of these."""

    name: str
    prompts: tuple[str, ...] = ()
    examples: tuple[bytes, ...] = ()
    """JPEG pictures of the model's input size."""
    threshold: float | None = None
    """Confidence in (0, 1] from which a sample counts for `flag`."""
    flag: str | None = None
    """Reason raised when the label reaches its threshold."""
    samples: tuple[str, ...] = ()
    """Samples of the archive that show it, each as `CONTENT_ID@MICROSECONDS`."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The labels of a job; equal contents have equal digests, whatever the name."""

    name: str
    labels: tuple[Label, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        sha = hashlib.sha256()
        for label in self.labels:
            fields = [label.name, label.prompts, label.threshold, label.flag, label.samples]
            sha.update(json.dumps(fields, ensure_ascii=True).encode())
            for picture in label.examples:
                sha.update(hashlib.sha256(picture).digest())
        object.__setattr__(self, "digest", sha.hexdigest())


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a job asks of its videos. Two jobs of one `key` are one job."""

    key: str
    name: str
    sampling: Sampling
    fit: Fit
    top_n: int
    labels: LabelSet
    model: str
    """Name and version of the model that embeds, as results are keyed by."""
    notice: str | None
    """What every reader of the results must be told (a coarse engine), or None."""
    request: str = ""
    """Digest of all that decides the results and of the names as given: what must be equal where
    the key is a person's choice."""


class VideoState(StrEnum):
    """How a video stands in a job."""

    RUNNING = "running"
    COMPLETE = "complete"
    """All of its duration is analysed."""
    PARTIAL = "partial"
    """Some of it is analysed; the gaps say what is not, and why."""
    REJECTED = "rejected"
    """Not a video that can be read; nothing was planned."""
    FAILED = "failed"
    """Planned, and nothing of it could be analysed."""
    CANCELLED = "cancelled"


class TaskState(StrEnum):
    """How a task stands in the ledger."""

    PENDING = "pending"
    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Scene:
    """Maximal run of one label after smoothing."""

    start_us: int
    end_us: int
    label: str
    confidence: float
    """Mean confidence of the label over the scene's samples."""
    peak: float
    samples: int
    agreeing: float
    """Share of the samples whose own best label is the scene's."""
