"""A video with its labels drawn on every frame; sound, subtitles, chapters and timing are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from nightreel.reports.beside import Beside, Part, Subtitles, begin_of, carrier, write
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
from storage.whole_files import whole
from workers.footage.source import Source

if TYPE_CHECKING:
    from av.container.core import Chapter

LEAST_PX = 16
"""Shortest side of a picture that has room for any letter."""
QUALITY = "18"
"""x264's constant rate factor: visually lossless."""
ENDINGS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Files that can be written, and FFmpeg's muxer of each. The one that it takes for .m4v by itself
refuses most sound."""
_LONGEST_LINE_S = 10
"""Subtitles that are on when a part begins came up to so long before it."""
_LONGEST_LAG_S = 2
"""Sound comes at most so long after its pictures."""
_LONGEST_LEAD_S = 60
"""Sound that seems to begin longer before the first picture has another clock."""
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

    Frames keep their number and their distances (in running time where the recorder's clock jumps);
    the first stands at 0, or where the video's sound begins before it, as much later. Sound is
    copied, or encoded as AAC where players do not expect it in such a file; subtitles that `out`
    can hold, chapters, title and date are copied. `out` appears once it is complete. `progress` is
    told the time of each frame, `left_out` what of sound and subtitles is not carried over, and
    why. Raises FootageError, OSError, and ValueError for
    an ending that is neither .mp4, .m4v, .mov nor .mkv, for an output that is no regular file, for
    a picture too small for letters, and where no frame begins in the interval.
    """
    ending = out.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{out}: name a file that ends with .mp4, .m4v, .mov or .mkv")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out}: it is a device or a pipe, which cannot hold a video; name a file")
    try:
        with (
            Source(path, info.stream_index) as source,
            whole(out) as part,
            av.open(str(part), "w", format=ENDINGS[ending]) as output,
        ):
            copy = _Copy(source, info, told, output, start_us, end_us, scale)
            copy.add_beside(ending, left_out)
            return copy.run(progress)
    except av.error.FFmpegError as error:
        raise OSError(error.errno, f"{error.strerror}") from error


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
        # What becomes 0, on the file's clock, and how long before the first picture that is.
        self._begin = info.first_pts * info.time_base + self._start
        self._lead = Fraction(0)
        self._clock = Clock(info)
        width, height = even_size(info, scale)
        if min(width, height) < LEAST_PX:
            raise ValueError(
                f"{width} x {height} pixels have no room for a label: choose a larger scale"
            )
        self._upright = Upright(width, height)
        self._artist = Artist(told, width, height)
        self._video = self._add_video(width, height)
        self._beside: dict[int, Beside] = {}
        self._frames = 0
        self._latest: int | None = None

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

    def add_beside(self, ending: str, left_out: Callable[[str], None]) -> None:
        """Carry over what is beside the pictures, where a file of this ending can hold it: sound,
        subtitles, chapters and metadata."""
        container = self._source.stream.container
        if not self._start:
            self._begin_with_sound(container.streams.audio, left_out)
        part = Part(self._begin, self._length)
        for stream in container.streams:
            carried = carrier(stream, self._output, ending, part, self._clock)
            if carried is None:
                if stream.type in ("audio", "subtitle"):
                    context = stream.codec_context
                    codec = context.codec.canonical_name if context else "unknown"
                    left_out(
                        f"stream {stream.index} ({stream.type}, {codec}): {ending} cannot hold it"
                    )
                continue
            self._beside[stream.index] = carried
            for name in ("language", "title"):
                if name in stream.metadata:
                    carried.out.metadata[name] = stream.metadata[name]
        for name, value in container.metadata.items():
            if name.lower() not in _OF_THE_FILE:
                self._output.metadata[name] = value
        self._output.set_chapters(list(self._chapters(container.chapters())))

    @property
    def _length(self) -> Fraction | None:
        """Seconds that are written; None where all that follows is wanted."""
        return None if self._end is None else self._end - self._start + self._lead

    def _begin_with_sound(
        self, sounds: Iterable[AudioStream], left_out: Callable[[str], None]
    ) -> None:
        """Let the output begin with what is first, sound or picture: nothing can stand before 0."""
        first = min((t for one in sounds if (t := begin_of(one)) is not None), default=self._begin)
        lead = self._begin - first
        if lead > _LONGEST_LEAD_S:
            left_out(f"sound from {float(lead):.0f} s on before the first picture")
        elif lead > 0:
            # In whole ticks of the pictures, whose distances stay exact then.
            self._lead = math.ceil(lead / self._info.time_base) * self._info.time_base
            self._begin -= self._lead

    def _chapters(self, chapters: Iterable[Chapter]) -> Iterator[Chapter]:
        """Those that lie between start and end, from the start on."""
        length = self._length
        for chapter in chapters:
            tick = chapter["time_base"]
            if tick is None:
                continue
            first = max(chapter["start"] * tick - self._begin, Fraction(0))
            last = chapter["end"] * tick - self._begin
            last = last if length is None else min(last, length)
            if first < last:
                yield {**chapter, "start": round(first / tick), "end": round(last / tick)}

    def run(self, progress: Callable[[int], None]) -> int:
        """Copy everything; the number of frames."""
        subtitled = any(isinstance(one, Subtitles) for one in self._beside.values())
        begin = self._start - (_LONGEST_LINE_S if subtitled else 0)
        seek_before(self._source, self._info, int(begin * MICROSECONDS))
        picture_done = False
        for packet in self._source.packets(every_stream=True):
            if packet.stream_index in self._beside:
                self._beside[packet.stream_index].carry(packet)
            elif packet.stream_index != self._source.stream.index:
                continue
            elif not picture_done:
                frames = decoded_packet(self._source, self._clock, packet)
                picture_done = not self._carry_pictures(frames, progress)
            else:
                self._clock.mend(packet)
                if self._late(packet):
                    break
        if not picture_done:
            self._carry_pictures(decoded_packet(self._source, self._clock, None), progress)
        if not self._frames:
            end_s = self._info.duration_us / MICROSECONDS if self._end is None else self._end
            raise ValueError(
                f"no frame begins between {float(self._start):.3f} and {float(end_s):.3f} s that "
                "can be decoded: nothing is written"
            )
        self._encode(None)
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
        frame.pts = round((timed.t - self._start + self._lead) / self._info.time_base)
        if self._latest is not None:
            # Behind damage a decoder may give a frame after its time, which no encoder takes.
            frame.pts = max(frame.pts, self._latest + 1)
        self._latest = frame.pts
        frame.duration = timed.frame.duration
        self._encode(frame)
        self._frames += 1

    def _encode(self, frame: VideoFrame | None) -> None:
        for packet in self._video.encode(frame):
            write(self._output, packet)

    def _late(self, packet: Packet[Stream]) -> bool:
        """Whether after a packet of pictures nothing wanted can follow: streams are interleaved,
        sound lags pictures a bit."""
        ticks = packet.dts if packet.pts is None else packet.pts
        length = self._length
        if ticks is None or length is None:
            return False
        return ticks * packet.time_base - self._begin > length + _LONGEST_LAG_S
