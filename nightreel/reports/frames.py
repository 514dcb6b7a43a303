"""Frames of a video in order, upright and in sRGB, with times as its samples have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av.error
import numpy as np
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from storage.records import VideoInfo
from workers.footage.clock import Slots, Unwrapper, lacks_times
from workers.footage.counted import Feed
from workers.footage.picture import Picture, colorspace_of, orientation, tone_mapped
from workers.footage.source import Source

MICROSECONDS = 1_000_000
_PQ_HLG = (16, 18)
"""ITU-T H.273 table 3: transfer characteristics of high dynamic range."""


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """A decoded frame, and its time from the first one."""

    frame: VideoFrame
    t: Fraction
    """Seconds, exact."""

    @property
    def t_us(self) -> int:
        """Microseconds, rounded down."""
        return int(self.t * MICROSECONDS)


class Clock:
    """Times of a video's frames, as its samples have them: by their timestamps, in running time
    where the recorder's clock jumps; by counting in a file that has none."""

    def __init__(self, info: VideoInfo) -> None:
        self.shift = Fraction(0)
        """Seconds that jumps of the file's clock have added to it where the file is read now."""
        self._info = info
        self._each = 1 / (info.frame_rate or Fraction(25))
        sequential = info.sequential_reason is not None
        # Where an index counts frames, a tick is one, or in AVI a slot for one.
        counted = (
            lacks_times(info.container, info.codec)
            if info.container == "avi"
            else info.time_base == self._each
        )
        self._slots = Slots(info.container, info.codec) if sequential and counted else None
        self._feed = None if self._slots is None else Feed(self._slots, info.container)
        self._unwrapper = (
            Unwrapper(info.container, info.time_base) if sequential and not counted else None
        )
        self._latest: Fraction | None = None

    def mend(self, packet: Packet[Stream]) -> None:
        """Give a packet of pictures its timestamps in running time. For each once, in order."""
        if self._feed is not None:
            self._feed.read(packet)
        if self._unwrapper is None:
            return
        before = packet.dts
        packet.pts, packet.dts = self._unwrapper.times(
            packet.pts, before, packet.duration, hidden=packet.is_discard
        )
        if before is not None and packet.dts is not None:
            self.shift = (packet.dts - before) * self._info.time_base

    def feed(self, packet: Packet[Stream], *, decodes: bool = True) -> None:
        """Tell of a packet that the decoder was given. For each once, in order."""
        if self._feed is not None and packet.size:
            self._feed.taken(packet, decodes=decodes)

    def time_of(self, frame: VideoFrame) -> Fraction | None:
        """Seconds from the first frame, exact; None for one that damage has put out of order. For
        each once, in order."""
        if self._slots is not None:
            first = self._latest is None
            slot = self._slots.time(frame.pts, key=first or frame.key_frame)
            t = slot * self._info.time_base
            if self._slots.stray or (self._latest is not None and t <= self._latest):
                return None
            self._latest = t
        elif frame.pts is not None:
            # The frame's own time base is lost where the decoder is emptied at the end.
            self._latest = (frame.pts - self._info.first_pts) * self._info.time_base
        else:
            self._latest = Fraction(0) if self._latest is None else self._latest + self._each
        return self._latest


def decoded_packet(source: Source, clock: Clock, packet: Packet[Stream] | None) -> Iterator[Timed]:
    """The frames that come of one packet, or with None those that are still inside the decoder."""
    if packet is not None:
        clock.mend(packet)
    try:
        frames = source.stream.codec_context.decode(packet)
    except av.error.FFmpegError:
        if packet is not None:
            clock.feed(packet, decodes=False)
        return
    if packet is not None:
        clock.feed(packet)
    for frame in frames:
        t = clock.time_of(frame)
        if t is not None and t >= 0:
            yield Timed(frame, t)


def seek_before(source: Source, info: VideoInfo, t_us: int) -> None:
    """Go to a keyframe at or before this time, where the video can be entered in its middle."""
    if info.sequential_reason is None and t_us > 0:
        source.seek(info.first_pts + int(Fraction(t_us, MICROSECONDS) / info.time_base))


class Upright:
    """Turns frames into pictures: upright, square pixels, sRGB of 8 bits."""

    def __init__(self, width: int, height: int) -> None:
        """`width` and `height` are those of the upright picture."""
        self._width, self._height = width, height
        self._scaler = VideoReformatter()
        self._turn: float | None = None
        self._upright = (0, False)

    def picture(self, frame: VideoFrame) -> Picture:
        """The frame as a picture of that size. Raises av.error.FFmpegError."""
        if frame.rotation != self._turn:  # looking costs a pass over the whole picture
            self._turn, self._upright = frame.rotation, orientation(frame)
        rotation, mirrored = self._upright
        turned = rotation in (90, 270)
        width, height = (self._height, self._width) if turned else (self._width, self._height)
        high_range = frame.color_trc in _PQ_HLG
        pixels = self._scaler.reformat(
            frame,
            width,
            height,
            "rgb48le" if high_range else "rgb24",
            src_colorspace=colorspace_of(frame),
            src_color_range=ColorRange.JPEG
            if frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
            else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        ).to_ndarray()
        picture = (
            tone_mapped(pixels.astype(np.uint16, copy=False), frame.color_trc)
            if high_range
            else pixels.astype(np.uint8, copy=False)
        )
        picture = np.rot90(picture, -rotation // 90)
        return np.ascontiguousarray(picture[:, ::-1] if mirrored else picture)


def even_size(info: VideoInfo, scale: Fraction) -> tuple[int, int]:
    """Width and height of the upright picture at this scale, even as encoders want them."""
    return _even(info.width * scale), _even(info.height * scale)


def _even(length: Fraction) -> int:
    return max(2, 2 * round(length / 2))
