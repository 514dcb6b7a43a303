"""Hard video files: made on the spot with PyAV, so that their tests run on every machine, and real
clips with their variants where there are any."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.frame import VideoFrame
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

WIDTH, HEIGHT = 160, 96


def scenery(number: int, width: int = WIDTH, height: int = HEIGHT) -> Picture:
    """A picture with texture that moves: no two numbers below 1000 look alike."""
    y, x = np.mgrid[0:height, 0:width]
    red = (x * 2 + number * 7) % 256
    green = (y * 3 + number * 5) % 256
    blue = ((x // 16 + y // 16) % 2 * 128 + number * 11) % 256
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def patch(colour: tuple[int, int, int], width: int = WIDTH, height: int = HEIGHT) -> Picture:
    """A picture of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def encode(
    path: Path,
    pictures: Iterable[Picture],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rate: int = 30,
    pts: Callable[[int], int] = lambda number: number,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    convert: Callable[[Picture], VideoFrame] | None = None,
    change: Callable[[int, Packet], Packet | None] = lambda _number, packet: packet,
    configure: Callable[[av.VideoStream], None] = lambda _stream: None,
) -> Path:
    """Write a video whose frame n has the timestamp `pts(n)` in ticks of 1/rate.

    `convert` makes the frame that is encoded. `change` sees every packet in decoding order and may
    alter, replace or drop (None) it.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.thread_count = 1
        configure(stream)
        packets = 0

        def mux(frame: VideoFrame | None) -> None:
            nonlocal packets
            for packet in stream.encode(frame):
                kept = change(packets, packet)
                packets += 1
                if kept is not None:
                    container.mux(kept)

        for number, picture in enumerate(pictures):
            if convert is None:
                frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format=pixel_format
                )
            else:
                frame = convert(picture)
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base = pts(number), Fraction(1, rate)
            mux(frame)
        mux(None)
    return path


def x264(gop: int = 30, bframes: int = 3, extra: str = "") -> dict[str, str]:
    """Options of an H.264 stream with keyframes exactly every `gop` frames, the same in every run:
    with macroblock trees x264's vector code gives other bits now and then."""
    parameters = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={bframes}:b-adapt=0:mbtree=0"
    return {"preset": "veryfast", "crf": "20", "x264-params": f"{parameters}:{extra}".rstrip(":")}


def frames(count: int) -> list[Picture]:
    """The first pictures of the scenery."""
    return [scenery(number) for number in range(count)]


def replaced(packet: Packet, data: bytes) -> Packet:
    """The packet with other data; timestamps and marks stay."""
    other = Packet(data)
    other.pts, other.dts, other.duration = packet.pts, packet.dts, packet.duration
    other.stream, other.time_base = packet.stream, packet.time_base
    other.is_keyframe = packet.is_keyframe
    return other


def damaged(packet: Packet) -> Packet:
    """The packet with its picture data turned into noise."""
    noise = np.random.default_rng(1).integers(0, 256, packet.size, np.uint8).tobytes()
    return replaced(packet, bytes(packet)[:8] + noise[8:])


def two_groups_apart(number: int) -> int:
    """Timestamps of a variable rate: two seconds at the full rate, then one frame in seven."""
    return number if number < 60 else 60 + (number - 60) * 7


def joined(path: Path, *extras: str) -> Path:
    """A Flash file of recordings of three seconds, one after the other, as a live stream is whose
    encoder starts anew each time, with these x264 parameters."""
    data = b""
    for number, extra in enumerate(extras):
        pictures = [scenery(at) for at in range(90 * number, 90 * number + 90)]
        options = x264(extra=extra)
        part = encode(path.with_name("part.flv"), pictures, options=options).read_bytes()
        data, at = data or part[:13], 13
        while at < len(part):
            size = 11 + int.from_bytes(part[at + 1 : at + 4]) + 4
            milliseconds = int.from_bytes(part[at + 4 : at + 7]) + 3000 * number
            data += part[at : at + 4] + milliseconds.to_bytes(3) + part[at + 7 : at + size]
            at += size
    path.write_bytes(data)
    return path


OTHER_HEADERS = ("cabac=0:qp=18", "cabac=0:qp=40", "qp=30")
"""What a decoder with the first one's headers makes of the second is wrong, but no error."""


def remuxed(path: Path, source: Path) -> Path:
    """The packets of another file, and all that stands beside them."""
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return path


def delayed_later(path: Path) -> Path:
    """An AVI of 120 frames whose decoder delays none of the first 60 and, by the headers that come
    then, two of the others."""
    with av.open(str(path), "w") as container:
        packets = 0
        for part, bframes in enumerate((0, 2)):
            pictures = [scenery(at) for at in range(60 * part, 60 * part + 60)]
            options = x264(bframes=bframes, extra="b-pyramid=strict" if part else "")
            given_path = encode(path.with_name("part.avi"), pictures, options=options)
            with av.open(str(given_path)) as given:
                if part == 0:
                    stream = container.add_stream_from_template(given.streams.video[0])
                    stream.time_base = Fraction(1, 30)
                for packet in given.demux(given.streams.video[0]):
                    if packet.size:
                        packet.pts = packet.dts = packets
                        packet.time_base, packet.stream = Fraction(1, 30), stream
                        container.mux(packet)
                        packets += 1
    return path


def edited(path: Path, *edits: tuple[float, float | None]) -> Path:
    """Write another edit list into an MP4: for each edit how long it lasts and where in the media
    it begins, in seconds; None for an empty one (ISO/IEC 14496-12, 8.6.6)."""

    def rewritten(boxes: bytes) -> bytes:
        found, at = b"", 0
        while at < len(boxes):
            size, kind = int.from_bytes(boxes[at : at + 4]), boxes[at + 4 : at + 8]
            content = table if kind == b"elst" else boxes[at + 8 : at + size]
            if kind in (b"moov", b"trak", b"edts"):
                content = rewritten(content)
            found += (8 + len(content)).to_bytes(4) + kind + content
            at += size
        return found

    data = path.read_bytes()
    header = data.index(b"mdhd") + 4
    ticks = int.from_bytes(data[header + 12 : header + 16])
    table = struct.pack(">II", 0, len(edits))
    for seconds, begin in edits:
        start = -1 if begin is None else int(begin * ticks)
        table += struct.pack(">IiI", int(seconds * 1000), start, 0x10000)
    path.write_bytes(rewritten(data))
    return path


def other_palette(picture: Picture) -> VideoFrame:
    """A picture of 256 colours, which are others for each picture."""
    grey = picture[:, :, 0]
    palette = np.full((256, 4), 255, np.uint8)
    palette[:, 1:] = np.arange(256, dtype=np.uint8)[:, None] ^ picture[0, 0]
    return VideoFrame.from_ndarray((grey, palette), format="pal8")


HARD_FILES: dict[str, Callable[[Path], Path]] = {
    "b_frames.mp4": lambda path: encode(path, frames(240), options=x264()),
    "open_gop.mkv": lambda path: encode(path, frames(240), options=x264(extra="open-gop=1")),
    "open_gop.ts": lambda path: encode(
        path, frames(240), options=x264(extra="open-gop=1:repeat-headers=1")
    ),
    "long_gop.mp4": lambda path: encode(path, frames(300), options=x264(gop=150)),
    "one_keyframe.mp4": lambda path: encode(path, frames(150), options=x264(gop=10_000)),
    "intra_refresh.mp4": lambda path: encode(
        path, frames(180), options=x264(bframes=0, extra="intra-refresh=1")
    ),
    "variable_rate.mp4": lambda path: encode(
        path, frames(150), options=x264(), pts=two_groups_apart
    ),
    "late_start.ts": lambda path: encode(
        path, frames(180), options=x264(), pts=lambda number: number + 900
    ),
    "flash.flv": lambda path: encode(path, frames(180), options=x264()),
    "fragmented.mp4": lambda path: encode(
        path,
        frames(180),
        options=x264(),
        container_options={"movflags": "frag_keyframe+empty_moov"},
    ),
    "ten_bit.mp4": lambda path: encode(
        path,
        frames(120),
        codec="libx265",
        pixel_format="yuv420p10le",
        options={
            "preset": "ultrafast",
            "x265-params": "keyint=30:open-gop=1:bframes=4:log-level=none:pools=1:frame-threads=1",
        },
    ),
    "vp9.webm": lambda path: encode(
        path,
        frames(120),
        codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8", "g": "30", "lag-in-frames": "8"},
    ),
    "vp8.webm": lambda path: encode(
        path,
        frames(120),
        codec="libvpx",
        options={
            "deadline": "good",
            "cpu-used": "5",
            "g": "40",
            "auto-alt-ref": "1",
            "lag-in-frames": "16",
        },
    ),
    "mpeg2.ts": lambda path: encode(
        path, frames(150), codec="mpeg2video", rate=25, options={"g": "12", "bf": "2"}
    ),
    "mpeg2.mpg": lambda path: encode(
        path, frames(150), codec="mpeg2video", rate=25, options={"g": "12", "bf": "2"}
    ),
    "motion_jpeg.avi": lambda path: encode(
        path, frames(90), codec="mjpeg", pixel_format="yuvj420p"
    ),
    "motion_jpeg.mjpeg": lambda path: encode(
        path, frames(90), codec="mjpeg", pixel_format="yuvj420p", rate=25
    ),
    "mpeg4.mp4": lambda path: encode(path, frames(150), codec="mpeg4", options={"g": "25"}),
    "changed_headers.flv": lambda path: joined(path, *OTHER_HEADERS),
    "changed_headers.mp4": lambda path: remuxed(
        path, joined(path.with_suffix(".flv"), *OTHER_HEADERS)
    ),
    "repeated_headers.flv": lambda path: joined(path, "", "", ""),
    "changed_palette.avi": lambda path: encode(
        path, frames(90), codec="rawvideo", pixel_format="pal8", convert=other_palette
    ),
    "several_edits.mp4": lambda path: edited(
        encode(path, frames(240), options=x264(gop=60)), (1.3, 0.7), (1.1, 5.13), (2.2, 2.31)
    ),
    "overlapping_edits.mp4": lambda path: edited(
        encode(path, frames(240), options=x264(bframes=0)), (2.5, 2.1), (2.5, 2.1), (2.5, 0.1)
    ),
    "late_edit.mp4": lambda path: edited(
        encode(path, frames(240), options=x264()), (2.5, None), (5, 2.21)
    ),
    "long_edit.mp4": lambda path: edited(encode(path, frames(240), options=x264()), (30, 2)),
    # Pictures before a keyframe: what others refer to must be there.
    "repeated_frames.nut": lambda path: encode(
        path,
        frames(240),
        options=x264(bframes=0),
        change=lambda number, packet: (
            replaced(packet, b"") if number % 30 > 26 or number > 225 else packet
        ),
    ),
    "two_frames.mp4": lambda path: encode(path, frames(2), options=x264()),
    "one_frame.mkv": lambda path: encode(path, frames(1), options=x264()),
}
"""Files that decode without a fault, by name; the suffix chooses the container."""


def announcing(path: Path, samples: int, tracks: int = 1) -> Path:
    """Write an MP4 of a kilobyte whose tables announce so many samples of one byte a track, all in
    one chunk: true to the letter of ISO/IEC 14496-12, and nothing of it is there."""

    def numbers(*values: int) -> bytes:
        return struct.pack(f">{len(values)}I", *values)

    def box(kind: bytes, *parts: bytes) -> bytes:
        content = b"".join(parts)
        return numbers(8 + len(content)) + kind + content

    def table(kind: bytes, *values: int) -> bytes:
        return box(kind, numbers(0, *values))

    square = numbers(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    entry = box(
        b"mp4v",
        bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HH", WIDTH, HEIGHT),
        numbers(72 << 16, 72 << 16, 0) + b"\0\1" + bytes(32) + b"\0\x18\xff\xff",
    )
    tables = box(
        b"stbl",
        box(b"stsd", numbers(0, 1), entry),
        table(b"stts", 1, samples, 1),
        table(b"stsc", 1, 1, samples, 1),
        table(b"stsz", 1, samples),
        table(b"stco", 1, 40),
    )
    dref = box(b"dref", numbers(0, 1), box(b"url ", numbers(1)))
    media = box(
        b"mdia",
        table(b"mdhd", 0, 0, 30, samples, 0x55C40000),
        box(b"hdlr", numbers(0, 0), b"vide", bytes(13)),
        box(b"minf", table(b"vmhd", 0, 0), box(b"dinf", dref), tables),
    )
    shape = square + numbers(WIDTH << 16, HEIGHT << 16)
    rest = b"\1\0" + bytes(10) + square + bytes(24) + numbers(tracks + 1)
    movie = [box(b"mvhd", numbers(0, 0, 0, 30, samples, 0x10000), rest)]
    for number in range(1, tracks + 1):
        head = box(b"tkhd", numbers(0, 0, 0, number, 0, samples), bytes(16), shape)
        movie.append(box(b"trak", head, media))
    path.write_bytes(
        box(b"ftyp", b"isom", numbers(512), b"isommp41")
        + box(b"mdat", bytes(64))
        + box(b"moov", *movie)
    )
    return path


MEDIA = Path(os.environ.get("NIGHTREEL_TEST_MEDIA", Path(__file__).parents[2] / "shared" / "media"))
CLIPS = sorted(
    path.name for path in MEDIA.glob("*.*") if path.suffix in (".mp4", ".webm") and path.is_file()
)
VARIANTS = """
animation.gif av1.mp4 base.mkv cover_art.mp4 delayed_start.ts edit_list.mp4 flash.flv fps60.mp4
fragmented.mp4 h264_gop10s.mp4 h264_gop2s.mp4 h264_intra_refresh.mp4 h264_one_keyframe.mp4
h264_open_gop.mp4 hevc_10bit.mp4 mjpeg.avi mkv_no_cues.mkv mpeg2_interlaced.ts mpegts.ts
mpegts_open_gop.ts odd_321x243.webm one_frame.mp4 rotated_90.mp4 slideshow_0.4fps.mp4
two_frames.mp4 vfr.mp4 vp9.webm bad_truncated.ts
""".split()  # noqa: SIM905 -- a list of 28 literals reads no better
"""Variants with trustworthy timestamps, whose samples can be told from a plain pass."""
needs_media = pytest.mark.skipif(
    not CLIPS, reason=f"real clips are not at {MEDIA} (set NIGHTREEL_TEST_MEDIA)"
)
needs_variants = pytest.mark.skipif(
    not CLIPS or shutil.which("ffmpeg") is None or not (MEDIA / "make_variants.sh").exists(),
    reason=f"variants need the real clips at {MEDIA} and the ffmpeg command",
)


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hard variants of the real clips: those at NIGHTREEL_TEST_VARIANTS, else made once for all
    processes of the session."""
    given = os.environ.get("NIGHTREEL_TEST_VARIANTS")
    if given:
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, made = base / "variants", base / "variants-made"
    with (base / "variants.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            script = ["bash", str(MEDIA / "make_variants.sh"), str(MEDIA), str(folder)]
            subprocess.run(script, check=True, capture_output=True)
            made.touch()
    return folder
