"""What a video file is, found by reading its packets once and decoding one frame."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import av.error
import numpy as np
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame

from storage.records import VideoInfo, shown_path
from workers.footage.asf import header_end_us
from workers.footage.holes import are_tiled, position
from workers.footage.index import KEYFRAMES_COMPARED, Index, TooManyPacketsError, read_index
from workers.footage.intra import HEAD_BYTES, marks_everything, may_hide
from workers.footage.memory import bounded_memory
from workers.footage.picture import orientation, upright_size
from workers.footage.rejection import FootageError, Rejected, RejectKind, rejection
from workers.footage.riff import HEAD_BYTES as CHUNK_HEAD_BYTES
from workers.footage.riff import empty_slots
from workers.footage.sample import scaled_one
from workers.footage.skim import lacks_tables
from workers.footage.source import Source
from workers.footage.trial import Landmarks

__all__ = ["FootageError", "RejectKind", "Rejected", "probe"]

MAX_PACKETS = 2**25
"""Packets of one stream, 77 hours at 120 frames a second; above it the file is refused."""

MAX_SCANNED_BYTES = 2**40
"""Bytes that are read for an index at most: above a tebibyte, hours of reading, a file is refused
unless it is an MP4 whose tables tell its packets."""

MAX_MEMORY_BYTES = 2**31
"""Memory that a probe may take beyond what its process has. A few bytes of a hostile file announce
tables of gigabytes; true ones of four days at 60 frames a second, and pictures of 8192 x 4320 at
10 bits, fit."""

_PEEKED_PACKETS = 240
"""Packets tried for the first picture; a stream joined in the middle decodes from its keyframe."""
_TRUNCATED_US = 250_000
"""A shortfall against the header below this is rounding, not a truncated file."""
_REST_BYTES, _REST_SHARE = 2**18, 10
"""What may lie behind the pictures untold, in bytes and as a part of the file: indexes and tags."""
_LONGEST_US = 100 * 31_556_952_000_000
"""A century: a video that lasts longer, or a header that says so, is damaged."""
_JUMP_US = 10_000_000
"""A pause between two frames from which on a person should know of it."""

_TRANSFERS = {
    1: "bt709",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    11: "iec61966-2-4",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    17: "smpte428",
    18: "arib-std-b67",
}
"""ITU-T H.273 table 3, by the names FFmpeg prints."""
_FOREIGN_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 of constant luminance",
    11: "SMPTE ST 2085",
    12: "a matrix of its primaries",
    13: "a matrix of its primaries, of constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
"""ITU-T H.273 table 4: those that no scaler of FFmpeg converts."""


def probe(path: str, beat: Callable[[], None] = lambda: None) -> tuple[VideoInfo, Index]:
    """The facts about a video file and the index of its analysed stream.

    `path` may hold surrogate escapes for bytes that are not UTF-8. Reads the whole file once; of
    an MP4 that is not fragmented, its tables and little else. `beat` is called at every step.
    Raises Rejected, with cause and remedy in one line, for what cannot be analysed, and for what
    needs more than MAX_MEMORY_BYTES of memory.
    """
    name = shown_path(os.fsencode(path))
    try:
        with bounded_memory(MAX_MEMORY_BYTES):
            return _probed(path, name, beat)
    except MemoryError as error:
        raise rejection(path, error) from error


def _probed(path: str, name: str, beat: Callable[[], None]) -> tuple[VideoInfo, Index]:
    with Source(path, skimmable=True, beat=beat) as source:
        if not source.skims and source.size > MAX_SCANNED_BYTES:
            raise Rejected(
                RejectKind.TOO_LARGE,
                f"{name}: all of its {source.size} bytes would have to be read for an index; copy "
                "it into MP4, or cut it into parts",
            )
        if source.header_frames > MAX_PACKETS:
            raise _too_many_packets(name)
        peek = _Peek(source, beat)
        landmarks = Landmarks()
        stream = source.stream
        # A header that tells only the file's duration needs the other streams for comparison.
        every_stream = _stream_duration(source) is None or are_tiled(source.container)
        packets = itertools.chain(
            source.packets(every_stream=every_stream, lost=True),
            source.last_promised(),
        )
        try:
            index = read_index(
                landmarks.passing(peek.passing(packets), stream.index),
                stream_index=stream.index,
                container=source.container,
                codec=source.codec,
                extradata=source.extradata,
                time_base=stream.time_base or Fraction(1, 1_000_000),
                frame_rate=_nominal_rate(source),
                delay=lambda: peek.delay,
                fields=lambda: peek.frame is not None and peek.frame.interlaced_frame,
                limit=MAX_PACKETS,
                holds=source.holds,
                holes=source.holes(every_stream=every_stream),
            )
        except TooManyPacketsError:
            raise _too_many_packets(name) from None
        except Rejected:
            raise
        except FootageError as error:
            raise Rejected(RejectKind.UNREADABLE, str(error)) from error
        if index.sequential_reason is None:
            index = replace(index, sequential_reason=_doubt(source, index, landmarks, beat))
        if len(index.pts) == 0:
            raise Rejected(
                RejectKind.NO_FRAMES, f"{name}: its video stream holds no frames; copy it again"
            )
        if source.container == "avi" and peek.end is not None:
            slots = empty_slots(path, peek.end, stream.index)
            index = index.lasting(slots)
            peek.end += CHUNK_HEAD_BYTES * slots
        if index.cuts and lacks_tables(path):
            raise Rejected(
                RejectKind.UNREADABLE,
                f"{name}: it ends in the middle of its tables, so nothing tells what its edits "
                "show when; copy it again",
            )
        context = stream.codec_context
        if peek.frame is None and not context.width * context.height:
            raise Rejected(
                RejectKind.NO_FRAMES, f"{name}: no picture of it decodes; convert it to H.264"
            )
        info = _describe(source, index, peek)
        return replace(
            info, warnings=(*info.warnings, *_warnings_of_the_rest(source, peek.end))
        ), index


def _doubt(
    source: Source, index: Index, landmarks: Landmarks, beat: Callable[[], None]
) -> str | None:
    """Why a file that its index would allow to cut is read in one piece all the same."""
    intra_only = source.stream.codec_context.codec.intra_only
    if marks_everything(source.codec, index.keyframe, intra_only=intra_only):
        return "too many frames are marked as keyframes (a lost keyframe table)"
    if source.fragments and source.fragments.passed_over:
        return "fragments repeat or are out of order"
    # Where packets were skimmed the same tables that told of them lead the seeks.
    if not source.skims and not landmarks.are_found(source.path, source.stream.index, beat):
        return "seeking leads to other frames (a damaged or missing index)"
    return None


def _too_many_packets(name: str) -> Rejected:
    text = f"{name}: more than {MAX_PACKETS} packets; cut the file into parts"
    return Rejected(RejectKind.TOO_LARGE, text)


@dataclass
class _Peek:
    """Decodes the first picture out of packets that pass by; then no picture is read any more."""

    source: Source
    beat: Callable[[], None]
    frame: VideoFrame | None = None
    delay: int = 0
    """Packets that were decoded before the one that brought the first picture."""
    end: int | None = None
    """Offset at which the stream's last packet ends, if known."""

    def passing(self, packets: Iterable[Packet[Stream]]) -> Iterator[Packet[Stream]]:
        left, skimming = _PEEKED_PACKETS, may_hide(self.source.codec)
        for packet in packets:
            self.beat()
            analysed = packet.stream_index == self.source.stream.index
            if analysed and (at := position(packet)) is not None:
                self.end = at + packet.size
            if self.frame is None and left and analysed:
                left -= 1
                self.frame = self._decode(packet)
                self.delay += self.frame is None and packet.size > 0
            elif not skimming:
                skimming = True
                self.source.skim(KEYFRAMES_COMPARED, HEAD_BYTES)
            yield packet
        if self.frame is None and left:
            self.frame = self._decode(None)

    def _decode(self, packet: Packet[Stream] | None) -> VideoFrame | None:
        try:
            frames = self.source.stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            return None
        return frames[0] if frames else None


def _nominal_rate(source: Source) -> Fraction:
    """Frames a second of a stream without timestamps, by its own headers."""
    stream = source.stream
    return stream.guessed_rate or stream.average_rate or Fraction(25)


def _describe(source: Source, index: Index, peek: _Peek) -> VideoInfo:
    stream, context, frame = source.stream, source.stream.codec_context, peek.frame
    pixel_format = frame.format if frame else context.format
    rotation, mirrored = orientation(frame) if frame else (0, False)
    width, height = upright_size(
        frame.width if frame else context.width,
        frame.height if frame else context.height,
        source.sample_aspect_ratio,
        rotation,
    )
    span_us = scaled_one(index.end_pts - index.first_pts, index.time_base * 1_000_000)
    span = int(index.pts.max()) - index.first_pts
    frame_rate = (len(index.pts) - 1) / (span * index.time_base) if span else None
    header_us = _header_us(source, index)
    if header_us is not None and header_us > _LONGEST_US:
        header_us = None
    missing_us = max(
        _missing_us(source, index, span_us, header_us, frame_rate),
        _behind_us(source, index, peek.end) - span_us,
    )
    if span_us + missing_us > _LONGEST_US:
        raise Rejected(
            RejectKind.TOO_LARGE,
            f"{shown_path(os.fsencode(source.path))}: its timestamps are more than a hundred years "
            "apart; convert it, so that they are written anew",
        )
    indexed_us = max(1, span_us)  # What lasts no time could not be divided into ranges.
    return VideoInfo(
        container=source.container,
        codec=source.codec,
        pixel_format=pixel_format.name if pixel_format else "unknown",
        stream_index=stream.index,
        stream_reason=source.stream_reason,
        width=width,
        height=height,
        rotation=rotation,
        time_base=index.time_base,
        frame_rate=frame_rate,
        frame_count=index.frames,
        first_pts=index.first_pts,
        duration_us=indexed_us + missing_us,
        indexed_us=indexed_us,
        header_us=header_us,
        sequential_reason=index.sequential_reason,
        interlaced=source.interlaced or (frame is not None and frame.interlaced_frame),
        bit_depth=pixel_format.components[0].bits if pixel_format else 8,
        transfer=_TRANSFERS.get(frame.color_trc, "unknown") if frame else "unknown",
        warnings=(
            *_warnings_of_time(span_us, header_us, missing_us, frame_rate),
            *_warnings_of_packets(source, index, frame),
            *_warnings_of_colours(frame),
            *(("mirrored by its metadata, and shown so",) if mirrored else ()),
        ),
        created=source.created,
    )


def _warnings_of_colours(frame: VideoFrame | None) -> Iterator[str]:
    if frame and (foreign := _FOREIGN_MATRICES.get(frame.colorspace)):
        yield f"its colours are coded by {foreign} and shown wrong; convert it to BT.709"


def _header_us(source: Source, index: Index) -> int | None:
    """The video's duration by the header; where only the file's is told, that from its start on."""
    stream = source.stream
    if source.container == "avi" and source.header_frames and stream.time_base:
        # FFmpeg shortens the stream's duration to what the file's size makes likely.
        return scaled_one(source.header_frames, stream.time_base * 1_000_000)
    duration, file_us = _stream_duration(source), _file_us(source)
    if duration is not None and stream.time_base:
        # A fragmented MP4's may be its end, of a piece out of the middle of a live stream.
        late = max(0, index.first_dts) if source.fragments else 0
        lasting = index.end_pts - index.first_pts
        ticks = min((duration, duration - late), key=lambda told: abs(told - lasting))
        return scaled_one(max(0, ticks), stream.time_base * 1_000_000)
    if file_us is None:
        return None
    late_us = scaled_one(max(0, index.first_pts), index.time_base * 1_000_000)
    return file_us - late_us if late_us < file_us else file_us


def _stream_duration(source: Source) -> int | None:
    """The stream's own duration by the header, in its time base. ASF tells the file's alone."""
    return None if source.container == "asf" else source.stream_duration


def _file_us(source: Source) -> int | None:
    """Duration of the longest stream by the header, in microseconds."""
    return header_end_us(source.path) if source.container == "asf" else source.container_us


def _behind_us(source: Source, index: Index, end: int | None) -> int:
    """How long a fragmented MP4 lasts at least, by fragments behind the last that can be read; 0
    without any."""
    if source.fragments is None or end is None or index.jumps:
        return 0
    start = source.fragments.last_behind(end)
    if start is None or start < index.first_dts:
        return 0
    behind_us = scaled_one(start - index.end_pts, index.time_base * 1_000_000)
    if behind_us < _TRUNCATED_US:
        return 0
    return scaled_one(start - index.first_dts, index.time_base * 1_000_000)


def _missing_us(
    source: Source,
    index: Index,
    indexed_us: int,
    header_us: int | None,
    frame_rate: Fraction | None,
) -> int:
    """Microseconds that the container promises and the file does not hold."""
    if source.skims:
        # The header may cover time before the first picture, and edits longer than what they show.
        promised = index.promised_pts - index.first_pts
        return scaled_one(promised, index.time_base * 1_000_000) - indexed_us
    if index.moved:
        return 0  # Recordings were joined, and the header tells of one.
    tolerance_us = max(_TRUNCATED_US, int(3_000_000 / frame_rate) if frame_rate else 0)
    missing_us = (header_us or 0) - indexed_us
    if missing_us <= tolerance_us:
        return 0
    if source.header_frames and index.packets >= source.header_frames:
        return 0  # Every frame of the container's table was there: its duration is wrong.
    if _stream_duration(source) is None:
        # The file's duration covers its sound, and sound may outlast the picture.
        file_us = _file_us(source) or 0
        return 0 if index.others_end_us >= file_us - tolerance_us else missing_us
    return missing_us


def _warnings_of_time(
    indexed_us: int, header_us: int | None, missing_us: int, frame_rate: Fraction | None
) -> Iterator[str]:
    frame_us = int(1_000_000 / frame_rate) if frame_rate else 1_000_000
    if missing_us:
        yield f"truncated: the container promises {missing_us / 1e6:.3f} s more than the file holds"
    elif header_us is not None and abs(header_us - indexed_us) > frame_us:
        yield f"header says {header_us / 1e6:.3f} s, the packets {indexed_us / 1e6:.3f} s"


def _warnings_of_the_rest(source: Source, end: int | None) -> Iterator[str]:
    """What is told of a file that goes on behind the last packet of its pictures."""
    rest = source.size - (source.size if end is None else end)
    told = source.skims or source.zeros
    if not told and rest > max(_REST_BYTES, source.size // _REST_SHARE):
        kinds = "sound, other streams, or what cannot be read"
        yield f"no picture of this stream in its last {rest / 1e6:.1f} MB: {kinds}"


def _warnings_of_packets(source: Source, index: Index, frame: VideoFrame | None) -> Iterator[str]:
    hidden = index.packets - index.frames
    if hidden:
        fields = frame is not None and frame.interlaced_frame
        kinds = (
            "second fields, repeated frames" if fields else "edit list, hidden or repeated frames"
        )
        yield f"{hidden} packets are not presented ({kinds})"
    if source.fragments and source.fragments.passed_over:
        number = source.fragments.passed_over
        yield f"{number} packets passed over: their fragments repeat others or are out of order"
    if lost := int(index.lost.sum()):
        if source.skims:
            yield f"truncated: {lost} frames before the last one lie beyond the file's end"
        else:
            yield f"{lost} frames are missing"
    damaged = index.marked_damaged + source.damaged_reads
    if damaged:
        yield f"{damaged} damaged packets"
    if source.zeros:
        yield f"its last {source.zeros / 1e6:.0f} MB are zeros, where reading ended"
    if frame is None:
        yield "no picture decodes at the start of the stream"
    if len(index.pts) > 1:
        pause = int(np.diff(np.sort(index.pts)).max()) * index.time_base
        if pause * 1_000_000 > _JUMP_US:
            yield f"no frame for {float(pause):.1f} s at one place"
