"""Damage that decoders do not report: what packets show of it, and what only looks like it."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.frame import VideoFrame
from footage_files import (
    HARD_FILES,
    Picture,
    encode,
    frames,
    patch,
    remuxed,
    replaced,
    scenery,
    x264,
)
from footage_reference import SAMPLINGS, SIZE, Sample, digest, read_all

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.picture import Renderer
from workers.footage.probe import probe
from workers.footage.signs import Signs
from workers.footage.source import Source

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
X265 = "crf=12:keyint=30:bframes=0:log-level=none:pools=1:frame-threads=1"
HEVC = {"preset": "ultrafast", "x265-params": X265}
GROUPS_OF_30 = {"g": "30", "bf": "0", "qmin": "2", "qmax": "4"}

Change = Callable[[int, Packet], Packet | None]


def unchanged(_number: int, packet: Packet) -> Packet:
    return packet


def noisy(number: int) -> Picture:
    """A picture whose packet is some kilobytes."""
    noise = np.random.default_rng(number).integers(-8, 9, (96, 160, 3))
    return (scenery(number // 2).astype(int) + noise).clip(0, 255).astype(np.uint8)


def noisy_video(path: Path, codec: str, options: dict[str, str], change: Change) -> Path:
    """Ninety pictures in three groups."""
    pictures = [noisy(number) for number in range(90)]
    rate = 25 if codec.startswith("mpeg1") else 30
    return encode(path, pictures, codec=codec, rate=rate, options=options, change=change)


def block_lost(*numbers: int) -> Change:
    """Zeros for half a kilobyte, or a third, of the picture in these packets."""

    def change(number: int, packet: Packet) -> Packet:
        if number not in numbers:
            return packet
        data, at = bytes(packet), packet.size // 3
        size = min(512, packet.size // 3)
        return replaced(packet, data[:at] + bytes(size) + data[at + size :])

    return change


def decoded(path: Path) -> tuple[dict[int, bytes], int]:
    """Hashes of what a decoder gives alone by timestamp, and how often it tells of damage."""
    renderer = Renderer(SIZE, Fit.SQUASH, pixel_aspect=Fraction(1))
    pictures: dict[int, bytes] = {}
    told = 0
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for packet in container.demux(video=0):
            try:
                given = packet.decode()
            except av.error.FFmpegError:
                told += 1
                continue
            for frame in given:
                assert isinstance(frame, VideoFrame)
                assert frame.pts is not None
                told += frame.is_corrupt
                pictures[frame.pts] = digest(renderer.picture(frame))
    return pictures, told


def assert_found(whole: Path, path: Path, lost: int, *, silent: bool = True) -> None:
    """No picture that the undamaged file does not have is a sample, and of its frames `lost` are
    none; `silent`: the decoder alone gives wrong ones and tells nothing."""
    pictures, told = decoded(path)
    true = set(decoded(whole)[0].values())
    assert not true.issuperset(pictures.values()), "the trap must be there"
    assert told == 0 or not silent, "the trap must be there"
    info, index = probe(os.fspath(path))
    for sampling in (*SAMPLINGS, EVERY):
        _tasks, results = read_all(path, info, index, sampling)
        samples = [result for result in results if isinstance(result, Sample)]
        assert samples
        assert true.issuperset(sample.picture for sample in samples), str(sampling)
        kinds = {result.kind for result in results if isinstance(result, Gap)}
        assert kinds <= {GapKind.DAMAGED}
        if sampling == EVERY:
            assert len(samples) == len(true) - lost


def alarms(path: Path) -> list[int]:
    """The numbers of the packets that show signs of damage, of all fed in a row."""
    with Source(os.fspath(path)) as source:
        signs = Signs(source.codec)
        signs.sought(source.extradata)
        packets = (packet for packet in source.packets() if packet.size)
        return [number for number, packet in enumerate(packets) if signs.tell(packet)]


def assert_whole(path: Path, count: int) -> None:
    """Every frame of a file without damage is a sample."""
    assert alarms(path) == []
    info, index = probe(os.fspath(path))
    _tasks, results = read_all(path, info, index, EVERY)
    assert len(results) == count
    assert all(isinstance(result, Sample) for result in results)


@pytest.mark.parametrize("name", HARD_FILES)
def test_files_without_damage_show_no_sign_of_it(name: str, tmp_path: Path) -> None:
    """Every container, codec and cut of the made files."""
    assert alarms(HARD_FILES[name](tmp_path / name)) == []


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("length.mp4", "libx264", x264(bframes=0)),
        ("start_code.ts", "libx264", x264(bframes=0, extra="repeat-headers=1")),
        ("hevc.mp4", "libx265", HEVC),
        ("mpeg1.mkv", "mpeg1video", GROUPS_OF_30),
        ("mpeg2.ts", "mpeg2video", GROUPS_OF_30),
        ("mpeg4.mp4", "mpeg4", GROUPS_OF_30),
    ],
)
def test_a_lost_block_is_damage(
    name: str, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Zeros in the middle of a picture, which decoders often take for one: what is made of it, up
    to the next keyframe, is no sample."""
    whole = noisy_video(tmp_path / f"whole_{name}", codec, options, unchanged)
    path = noisy_video(tmp_path / name, codec, options, block_lost(34, 75))
    assert alarms(path) == [34, 75]
    assert_found(whole, path, lost=26 + 15, silent=codec in ("libx264", "libx265"))


def stuffed(data: bytes, size: int) -> bytes:
    """A packet with zeros before every start code but the first, and behind everything."""
    return data[:4] + data[4:].replace(b"\0\0\1", bytes(size) + b"\0\0\1") + bytes(size)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("units_end_in_zeros.mp4", "libx264", x264(extra="slices=4")),
        ("start_codes.ts", "libx264", x264(extra="slices=4:repeat-headers=1")),
        ("start_codes.h264", "libx264", x264(extra="slices=4")),
        ("start_codes.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
        ("start_codes.avi", "mpeg4", {"g": "30"}),
    ],
)
def test_zeros_that_fill_up_are_no_damage(
    name: str, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Encoders of a constant rate put zeros before start codes and behind pictures, and where a
    file is written with lengths in their place they end up in the units."""
    path = encode(
        tmp_path / name,
        frames(60),
        codec=codec,
        rate=25,
        options=options,
        change=lambda _number, packet: replaced(packet, stuffed(bytes(packet), 100)),
    )
    assert bytes(64) in path.read_bytes(), "the trap must be there"
    assert_whole(path, 60)


def test_frames_of_a_constant_size_are_no_damage(tmp_path: Path) -> None:
    """AVC-Intra, as cameras for broadcasts record it, fills its frames up with zeros, which stand
    before start codes in a transport stream and at the ends of units in a QuickTime file."""
    stream = encode(
        tmp_path / "avc_intra.ts",
        [scenery(number, 1280, 720) for number in range(3)],
        pixel_format="yuv422p10le",
        rate=50,
        options={"x264-params": "avcintra-class=100:colormatrix=bt709"},
    )
    for path in (stream, remuxed(tmp_path / "avc_intra.mov", stream)):
        assert bytes(64) in path.read_bytes(), "the trap must be there"
        assert_whole(path, 3)


@pytest.mark.parametrize("name", ["message.mp4", "message.ts"])
def test_zeros_outside_of_pictures_are_no_damage(name: str, tmp_path: Path) -> None:
    """Cameras write messages of their own beside the pictures, and not all of them by the rules."""
    message = b"\0\0\1\6\5\x60" + bytes(16) + b"camera" + bytes(73) + b"\x80"
    path = encode(
        tmp_path / name,
        frames(60),
        options=x264(extra="repeat-headers=1"),
        change=lambda _number, packet: replaced(packet, message + bytes(packet)),
    )
    assert_whole(path, 60)


def test_zeros_are_pictures_in_other_codecs(tmp_path: Path) -> None:
    """Black pictures without compression are nothing but zeros."""
    path = encode(
        tmp_path / "black.avi", [patch((0, 0, 0))] * 30, codec="rawvideo", pixel_format="bgr24"
    )
    assert_whole(path, 30)
