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
from footage_fields import field_pictures
from footage_files import (
    HARD_FILES,
    Picture,
    encode,
    frames,
    joined,
    patch,
    remuxed,
    replaced,
    scenery,
    x264,
)
from footage_reference import SAMPLINGS, SIZE, Sample, digest, read_all

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.frame_numbers import FrameNumbers
from workers.footage.picture import Renderer
from workers.footage.probe import probe
from workers.footage.signs import Signs
from workers.footage.source import Source
from workers.footage.units import units

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


def is_referred(packet: Packet) -> bool:
    """Whether other pictures may refer to the one of an H.264 packet with start codes."""
    data = bytes(packet)
    return any(
        data[begin] & 0x1F in (1, 5) and data[begin] & 0x60 for begin, _end in units(data, 0)
    )


def lossy(path: Path, options: dict[str, str], loses: Callable[[int, Packet], bool]) -> Path:
    """A recording in H.264 that lacks some packets, at which it does not stop."""
    return noisy_video(
        path, "libx264", options, lambda number, each: None if loses(number, each) else each
    )


@pytest.mark.parametrize("name", ["lossy.mp4", "lossy.mkv", "lossy.flv", "lossy.ts"])
@pytest.mark.parametrize(
    ("bframes", "lost"), [(0, (40, 41, 66)), (3, (39, 67)), (3, (40, 41, 42, 43, 75))]
)
def test_a_missing_reference_is_damage(
    name: str, bframes: int, lost: tuple[int, ...], tmp_path: Path
) -> None:
    """Packets that others refer to are missing, in place of which decoders take other pictures
    without a word: what is made of them, up to the next keyframe, is no sample."""
    options = x264(bframes=bframes, extra="repeat-headers=1")
    whole = lossy(tmp_path / f"whole_{name}", options, lambda _number, _packet: False)
    path = lossy(tmp_path / name, options, lambda number, _packet: number in lost)
    pictures, told = decoded(path)
    true = set(decoded(whole)[0].values())
    assert told == 0, "the trap must be there"
    assert not true.issuperset(pictures.values()), "the trap must be there"
    info, index = probe(os.fspath(path))
    for sampling in (*SAMPLINGS, EVERY):
        _tasks, results = read_all(path, info, index, sampling)
        samples = [result for result in results if isinstance(result, Sample)]
        assert true.issuperset(sample.picture for sample in samples), str(sampling)
        assert len(samples) >= 30 or sampling != EVERY


@pytest.mark.parametrize("name", ["lossy.mp4", "lossy.ts"])
@pytest.mark.parametrize("pyramid", ["none", "normal"])
def test_a_missing_picture_that_nothing_refers_to_is_no_damage(
    name: str, pyramid: str, tmp_path: Path
) -> None:
    """What is there is whole: every frame is a sample."""
    options = x264(extra=f"repeat-headers=1:b-pyramid={pyramid}")
    path = lossy(
        tmp_path / name, options, lambda number, each: number % 9 > 2 and not is_referred(each)
    )
    info, _index = probe(os.fspath(path))
    assert info.frame_count < 75, "the trap must be there"
    assert_whole(path, info.frame_count)


@pytest.mark.parametrize("name", ["first.mp4", "first.ts"])
def test_pictures_missing_before_a_keyframe_are_no_damage(name: str, tmp_path: Path) -> None:
    """The end of a group and the beginning of the file are missing: nothing is made of them."""
    path = lossy(
        tmp_path / name,
        x264(bframes=0, extra="repeat-headers=1"),
        lambda number, _packet: number < 30 or 50 <= number < 60,
    )
    assert_whole(path, 50)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["fields.ts", "fields.mp4", "fields.mkv"])
def test_fields_have_one_number_for_two(name: str, apart: bool, tmp_path: Path) -> None:
    """The second field of a frame has the number of the first, in its packet or in its own."""
    assert alarms(field_pictures(tmp_path / name, 60, apart=apart)) == []


def test_two_pictures_in_a_packet_are_counted(tmp_path: Path) -> None:
    """A container that holds two frames in one packet lacks none."""
    before: list[bytes] = []

    def paired(number: int, packet: Packet) -> Packet | None:
        before.append(bytes(packet))
        return replaced(packet, before[-2] + before[-1]) if number % 2 else None

    path = noisy_video(tmp_path / "paired.mkv", "libx264", x264(gop=300, bframes=0), paired)
    with Source(os.fspath(path)) as source:
        assert sum(1 for packet in source.packets() if packet.size) == 45
    assert alarms(path) == []


LONG_NUMBERS = "keyint=600:min-keyint=600:ref=4"


@pytest.mark.parametrize("extras", [("", LONG_NUMBERS), (LONG_NUMBERS, "slices=3", "")])
def test_headers_that_change_are_followed(extras: tuple[str, ...], tmp_path: Path) -> None:
    """Recordings joined in one file whose numbers have other lengths, told beside the packets in
    Flash and MP4, and in them in a transport stream."""
    flash = joined(tmp_path / "joined.flv", *extras)
    assert alarms(flash) == []
    assert alarms(remuxed(tmp_path / "joined.mp4", flash)) == []
    stream = b""
    for extra in extras:
        options = x264(extra=f"repeat-headers=1:{extra}")
        stream += encode(tmp_path / "part.ts", frames(60), options=options).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(stream)
    assert alarms(path) == []


def golomb(number: int) -> str:
    """The bits of an unsigned Exp-Golomb number."""
    return "0" * ((number + 1).bit_length() - 1) + f"{number + 1:b}"


def unit(head: int, bits: str) -> bytes:
    """A unit with a start code, whose bits hold no run of zeros."""
    bits += "1" + "0" * (-(len(bits) + 1) % 8)
    return b"\0\0\0\1" + bytes((head,)) + int(bits, 2).to_bytes(len(bits) // 8)


def sequence_header(*, gaps: bool, planes: bool) -> bytes:
    """Headers of 16 frame numbers (ITU-T H.264 7.3.2.1.1, 7.3.2.2)."""
    profile = f"{244 if planes else 77:08b}" + "11111111" * 2 + golomb(2)
    colours = golomb(3) + "1" + golomb(0) * 2 + "00" if planes else ""
    sequence = profile + colours + golomb(0) + golomb(2) + golomb(1) + f"{gaps:b}" + golomb(9) * 2
    return unit(0x67, sequence) + unit(0x68, golomb(5) + golomb(2) + "1111")


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ("I0 P1 P2 P3 P4 P5 P6", []),
        ("I0 P1 P2 P3 P4 P6 P7", [5]),
        ("I0 P1 P2 P3 P13 P14 P15 P0 P1 P2 P4", [4, 10]),
        ("I0 P1 b2 b2 P2 b3 P3 b4 b4", []),
        ("I0 P1 b2 P2 b3 P3 b5", [6]),
        ("I0 P1 b2 P2 b3 P4", [5]),
        ("I0 P1 P1 P2 P2 P3 P3 P4 b5 b5", []),  # Fields.
        ("I0 P1 P2 P3 P4 P1 P2 P3", []),  # All references were given up with picture 4.
        ("I0 P1 P2 P3 P4 P0 P1 P2", []),
        ("I0 P2 P4 P6 P8 P10 P12", []),  # Temporal layers were dropped on the way.
        ("I0 P1 P3 P4 P6 P7 P9 P10", []),
        ("I0 P1 b2 P3 b4 P5 b6 P7 b8", []),  # An encoder that counts all pictures.
        ("I0 P0 P0 P0 P0 P0", []),
        ("P7 P8 P9 P10 P11 P13", [5]),
    ],
)
def test_frame_numbers_that_are_passed_over(numbers: str, missing: list[int], planes: bool) -> None:
    """A reference is missing where its number is, and nowhere else: I is an IDR picture, P one that
    others may refer to, b one that none does."""
    for gaps in (False, True):
        known = FrameNumbers()
        known.learn(sequence_header(gaps=gaps, planes=planes))
        found = []
        for at, each in enumerate(numbers.split()):
            head = {"I": 0x65, "P": 0x61, "b": 0x01}[each[0]]
            plane = "01" if planes else ""
            header = golomb(0) + golomb(5) + golomb(5) + plane + f"{int(each[1:]):04b}" + "1" * 9
            if known.pass_over(unit(head, header), 0, keyframe=each[0] == "I"):
                found.append(at)
        assert found == ([] if gaps else missing)


def test_nothing_is_said_of_headers_that_are_not_understood() -> None:
    """Without the headers of a sequence, or with damaged ones, no number is known."""
    pictures = [unit(0x61, golomb(0) + golomb(5) + golomb(5) + f"{at:04b}1") for at in range(12)]
    del pictures[6]
    for headers in (b"", b"\1\x64\0\x0b\xff\xe1\0\x20\x67", unit(0x67, "1" * 40), bytes(60)):
        known = FrameNumbers()
        known.learn(headers)
        assert not any(known.pass_over(each, 0, keyframe=False) for each in pictures)


def test_a_damaged_header_replaces_none() -> None:
    """Noise that looks like headers takes nothing away: the next missing picture is told."""
    known = FrameNumbers()
    known.learn(sequence_header(gaps=False, planes=False))
    found = []
    for number in (0, 1, 2, 3, 4, 6, 7):
        packet = unit(0x61, golomb(0) + golomb(5) + golomb(5) + f"{number:04b}" + "1" * 9)
        for noise in (
            unit(0x67, "1" * 40),
            unit(0x68, golomb(5) + golomb(30)),
            unit(0x68, "0" * 9),
        ):
            known.pass_over(noise, 0, keyframe=False)
        if known.pass_over(packet, 0, keyframe=False):
            found.append(number)
    assert found == [6]


def ffv1(path: Path, *, gop: int = 1, change: Change = unchanged) -> Path:
    """Thirty pictures of four slices, each with a checksum."""
    options = {"level": "3", "slices": "4", "slicecrc": "1", "g": f"{gop}"}
    pictures = [noisy(number) for number in range(30)]
    return encode(path, pictures, codec="ffv1", options=options, change=change)


def flipped(*numbers: int) -> Change:
    """One wrong bit in the first slices of these packets."""

    def change(number: int, packet: Packet) -> Packet:
        data = bytearray(packet)
        data[packet.size // 3] ^= 4 * (number in numbers)
        return replaced(packet, bytes(data))

    return change


@pytest.mark.parametrize("name", ["checked.mkv", "checked.avi", "checked.nut"])
@pytest.mark.parametrize(("gop", "lost"), [(1, 2), (10, 7 + 1)])
def test_a_slice_with_a_wrong_checksum_is_damage(
    name: str, gop: int, lost: int, tmp_path: Path
) -> None:
    """FFV1 tells one bit that is wrong: its picture is no sample, nor is what is made of it."""
    whole = ffv1(tmp_path / f"whole_{name}", gop=gop)
    path = ffv1(tmp_path / name, gop=gop, change=flipped(13, 29))
    assert alarms(whole) == []
    assert alarms(path) == [13, 29]
    assert_found(whole, path, lost)


def test_a_checksum_needs_no_whole_frame_before_it(tmp_path: Path) -> None:
    """One true slice shows that there are checksums: damage in the first frame is told."""
    assert alarms(ffv1(tmp_path / "first.mkv", change=flipped(0))) == [0]


def test_footers_that_make_no_sense_are_damage(tmp_path: Path) -> None:
    """Where a frame's end is lost, the places of its slices are."""

    def cut(number: int, packet: Packet) -> Packet:
        return replaced(packet, bytes(packet)[:-3]) if number == 7 else packet

    assert alarms(ffv1(tmp_path / "cut.mkv", change=cut)) == [7]


@pytest.mark.parametrize("level", ["1", "3"])
def test_without_checksums_nothing_is_said(level: str, tmp_path: Path) -> None:
    """FFV1 without checksums, or of the version without slices."""
    options = {"level": level, "slicecrc": "0"} if level == "3" else {"level": level}
    path = encode(
        tmp_path / "plain.mkv", [noisy(at) for at in range(9)], codec="ffv1", options=options
    )
    assert_whole(path, 9)
