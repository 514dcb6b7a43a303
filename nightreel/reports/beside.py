"""What is beside the pictures: sound and subtitles, carried over on the pictures' clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av.error
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.codec import Codec
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.subtitles.stream import SubtitleStream

from nightreel.reports.frames import Clock
from workers.footage.clock import Unwrapper

_MP4_SOUND = frozenset({"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"})
_COPIED_SOUND = {
    ".mp4": _MP4_SOUND,
    ".m4v": _MP4_SOUND,
    ".mov": _MP4_SOUND - {"opus", "flac"},
    ".mkv": _MP4_SOUND,
}
"""Sound that players expect in files of these endings; any other is encoded anew as AAC."""
_AAC_LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1", "7.1", "7.1")
"""AAC's own arrangement for each number of channels; it has none for seven."""
_COPIED_SUBTITLES = {
    ".mkv": frozenset(
        {"subrip", "ass", "webvtt", "dvd_subtitle", "dvb_subtitle", "hdmv_pgs_subtitle"}
    )
}
_MP4_SUBTITLES = frozenset({"mov_text"})
_APART = 256
"""Packets of sound, some seconds of it, by which its jump may lie before or after the pictures'."""
_LEAST_STEP_S = Fraction(1, 1000)
"""No container writes two packets of a stream at one time, and Matroska counts milliseconds."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a video that is written, in seconds."""

    begin: Fraction
    """What becomes 0, on the file's clock."""
    length: Fraction | None
    """None where all that follows is wanted."""

    def holds(self, t: Fraction, lasting: Fraction = Fraction(0)) -> bool:
        """Whether something of what begins at this time from the part's beginning, and lasts so
        long, lies in it."""
        return (t >= 0 or t + lasting > 0) and (self.length is None or t < self.length)

    def moved(self, packet: Packet[Stream], shift: Fraction) -> Fraction | None:
        """Put a packet, with this shift of the file's clock, on the part's clock; seconds from the
        part's beginning, None for a packet without a time."""
        if (packet.pts is None and packet.dts is None) or not packet.time_base:
            return None
        ticks = round((shift - self.begin) / packet.time_base)
        packet.pts = None if packet.pts is None else packet.pts + ticks
        packet.dts = None if packet.dts is None else packet.dts + ticks
        shown = packet.dts if packet.pts is None else packet.pts
        return None if shown is None else shown * packet.time_base


def write(output: OutputContainer, packet: Packet[Stream]) -> None:
    """Write a packet, and those before it that waited for it: any of them may be damaged, and is
    then left out. Raises av.error.FFmpegError where the output cannot be written."""
    try:
        output.mux(packet)
    except (av.error.InvalidDataError, av.error.PatchWelcomeError):
        return


class Beside(Protocol):
    """One stream on its way into the output."""

    @property
    def out(self) -> Stream: ...

    def carry(self, packet: Packet[Stream]) -> None:
        """Write what of the file's next packet lies in the part."""

    def finish(self) -> None:
        """Write what is held back."""


def carrier(
    stream: Stream, output: OutputContainer, ending: str, part: Part, clock: Clock
) -> Sound | Subtitles | None:
    """What carries a stream into a file of this ending; None where that can hold neither the stream
    nor sound made of it."""
    if isinstance(stream, AudioStream) and _decodable(stream):
        if stream.codec_context.codec.canonical_name in _COPIED_SOUND[ending]:
            return CopiedSound(stream, output, part, clock)
        return EncodedSound(stream, output, part, clock)
    if isinstance(stream, SubtitleStream) and stream.codec_context is not None:
        copied = _COPIED_SUBTITLES.get(ending, _MP4_SUBTITLES)
        if stream.codec_context.codec.canonical_name in copied:
            return Subtitles(stream, output, part, clock)
    return None


def begin_of(stream: AudioStream) -> Fraction | None:
    """When a stream of sound begins, in seconds on the file's clock; None for one that cannot be
    carried over, or does not say."""
    if stream.start_time is None or not stream.time_base or not _decodable(stream):
        return None
    return stream.start_time * stream.time_base


def _decodable(stream: AudioStream) -> bool:
    context = stream.codec_context
    return (
        context is not None
        and context.sample_rate > 0
        and 0 < context.layout.nb_channels <= len(_AAC_LAYOUTS)
    )


class Sound(ABC):
    """A stream of sound. Where the recorder's clock jumps, it jumps for all streams at once, but
    their packets come in turn: sound keeps its clock until its own timestamps jump, and what has
    jumped before the pictures waits for them."""

    out: AudioStream

    def __init__(
        self, stream: AudioStream, output: OutputContainer, part: Part, clock: Clock
    ) -> None:
        self._output, self._part, self._clock = output, part, clock
        self._unwrapper = Unwrapper(
            stream.container.format.name, stream.time_base or Fraction(1, 1_000_000)
        )
        self._unwrapped = 0
        self._shift = clock.shift
        self._jumped = False
        self._apart = 0
        self._waiting: list[Packet[Stream]] = []
        self._written: Fraction | None = None

    def carry(self, packet: Packet[Stream]) -> None:
        """Write what of the file's next packet lies in the part."""
        _, dts = self._unwrapper.times(
            packet.pts, packet.dts, packet.duration, hidden=packet.is_discard
        )
        if dts is not None and packet.dts is not None:
            self._jumped |= dts - packet.dts != self._unwrapped
            self._unwrapped = dts - packet.dts
        self._waiting.append(packet)
        apart = self._jumped != (self._shift != self._clock.shift)
        self._apart = self._apart + 1 if apart else 0
        if not apart or self._apart > _APART:
            self._shift, self._jumped = self._clock.shift, False
        if not self._jumped:
            self._place()

    def finish(self) -> None:
        """Write what is held back."""
        self._shift = self._clock.shift
        self._place()

    def _place(self) -> None:
        waiting, self._waiting = self._waiting, []
        for packet in waiting:
            t = self._part.moved(packet, self._shift)
            if t is not None and self._part.holds(t, (packet.duration or 0) * packet.time_base):
                self._take(packet)

    @abstractmethod
    def _take(self, packet: Packet[Stream]) -> None:
        """Write a packet of the part."""

    def _write(self, packet: Packet[Stream]) -> None:
        """Write a packet, unless its time is written already (recordings that overlap, damage)."""
        packet.dts = packet.pts if packet.dts is None else packet.dts
        if packet.dts is None or not packet.time_base:
            return
        t = packet.dts * packet.time_base
        if self._written is not None and t < self._written + _LEAST_STEP_S:
            return
        self._written = t
        packet.stream = self.out
        write(self._output, packet)


class CopiedSound(Sound):
    """Sound that is copied, packet for packet, save what does not decode: players would not either,
    and containers that read its headers fail on it."""

    def __init__(
        self, stream: AudioStream, output: OutputContainer, part: Part, clock: Clock
    ) -> None:
        super().__init__(stream, output, part, clock)
        self._decoder = stream.codec_context
        self.out = output.add_stream_from_template(stream)

    def _take(self, packet: Packet[Stream]) -> None:
        try:
            self._decoder.decode(packet)
        except av.error.FFmpegError:
            return
        self._write(packet)


class EncodedSound(Sound):
    """Sound that is encoded anew as AAC: as many channels, the nearest rate that AAC has."""

    def __init__(
        self, stream: AudioStream, output: OutputContainer, part: Part, clock: Clock
    ) -> None:
        super().__init__(stream, output, part, clock)
        self._stream = stream
        self._decoder = stream.codec_context
        rate = self._decoder.sample_rate
        rates = Codec("aac", "w").audio_rates or [rate]
        self.out = output.add_stream(
            "aac",
            rate=min(rates, key=lambda one: abs(one - rate)),
            layout=_AAC_LAYOUTS[self._decoder.layout.nb_channels - 1],
        )
        self._resampler: AudioResampler | None = None
        self._form: tuple[str, str, int] | None = None
        self._latest: Fraction | None = None

    def _take(self, packet: Packet[Stream]) -> None:
        self._encode(self._decoded(packet))

    def finish(self) -> None:
        """Write what decoder, resampler and encoder hold back."""
        super().finish()
        self._encode(self._decoded(None))
        self._resample(None)
        self._encoded(None)

    def _decoded(self, packet: Packet[Stream] | None) -> list[AudioFrame]:
        try:
            return self._decoder.decode(packet)
        except av.error.FFmpegError:
            return []

    def _encode(self, frames: Iterable[AudioFrame]) -> None:
        for frame in frames:
            # Decoders that are emptied leave out the time base.
            tick = frame.time_base or self._stream.time_base
            if frame.pts is None or not tick:
                continue
            t = frame.pts * tick
            if self._latest is not None and t <= self._latest:
                continue
            self._latest = t
            frame.time_base = Fraction(1, frame.sample_rate)
            frame.pts = round(t * frame.sample_rate)
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if form != self._form:
                # Of recordings that are joined, each may have its own.
                self._resample(None)
                self._form, self._resampler = form, self._new_resampler()
            self._resample(frame)

    def _new_resampler(self) -> AudioResampler:
        context = self.out.codec_context
        return AudioResampler(context.format, context.layout, context.sample_rate)

    def _resample(self, frame: AudioFrame | None) -> None:
        if self._resampler is not None:
            for resampled in self._resampler.resample(frame):
                if resampled is not None:
                    self._encoded(resampled)

    def _encoded(self, frame: AudioFrame | None) -> None:
        for packet in self.out.encode(frame):
            # Of a long packet that only ends in the part, no more than the encoder's own run-up.
            if packet.pts is None or packet.pts + (packet.duration or 0) >= 0:
                self._write(packet)


class Subtitles:
    """A stream of subtitles that is copied, packet for packet. They are too sparse to tell a jump
    of their own clock, so they have the one that the pictures have beside them."""

    def __init__(
        self, stream: SubtitleStream, output: OutputContainer, part: Part, clock: Clock
    ) -> None:
        self._output, self._part, self._clock = output, part, clock
        self._free = Fraction(0)
        self.out: SubtitleStream = output.add_stream_from_template(stream)

    def carry(self, packet: Packet[Stream]) -> None:
        """Write what of the packet is shown in the part."""
        t = self._part.moved(packet, self._clock.shift)
        if t is None:
            return
        lasting = (packet.duration or 0) * packet.time_base
        begin, end = max(t, self._free), t + lasting
        if self._part.length is not None:
            end = min(end, self._part.length)
        # Pictures of text last until the next one, and have no duration.
        if end <= begin if lasting else not self._part.holds(t):
            return
        packet.pts = packet.dts = round(begin / packet.time_base)
        packet.duration = round((end - begin) / packet.time_base) if lasting else 0
        self._free = begin + _LEAST_STEP_S
        packet.stream = self.out
        write(self._output, packet)

    def finish(self) -> None:
        """Nothing is held back."""
