"""A video with its labels drawn on every frame; sound, subtitles, chapters and timing are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.subtitles.stream import SubtitleStream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from nightreel.reports.drawing import Artist, Told
from nightreel.reports.frames import (
    MICROSECONDS,
    Clock,
    Timed,
    Upright,
    decoded_packet,
    even_size,
    seek_before,
)
from storage.records import VideoInfo
from workers.footage.source import Source

if TYPE_CHECKING:
    from av.container.core import Chapter

LEAST_PX = 16
"""Shortest side of a picture that has room for any letter."""
QUALITY = "18"
"""x264's constant rate factor: visually lossless."""
COPIED_SOUND = frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"})
"""Sound that players expect in MP4; any other is encoded anew as AAC."""


_CARRIED_SUBTITLES = {
    ".mkv": frozenset(
        {"subrip", "ass", "webvtt", "dvd_subtitle", "dvb_subtitle", "hdmv_pgs_subtitle"}
    )
}
_MP4_SUBTITLES = frozenset({"mov_text"})
_LONGEST_LINE_S = 10
"""Subtitles that are on when a part begins came up to so long before it."""
_OF_THE_FILE = frozenset(
    {"major_brand", "minor_version", "compatible_brands", "encoder", "duration", "timecode"}
)
"""Metadata that tell of the source's container and not of what it shows."""


def annotate(  # noqa: PLR0917
    path: str,
    info: VideoInfo,
    told: Told,
    out: Path,
    start_us: int = 0,
    end_us: int | None = None,
    scale: Fraction = Fraction(1),
    progress: Callable[[int], None] = lambda t_us: None,
    left_out: Callable[[str], None] = lambda stream: None,
) -> int:
    """Write the video, or [start_us, end_us) of it, with its labels drawn; return the number of
    frames.

    Frames keep their number and their timestamps (from `start_us` on), sound is copied, or encoded
    as AAC where MP4 players do not expect it; subtitles that `out` can hold, chapters, title and
    date are copied. `out` appears once it is complete. `progress` is told the time of each frame,
    `left_out` is told each stream of sound or subtitles that is not carried over. Raises
    FootageError, OSError, and ValueError for an ending that is neither .mp4, .m4v, .mov nor .mkv,
    for a picture too small for letters, and where no frame begins in the interval.
    """
    if out.suffix.lower() not in (".mp4", ".m4v", ".mov", ".mkv"):
        raise ValueError(f"{out}: name a file that ends with .mp4, .mov or .mkv")
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        with Source(path, info.stream_index) as source, av.open(str(part), "w") as output:
            copy = _Copy(source, info, told, output, start_us, end_us, scale)
            subtitles = _CARRIED_SUBTITLES.get(out.suffix.lower(), _MP4_SUBTITLES)
            copy.add_beside(subtitles, left_out)
            count = copy.run(progress)
        os.replace(part, out)
    except av.error.FFmpegError as error:
        raise OSError(error.errno, f"{error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return count


class _Copy:
    """Carries one video over: pictures drawn on, all else as it is."""

    def __init__(  # noqa: PLR0917
        self,
        source: Source,
        info: VideoInfo,
        told: Told,
        output: OutputContainer,
        start_us: int,
        end_us: int | None,
        scale: Fraction,
    ) -> None:
        self._source, self._info, self._output = source, info, output
        self._start = Fraction(start_us, MICROSECONDS)
        self._end = None if end_us is None else Fraction(end_us, MICROSECONDS)
        self._clock = Clock(info)
        width, height = even_size(info, scale)
        if min(width, height) < LEAST_PX:
            raise ValueError(
                f"{width} x {height} pixels have no room for a label: choose a larger scale"
            )
        self._upright = Upright(width, height)
        self._artist = Artist(told, width, height)
        self._video = self._add_video(width, height)
        self._beside: dict[int, _Sound | _Subtitles] = {}
        self._frames = 0

    def _add_video(self, width: int, height: int) -> VideoStream:
        rate = self._info.frame_rate or Fraction(25)
        video = self._output.add_stream("libx264", rate=rate.limit_denominator(1_000_000))
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"crf": QUALITY, "preset": "veryfast"}
        # The source's own ticks, or a variable frame rate would be rounded.
        video.time_base = video.codec_context.time_base = self._info.time_base
        self._matrix = Colorspace.ITU709 if height >= 720 else Colorspace.ITU601
        video.codec_context.colorspace = 1 if self._matrix == Colorspace.ITU709 else 6
        video.codec_context.color_range = ColorRange.MPEG
        return video

    def add_beside(self, subtitles: frozenset[str], left_out: Callable[[str], None]) -> None:
        """Carry over what is beside the pictures: sound, subtitles of these codecs, chapters and
        metadata."""
        container = self._source.stream.container
        for stream in container.streams:
            codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
            carried: _Sound | _Subtitles
            if isinstance(stream, AudioStream) and codec != "unknown":
                carried = _Sound(stream, self._output, self._info, self._start)
            elif isinstance(stream, SubtitleStream) and codec in subtitles:
                carried = _Subtitles(stream, self._output, self._info, self._start)
            else:
                if stream.type in ("audio", "subtitle"):
                    left_out(f"stream {stream.index} ({stream.type}, {codec})")
                continue
            self._beside[stream.index] = carried
            for name in ("language", "title"):
                if name in stream.metadata:
                    carried.out.metadata[name] = stream.metadata[name]
        for name, value in container.metadata.items():
            if name.lower() not in _OF_THE_FILE:
                self._output.metadata[name] = value
        self._output.set_chapters(list(self._chapters(container.chapters())))

    def _chapters(self, chapters: Iterable[Chapter]) -> Iterator[Chapter]:
        """Those that lie between start and end, from the start on."""
        begin = self._info.first_pts * self._info.time_base + self._start
        length = None if self._end is None else self._end - self._start
        for chapter in chapters:
            tick = chapter["time_base"]
            if tick is None:
                continue
            first = max(chapter["start"] * tick - begin, Fraction(0))
            last = chapter["end"] * tick - begin
            last = last if length is None else min(last, length)
            if first < last:
                yield {**chapter, "start": round(first / tick), "end": round(last / tick)}

    def run(self, progress: Callable[[int], None]) -> int:
        """Copy everything; the number of frames."""
        subtitled = any(isinstance(one, _Subtitles) for one in self._beside.values())
        begin = self._start - (_LONGEST_LINE_S if subtitled else 0)
        seek_before(self._source, self._info, int(begin * MICROSECONDS))
        picture_done = False
        for packet in self._source.packets(every_stream=True):
            if packet.stream_index in self._beside:
                self._beside[packet.stream_index].carry(packet, self._end)
            elif packet.stream_index == self._source.stream.index and not picture_done:
                frames = decoded_packet(self._source, self._clock, packet)
                picture_done = not self._carry_pictures(frames, progress)
            if picture_done and self._late(packet):
                break
        if not picture_done:
            self._carry_pictures(decoded_packet(self._source, self._clock, None), progress)
        if not self._frames:
            end_s = self._info.duration_us / MICROSECONDS if self._end is None else self._end
            raise ValueError(
                f"no frame begins between {float(self._start):.3f} and {float(end_s):.3f} s that "
                "can be decoded: nothing is written"
            )
        self._output.mux(self._video.encode(None))
        for carried in self._beside.values():
            carried.finish()
        return self._frames

    def _carry_pictures(self, frames: Iterator[Timed], progress: Callable[[int], None]) -> bool:
        """Whether more may be wanted."""
        for timed in frames:
            if self._end is not None and timed.t >= self._end:
                return False
            if timed.t >= self._start:
                self._carry_picture(timed)
                progress(timed.t_us)
        return True

    def _carry_picture(self, timed: Timed) -> None:
        drawn = self._artist.draw(self._upright.picture(timed.frame), timed.t_us)
        frame = VideoFrame.from_ndarray(np.asarray(drawn), "rgb24").reformat(
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_colorspace=self._matrix,
            dst_color_range=ColorRange.MPEG,
        )
        frame.time_base = self._info.time_base
        frame.pts = round((timed.t - self._start) / self._info.time_base)
        frame.duration = timed.frame.duration
        self._output.mux(self._video.encode(frame))
        self._frames += 1

    def _late(self, packet: Packet[Stream]) -> bool:
        """Whether nothing wanted can follow: streams are interleaved, sound lags pictures a bit."""
        t = _time_of(packet, self._info)
        return t is not None and self._end is not None and t > self._end + 2


class _Sound:
    """Carries one stream of sound over: packet for packet, or encoded anew."""

    def __init__(
        self, stream: AudioStream, output: OutputContainer, info: VideoInfo, start: Fraction
    ) -> None:
        self._output, self._info, self._start = output, info, start
        self._begin = info.first_pts * info.time_base + start
        context = stream.codec_context
        self.out: AudioStream
        self._decoder: AudioCodecContext | None = None
        if context.codec.canonical_name in COPIED_SOUND:
            self.out = output.add_stream_from_template(stream)
        else:
            self._decoder = context
            self.out = output.add_stream("aac", rate=context.sample_rate)

    def carry(self, packet: Packet[Stream], end: Fraction | None) -> None:
        """Write what of the packet lies between start and end."""
        t = _time_of(packet, self._info)
        if t is None or t < self._start or (end is not None and t >= end):
            return
        if self._decoder is None:
            ticks = round(self._begin / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts - ticks
            packet.dts = None if packet.dts is None else packet.dts - ticks
            packet.stream = self.out
            self._output.mux(packet)
            return
        try:
            frames = self._decoder.decode(packet)
        except av.error.FFmpegError:
            return
        for frame in frames:
            if frame.pts is not None and frame.time_base:
                frame.pts -= round(self._begin / frame.time_base)
            self._output.mux(self.out.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._decoder is not None:
            self._output.mux(self.out.encode(None))


class _Subtitles:
    """Carries one stream of subtitles over, packet for packet."""

    def __init__(
        self, stream: SubtitleStream, output: OutputContainer, info: VideoInfo, start: Fraction
    ) -> None:
        self._output, self._info, self._start = output, info, start
        self.out = output.add_stream_from_template(stream)

    def carry(self, packet: Packet[Stream], end: Fraction | None) -> None:
        """Write what of the packet is shown between start and end."""
        t = _time_of(packet, self._info)
        if t is None or not packet.time_base:
            return
        shown_until = t + (packet.duration or 0) * packet.time_base
        if end is not None:
            shown_until = min(shown_until, end)
        begin = max(t, self._start)
        if shown_until <= begin:
            return
        packet.pts = packet.dts = round((begin - self._start) / packet.time_base)
        packet.duration = round((shown_until - begin) / packet.time_base)
        packet.stream = self.out
        self._output.mux(packet)

    def finish(self) -> None:
        """Nothing is held back."""


def _time_of(packet: Packet[Stream], info: VideoInfo) -> Fraction | None:
    """Seconds from the first picture."""
    ticks = packet.dts if packet.pts is None else packet.pts
    if ticks is None or not packet.time_base:
        return None
    return ticks * packet.time_base - info.first_pts * info.time_base
