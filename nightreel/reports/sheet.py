"""A contact sheet: one picture of each scene, with its label and its times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av.error
from PIL import Image, ImageDraw

from nightreel.reports.colours import colour_of
from nightreel.reports.drawing import Told
from nightreel.reports.frames import Clock, Upright, decoded_packet, even_size, seek_before
from nightreel.reports.lettering import fitted, font, wrapped
from storage.records import Scene, VideoInfo
from storage.scenes import UNKNOWN
from workers.footage.picture import Picture
from workers.footage.source import Source

THUMBNAIL_PX = 320
"""Longer side of a picture."""
_GAP_PX, _TEXT_PX = 12, 15
_NARROWEST_PX = 360
_MOST_NOTES = 10
"""Lines of a notice; an engine's are fewer on the narrowest sheet."""
_PAPER, _INK, _FAINT, _WARNING = "#ffffff", "#111111", "#666666", "#b00000"


def contact_sheet(
    path: str,
    info: VideoInfo,
    told: Told,
    title: str,
    *,
    most: int,
    columns: int | None = None,
) -> Image.Image:
    """The sheet of a video's scenes, in order of time; of more than `most` the longest are taken.

    Each is shown by the frame of its surest sample. Raises FootageError.
    """
    longest = sorted(told.scenes, key=lambda one: one[1].start_us - one[1].end_us)[:most]
    chosen = sorted(longest, key=lambda one: one[1].start_us)
    left_out = len(told.scenes) - len(chosen)
    scale = Fraction(THUMBNAIL_PX, max(info.width, info.height))
    size = even_size(info, scale)
    columns = columns or max(1, min(len(chosen), math.ceil(math.sqrt(len(chosen) * 1.2))))
    rows = math.ceil(len(chosen) / columns)
    cell_height = size[1] + 2 * _TEXT_PX + _GAP_PX + 10
    head = 3 * _TEXT_PX + _GAP_PX
    sheet_width = max(_NARROWEST_PX, columns * (size[0] + _GAP_PX) + _GAP_PX)
    room = sheet_width - 2 * _GAP_PX
    small = font(_TEXT_PX - 3)
    notes = wrapped(f"NOTE: {told.notice}", small, room, _MOST_NOTES) if told.notice else []
    foot = len(notes) * _TEXT_PX + _GAP_PX
    body = head + rows * cell_height
    sheet = Image.new("RGB", (sheet_width, body + foot), _PAPER)
    draw = ImageDraw.Draw(sheet)
    more = f", {left_out} shorter ones left out" if left_out else ""
    for line, note in enumerate(notes):
        draw.text((_GAP_PX, body + line * _TEXT_PX), note, _WARNING, small)
    count = f"{len(chosen)} scene{'s' * (len(chosen) != 1)}{more}"
    draw.text(
        (_GAP_PX, _GAP_PX), fitted(title, "", font(_TEXT_PX + 2), room), _INK, font(_TEXT_PX + 2)
    )
    draw.text((_GAP_PX, _GAP_PX + 1.6 * _TEXT_PX), count, _FAINT, font(_TEXT_PX - 2))
    times = [_surest(told, label, scene) for label, scene in chosen]
    for at, picture in _pictures_at(path, info, times, size):
        left = _GAP_PX + at % columns * (size[0] + _GAP_PX)
        top = head + at // columns * cell_height
        label, scene = chosen[at]
        _paste(sheet, draw, (left, top), size, picture, label, scene)
    return sheet


def _paste(  # noqa: PLR0917
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    size: tuple[int, int],
    picture: Picture | None,
    label: int,
    scene: Scene,
) -> None:
    left, top = corner
    width, height = size
    if picture is None:
        draw.rectangle((left, top, left + width, top + height), fill="#dddddd")
        draw.text((left + width / 2, top + height / 2), "no frame", _FAINT, font(_TEXT_PX), "mm")
    else:
        sheet.paste(Image.fromarray(picture), (left, top))
    bar = top + height
    draw.rectangle((left, bar, left + width - 1, bar + 5), fill=colour_of(label))
    confidence = "" if label == UNKNOWN else f"{scene.confidence:.0%}"
    name = fitted(f"{scene.label}  {confidence}".rstrip(), confidence, font(_TEXT_PX), width)
    draw.text((left, bar + 8), name, _INK, font(_TEXT_PX))
    span = f"{_clock(scene.start_us)} - {_clock(scene.end_us)}"
    draw.text((left, bar + 10 + _TEXT_PX), span, _FAINT, font(_TEXT_PX - 2))


def _clock(t_us: int) -> str:
    minutes, tenths = divmod(round(t_us / 100_000), 600)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{tenths // 10:02}.{tenths % 10}"


def _surest(told: Told, label: int, scene: Scene) -> int:
    """Time of the scene's sample in which its label is surest; of an unknown scene, its middle."""
    samples = told.samples
    inside = (samples.start_us >= scene.start_us) & (samples.end_us <= scene.end_us)
    if label == UNKNOWN or not inside.any():
        return (scene.start_us + scene.end_us) // 2
    curve = samples.curve(label)
    curve[~inside] = -1
    return int(samples.t_us[curve.argmax()])


def _pictures_at(
    path: str, info: VideoInfo, times_us: Sequence[int], size: tuple[int, int]
) -> Iterator[tuple[int, Picture | None]]:
    """For each of the ascending times the picture of the frame that is shown then."""
    upright = Upright(*size)
    if info.sequential_reason is None:
        for at, t_us in enumerate(times_us):
            # A file of its own each time: MPEG-TS decoders carry pictures over a seek.
            with Source(path, info.stream_index) as source:
                seek_before(source, info, t_us)
                yield from _next_pictures(source, info, [(at, t_us)], upright)
    else:
        with Source(path, info.stream_index) as source:
            yield from _next_pictures(source, info, list(enumerate(times_us)), upright)


def _next_pictures(
    source: Source, info: VideoInfo, wanted: list[tuple[int, int]], upright: Upright
) -> Iterator[tuple[int, Picture | None]]:
    clock = Clock(info)
    left = list(wanted)
    for packet in itertools.chain(source.packets(), [None]):
        for timed in decoded_packet(source, clock, packet):
            while left and timed.t_us >= left[0][1]:
                try:
                    yield left[0][0], upright.picture(timed.frame)
                except av.error.FFmpegError:
                    yield left[0][0], None
                left.pop(0)
        if not left:
            return
    for at, _ in left:
        yield at, None
