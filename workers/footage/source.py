"""A video file opened safely: files only, video containers only, one stream, packets until the end
of the file whatever is damaged in between."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from io import FileIO
from types import TracebackType
from typing import Self, cast

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition, Stream
from av.video.stream import VideoStream

from storage.records import shown_path
from workers.footage.avi import Chunks, LostChunks
from workers.footage.chains import lead_on
from workers.footage.fragments import Fragments, with_other_recordings
from workers.footage.holes import Holes, are_numbered, are_tiled
from workers.footage.rejection import FootageError, Rejected, RejectKind, is_nonsense, rejection
from workers.footage.skim import (
    BUFFER_BYTES,
    Extent,
    Promise,
    SkimmedFile,
    media_extents,
    promised,
)
from workers.footage.theora import stores_every_frame, timed_by_page

MAX_PIXELS = 8192 * 8192
"""Coded pictures above this are refused: one of them in memory is 100 MB and more."""

_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,av1,ivf,flv,asf,ogg,gif,mxf,gxf,"
    "dv,rm,nut,mjpeg,swf,vc1,vc1test,wtv,3gp,y4m,yuv4mpegpipe,lxf,nsv,nuv,cine,avs2,apng"
)
"""Containers that hold the pictures themselves. Playlists, concatenation lists, image sequences and
devices name other files, so none of them stands here."""
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS, "enable_drefs": "0"}
_LISTS = (b"#EXTM3U", b"ffconcat", b"<MPD", b"[playlist]", b"v=0\r\n", b"v=0\n", b"RTSPtext")

_CREATED = ("com.apple.quicktime.creationdate", "creation_time", "date_recorded", "date")
"""Metadata that tell when something was recorded; Apple's is the only one in local time."""
_LONGEST_CREATED = 100

_WITHOUT_FIELDS = frozenset(("huffyuv", "ffvhuff"))
"""Codecs of captured video whose pictures do not say whether they are interlaced."""
_ENDS_CHECKED = frozenset(("wmv1", "wmv2"))
"""Codecs of which FFmpeg compares the end of a frame with that of its packet if it is told to. Most
damage moves it, for they have no marks in between; whole packets end with their frame."""
_PROGRESSIVE = 1
"""FFmpeg's field orders: unknown, progressive, and four that are interlaced."""

_OPEN_TIMEOUT_S = 60.0
_READ_TIMEOUT_S = 30.0
_TAIL_BYTES, _RESERVED_BYTES = 2**20, 2**26
"""Bytes behind a packet that may hold those of other streams and tables, and bytes of zeros behind
them, at least, that a search for packets may have taken too long to pass."""
_PIECE_BYTES = 2**20
_LARGEST_FILE = 2**62
"""Offsets from here on are damage."""
_MOST_LOST_BYTES, _LOST_PACKET_BYTES = 2**32, 2**12
"""Bytes of lost packets at the end that are read one by one, each with some for its own cost: after
ten hours of them only the last count."""
_MOST_BETWEEN = 2**36
"""Bytes of lost packets that are passed over for the sake of others behind them."""
_MARKS_COUNTED, _MARKED_SHARE = 256, 4
"""Packets at the beginning by which marks of corruption are judged, and the part of them that may
be marked."""
_CHAINED = frozenset(("ivf",))
"""Containers in which only a packet's size tells where the next one is. They have no tables, so a
read that lacks memory was told an absurd size, and what follows is not found."""
_FAILED_READS = 16
"""Reads that fail in a row, after which the rest of the file counts as unreadable."""


def _suitable_size(path: str) -> int:
    """A file's size; refuses what can be told without FFmpeg: no file, no bytes, a list of other
    files."""
    name = shown_path(os.fsencode(path))
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise Rejected(RejectKind.NOT_A_FILE, f"{name}: not a regular file; give a video file")
    if state.st_size == 0:
        raise Rejected(RejectKind.EMPTY, f"{name}: empty (0 bytes); copy it again")
    with open(path, "rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(_LISTS) or (head.startswith(b"<?xml") and b"<MPD" in head):
        raise Rejected(
            RejectKind.FORBIDDEN_FORMAT,
            f"{name}: a playlist, which names other files, is not opened; give the videos it names",
        )
    return state.st_size


def _is_jpeg_in_a_row(path: str) -> bool:
    """Whether a file is bare motion JPEG, which FFmpeg takes for a series of picture files."""
    if not path.lower().endswith((".mjpeg", ".mjpg")):
        return False
    with open(path, "rb") as file:
        return file.read(3) == b"\xff\xd8\xff"


class Source:
    """An open video file and its analysed stream. A context manager; `close` may be repeated."""

    def __init__(
        self,
        path: str,
        stream_index: int | None = None,
        *,
        skimmable: bool = False,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Open a file and choose its stream: the given one, else the default or largest.

        `skimmable` readies it for `skim`; `beat` is then called for every read. Raises Rejected,
        and never an error of the operating system or of FFmpeg.
        """
        self.path = path
        self.size = 0
        """Bytes of the file when it was opened."""
        self.damaged_reads = 0
        """Reads that failed and were passed over."""
        self.zeros = 0
        """Bytes at the file's end in which no packet was found in time, and which are zeros."""
        self._pinned = stream_index
        self.beat = beat
        self._skimmed: SkimmedFile | None = None
        self._media: list[Extent] | None = None
        self._promise: Promise | None = None
        self._left_at: int | None = None
        self._lost_row = 0
        self._open(skimmable)

    def _open(self, skimmable: bool) -> None:
        try:
            self.size = _suitable_size(self.path)
            self._media = media_extents(self.path)
            ends = [end for _start, end in self._media or () if end < _LARGEST_FILE]
            media_end = max(ends, default=0)
            if self._media is not None and (skimmable or media_end > self.size):
                # After packets that are missing, others come with wrong timestamps.
                self._skimmed = SkimmedFile(self.path, self.beat)
                self._skimmed.promised = lambda: media_end
            self._container = self._opened()
        except Rejected:
            raise
        except (OSError, ValueError, MemoryError, av.error.FFmpegError) as error:
            self._close_skimmed()
            raise rejection(self.path, error) from error
        try:
            self.container: str = self._container.format.name
            self.stream, self.stream_reason = self._choose(self._pinned)
            self._configure()
            self.fragments: Fragments | None = None
            """Of an MP4 or QuickTime file without one table of all its packets."""
            if self._media is None and self.container.startswith("mov"):
                self.fragments = Fragments(self.path, self.stream.id, self.beat)
            slotted = self.container == "avi" and not stores_every_frame(self.codec)
            self._chunks = Chunks(self.path, self.stream) if slotted else None
            if self._skimmed is not None:
                self._skimmed.promised = lambda: self._promised().end
        except BaseException:
            self.close()
            raise

    def _opened(self) -> InputContainer:
        # Where there is a table of keyframes, it is asked and not a parser of packets, so that
        # indexes and decoders agree on them, whether packets were read or skimmed.
        options = _OPTIONS if self._media is None else _OPTIONS | {"fflags": "+noparse"}
        return av.open(
            # The prefix keeps names such as `concat:a|b`, `-` and `http://...` names of files.
            self._skimmed or f"file:{self.path}",
            "r",
            format="mjpeg" if _is_jpeg_in_a_row(self.path) else None,
            container_options=options,
            # FFmpeg decodes a picture of a stream whose tables say too little, be it a cover.
            options={"max_pixels": str(MAX_PIXELS)},
            metadata_errors="replace",
            timeout=(_OPEN_TIMEOUT_S, _READ_TIMEOUT_S),
            buffer_size=BUFFER_BYTES,
        )

    def rewind(self) -> None:
        """Go back to the first packet by opening the file again, which every container can do."""
        self.close()
        self._open(skimmable=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._container.close()
        self._close_skimmed()

    def _close_skimmed(self) -> None:
        if self._skimmed is not None:
            self._skimmed.close()
            self._skimmed = None

    @property
    def skims(self) -> bool:
        """Whether `skim` spares reading the pictures."""
        return self._skimmed is not None

    def skim(self, keyframes: int, head_bytes: int) -> None:
        """From now on give packets without their pictures, where the container's tables suffice:
        zeros, except for the heads of the first `keyframes` keyframes."""
        if self._skimmed is None or self._media is None:
            return
        marked = (entry for entry in self.stream.index_entries if entry.is_keyframe)
        heads = [
            (entry.pos, entry.pos + min(entry.size, head_bytes))
            for entry in itertools.islice(marked, keyframes)
        ]
        self._skimmed.skip(self._media, but=heads)

    @property
    def promised_size(self) -> int:
        """Bytes of the file by its tables, which in MP4 and QuickTime may tell of packets beyond
        the end of one that is cut off."""
        return max(self.size, self._promised().end)

    def _promised(self) -> Promise:
        if self._promise is None:
            self._promise = Promise()
            if self._media is not None:
                self._promise = promised(self.stream.index_entries, self.size, self.beat)
        return self._promise

    def holds(self, packet: Packet[Stream]) -> bool:
        """Whether a packet that was read is in the file, and not only in its tables."""
        return self._skimmed is None or (packet.pos or 0) + packet.size <= self.size

    def holes(self, *, every_stream: bool = False) -> Holes | LostChunks | None:
        """Finds frames that are missing among the packets (or those of all streams) from here on;
        None where nothing tells of them."""
        if self._chunks is not None:
            return LostChunks()
        tiled = every_stream and are_tiled(self.container)
        told = self.fragments is not None or stores_every_frame(self.codec)
        if not (told or tiled or are_numbered(self.container)):
            return None
        lead_on = self._lead_on if tiled else None
        return Holes(self.container, self.codec, self.fragments, lead_on=lead_on)

    def _lead_on(self, begin: int, end: int, to: int) -> bool:
        try:
            return lead_on(self.path, self.container, begin, end, to)
        except OSError as error:
            raise rejection(self.path, error) from error

    def marks_are_rare(self) -> bool:
        """Whether packets marked as corrupt are exceptions, by the beginning of the file. Some
        muxers count wrongly, or write wrong lengths, and nearly all are."""
        with Source(self.path, self.stream.index, beat=self.beat) as source:
            marks = [one.is_corrupt for one in itertools.islice(source.packets(), _MARKS_COUNTED)]
        return _MARKED_SHARE * sum(marks) <= len(marks)

    @property
    def lacks_frames(self) -> bool:
        """Whether what has not come as a packet may never have been in the file."""
        if self._chunks is not None:
            return self._chunks.lost
        return are_tiled(self.container) or self.holes() is not None

    @property
    def codec(self) -> str:
        """The codec by the name of its format, whichever decoder is used."""
        return self.stream.codec_context.codec.canonical_name

    @property
    def extradata(self) -> bytes:
        """The stream's global headers."""
        return self.stream.codec_context.extradata or b""

    @property
    def sample_aspect_ratio(self) -> Fraction:
        """Width of a pixel by its height; 1 where unknown or implausible."""
        return _plausible(self.stream.sample_aspect_ratio)

    @property
    def decoded_aspect_ratio(self) -> Fraction:
        """The same by the headers that the decoder has read last."""
        return _plausible(self.stream.codec_context.sample_aspect_ratio)

    @property
    def interlaced(self) -> bool:
        """Whether the container says so of a codec that knows of no fields; others' pictures tell
        for themselves, and know it better."""
        return (
            self.codec in _WITHOUT_FIELDS and self.stream.codec_context.field_order > _PROGRESSIVE
        )

    @property
    def header_frames(self) -> int:
        """Frames of the stream by the container's header or table; 0 if unknown."""
        return self.stream.frames

    @property
    def stream_duration(self) -> int | None:
        """The stream's duration in its time base by the header."""
        return self.stream.duration

    @property
    def container_us(self) -> int | None:
        """Duration of the longest stream by the header, in microseconds."""
        return self._container.duration

    @property
    def created(self) -> str | None:
        """When it was recorded by the container's or the stream's metadata, as written there."""
        for tags in (self._container.metadata, self.stream.metadata):
            known = {name.casefold(): value for name, value in tags.items()}
            for name in _CREATED:
                if known.get(name):
                    return known[name][:_LONGEST_CREATED]
        return None

    def _choose(self, index: int | None) -> tuple[VideoStream, str]:
        name = shown_path(os.fsencode(self.path))
        still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
        streams = [s for s in self._container.streams.video if not s.disposition & still]
        if not streams:
            raise Rejected(
                RejectKind.NO_VIDEO_STREAM, f"{name}: no video stream (sound or pictures only)"
            )
        if index is not None:
            for stream in streams:
                if stream.index == index:
                    return stream, "pinned"
            raise Rejected(
                RejectKind.NO_VIDEO_STREAM, f"{name}: stream {index} is gone; probe it again"
            )
        reason = "only" if len(streams) == 1 else "largest"
        defaults = [s for s in streams if s.disposition & Disposition.default]
        if len(defaults) == 1 < len(streams):
            return defaults[0], "default"
        area = {s.index: _area(s) for s in streams}
        return max(defaults or streams, key=lambda s: (area[s.index], -s.index)), reason

    def _configure(self) -> None:
        name = shown_path(os.fsencode(self.path))
        context = self.stream.codec_context
        if cast(object, context) is None:
            raise Rejected(
                RejectKind.UNKNOWN_CODEC, f"{name}: no decoder for its codec; convert it to H.264"
            )
        if _area(self.stream) > MAX_PIXELS:
            raise Rejected(
                RejectKind.TOO_LARGE,
                f"{name}: {context.width}x{context.height} pictures are larger than "
                f"{MAX_PIXELS} pixels; convert it to a smaller size",
            )
        checked = {"err_detect": "buffer"} if self.codec in _ENDS_CHECKED else {}
        context.options = {"max_pixels": str(MAX_PIXELS), **checked}
        # One thread a process scales with the processes; threads inside one hardly do.
        context.thread_count = 1

    def packets(
        self, *, every_stream: bool = False, lost: bool = False
    ) -> Generator[Packet[Stream]]:
        """The stream's packets (or those of all streams) from here to the end of the file; damaged
        reads are passed over. `lost`: those too that only the tables hold, but for a long row of
        them at the end. Raises FootageError where the storage fails.
        """
        for other in self._container.streams:
            unread = not every_stream and other.index != self.stream.index
            other.discard = Discard.all if unread else Discard.default
        failures = 0
        packet = None
        while failures < _FAILED_READS:
            try:
                for packet in self._demuxed(every_stream=every_stream):
                    if packet.size or packet.dts is not None:
                        failures = 0
                        held = self.holds(packet)
                        if held or lost:
                            yield packet
                        if self._only_lost_follow(packet, held=held):
                            return
            except IndexError:
                # PyAV ends by naming each stream, and trips over one that began in mid-file.
                return
            except (av.error.FFmpegError, OSError) as error:
                if is_nonsense(error):
                    failures += 1
                    self.damaged_reads += 1
                    continue
                if isinstance(error, MemoryError) and self.container in _CHAINED:
                    self.damaged_reads += 1
                    return
                late = isinstance(error, av.error.ExitError)
                if late and packet is not None and self._only_zeros_follow(packet):
                    return
                raise FootageError(str(rejection(self.path, error))) from error
            else:
                return

    def _demuxed(self, *, every_stream: bool) -> Iterator[Packet[Stream]]:
        demuxed = self._container.demux(() if every_stream else cast("Stream", self.stream))
        if self._chunks is not None:
            return self._chunks.passing(demuxed)
        if stores_every_frame(self.codec):
            return timed_by_page(demuxed, self.stream.index)
        if self.fragments is not None:
            return with_other_recordings(demuxed, self.stream, self.fragments)
        return demuxed

    def _only_lost_follow(self, packet: Packet[Stream], *, held: bool) -> bool:
        """Whether a long row of lost packets has been read behind all that are there."""
        if held or packet.stream_index != self.stream.index or packet.dts is None:
            self._lost_row = 0 if held else self._lost_row
            return False
        promise = self._promised()
        if promise.between > _MOST_BETWEEN:
            name = shown_path(os.fsencode(self.path))
            raise Rejected(
                RejectKind.TOO_LARGE,
                f"{name}: {promise.between} bytes in its middle lie beyond its end; copy it again",
            )
        self._lost_row += _LOST_PACKET_BYTES + packet.size
        behind = packet.dts > promise.held_until or self._lost_row > 2 * _MOST_BETWEEN
        if not behind or self._lost_row <= _MOST_LOST_BYTES:
            return False
        self._left_at = packet.dts
        return True

    def last_promised(self) -> Iterator[Packet[Stream]]:
        """The last packets by the tables of a file where `packets` ended before them. Raises
        FootageError where the storage fails."""
        if self._left_at is None:
            return
        try:
            self._container.seek(self._promised().late, stream=self.stream, any_frame=True)
            for packet in self._container.demux(cast("Stream", self.stream)):
                if packet.dts is not None and packet.dts > self._left_at:
                    yield packet
        except av.error.FFmpegError as error:
            raise FootageError(str(rejection(self.path, error))) from error

    def _only_zeros_follow(self, packet: Packet[Stream]) -> bool:
        """Whether a packet is the last before space that a recorder reserved and did not fill. All
        of it is read, but for holes of the file system: other footage may follow."""
        if packet.pos is None or packet.pos < 0:
            return False
        at = packet.pos + packet.size + _TAIL_BYTES
        with open(self.path, "rb", buffering=0) as file:
            reserved = os.fstat(file.fileno()).st_size - at
            if reserved < _RESERVED_BYTES:
                return False
            while piece := os.pread(file.fileno(), _PIECE_BYTES, at := _data_from(file, at)):
                self.beat()
                if piece.count(0) < len(piece):
                    return False
                at += len(piece)
        self.zeros = reserved
        return True

    def seek(self, pts: int) -> bool:
        """Go to a keyframe at or before a timestamp, if the container can; the decoder is reset.
        Where reading really lands is for the caller to check."""
        if self._chunks is not None:
            self._chunks.sought()
        try:
            self._container.seek(pts, stream=self.stream)
        except av.error.FFmpegError:
            return False
        return True


def _data_from(file: FileIO, at: int) -> int:
    """The first byte from here on that may not be zero; the end of the file where all are."""
    try:
        return file.seek(at, os.SEEK_DATA)
    except OSError:
        return file.seek(0, os.SEEK_END)


def _plausible(ratio: Fraction | None) -> Fraction:
    return ratio if ratio and Fraction(1, 8) <= ratio <= 8 else Fraction(1)


def _area(stream: VideoStream) -> int:
    context = stream.codec_context
    return context.width * context.height if cast(object, context) is not None else 0
