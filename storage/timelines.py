"""Scenes of one video as other programs read them: WebVTT, FFmetadata chapters, an edit decision
list (CMX 3600), OpenTimelineIO.

Names of labels and files come from people and archives: each format's own characters are escaped,
and nothing that is not printable is written.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote_from_bytes

from storage.records import Scene

MICROSECONDS = 1_000_000
ASSUMED_RATE = Fraction(25)
"""Frames a second of a video that has no rate of its own (a single frame)."""
TIMECODE_RATES = (
    Fraction(24_000, 1001),
    Fraction(24),
    Fraction(25),
    Fraction(30_000, 1001),
    Fraction(30),
    Fraction(48),
    Fraction(50),
    Fraction(60_000, 1001),
    Fraction(60),
)
"""Frames a second of film and television, which editors read timecode in."""


class TimelineFormat(StrEnum):
    """How scenes are written."""

    WEBVTT = "vtt"
    FFMETADATA = "ffmetadata"
    EDL = "edl"
    OTIO = "otio"


def webvtt(scenes: Sequence[Scene]) -> str:
    """One cue a scene, in milliseconds (W3C WebVTT)."""
    cues = [
        f"{number}\n{_clock(one.start_us)} --> {_clock(one.end_us)}\n"
        f"{html.escape(_printable(one.label), quote=False)} ({one.confidence:.0%})\n"
        for number, one in enumerate(scenes, 1)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _clock(t_us: int) -> str:
    seconds, milliseconds = divmod(round(t_us / 1000), 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}.{milliseconds:03}"


def ffmetadata(scenes: Sequence[Scene], title: str) -> str:
    """One chapter a scene, in microseconds: `ffmpeg -i VIDEO -i THIS -map_metadata 1 -codec copy`
    puts them into a video (FFmpeg formats documentation, "Metadata")."""
    lines = [";FFMETADATA1", f"title={_escaped(title)}"]
    for one in scenes:
        lines += [
            "",
            "[CHAPTER]",
            f"TIMEBASE=1/{MICROSECONDS}",
            f"START={one.start_us}",
            f"END={one.end_us}",
            f"title={_escaped(one.label)}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    text = _printable(text)
    # FFmpeg takes a line's last backslash for one that escapes the line's end, escaped or not.
    return re.sub(r"([=;#\\])", r"\\\1", text) + " " * text.endswith("\\")


def edl(scenes: Sequence[Scene], title: str, rate: Fraction | None) -> str:
    """One event a scene, on the record where it is in the source, so that gaps stay gaps.

    Times are counted in frames of the rate of film or television that is nearest to the video's
    own (whose mean may be any number where it varies), and written as non-drop timecode of that
    rate rounded (30 for 29.97). What lasts less than a frame is left out. The list may have more
    events than the 999 that old editors take. ValueError where a scene ends after a day: timecode
    has hours from 00 to 23 (SMPTE ST 12-1), and editors refuse others or begin again at 0.
    """
    own = rate or ASSUMED_RATE
    rate = min(TIMECODE_RATES, key=lambda one: abs(one - own))
    lines = [f"TITLE: {_printable(title)}", "FCM: NON-DROP FRAME", ""]
    number = 0
    for one in scenes:
        start, end = _frame(one.start_us, rate), _frame(one.end_us, rate)
        if start == end:
            continue
        number += 1
        span = f"{_timecode(start, rate)} {_timecode(end, rate)}"
        lines += [
            f"{number:03}  AX       V     C        {span} {span}",
            f"* FROM CLIP NAME: {_printable(title)}",
            f"* COMMENT: {_printable(one.label)} ({one.confidence:.0%})",
        ]
    return "\n".join(lines) + "\n"


def _frame(t_us: int, rate: Fraction) -> int:
    return round(t_us * rate / MICROSECONDS)


def _timecode(frame: int, rate: Fraction) -> str:
    a_second = max(1, round(rate))
    seconds, frames = divmod(frame, a_second)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours > 23:
        raise ValueError("an edit decision list counts less than 24 hours: choose another format")
    return f"{hours:02}:{minutes:02}:{seconds:02}:{frames:02}"


def otio(
    scenes: Sequence[Scene], path_raw: bytes, duration_us: int, rate: Fraction | None, **about: Any
) -> str:
    """A timeline of one video track in OpenTimelineIO's JSON: a clip a scene, named by its label,
    gaps where there is none, times in frames of the video's own rate.

    Numbers of a scene stand in its clip's metadata under `nightreel`, `about` in the timeline's.
    """
    import opentimelineio as library  # noqa: PLC0415 - an extra, and slow to load

    rate = rate or ASSUMED_RATE
    name = _printable(PurePosixPath(path_raw.decode("utf-8", "backslashreplace")).name)

    def span(start: int, end: int) -> Any:
        begin = library.opentime.RationalTime(start, float(rate))
        return library.opentime.TimeRange(
            begin, library.opentime.RationalTime(end - start, float(rate))
        )

    track = library.schema.Track(name="scenes", kind=library.schema.TrackKind.Video)
    end = _frame(duration_us, rate)
    at = 0
    for one in scenes:
        first, last = _frame(one.start_us, rate), _frame(one.end_us, rate)
        if first > at:
            track.append(library.schema.Gap(source_range=span(0, first - at)))
        if last > first:
            media = library.schema.ExternalReference(
                f"file://{quote_from_bytes(path_raw)}", available_range=span(0, max(end, last))
            )
            media.name = name
            label = _printable(one.label)
            track.append(
                library.schema.Clip(
                    name=label,
                    media_reference=media,
                    source_range=span(first, last),
                    metadata={"nightreel": asdict(one) | {"label": label}},
                )
            )
        at = last
    if end > at:
        track.append(library.schema.Gap(source_range=span(0, end - at)))
    timeline = library.schema.Timeline(name=name, tracks=[track], metadata={"nightreel": about})
    return str(timeline.to_json_string(indent=2))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
