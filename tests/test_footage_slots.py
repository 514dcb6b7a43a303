"""AVI, whose frames have no times but slots: what is dropped, what is empty, and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.stream import Stream
from footage_files import HEIGHT, WIDTH, encode, frames, replaced, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
NOT_CODED = b"\0\0\1\xb6\x50"
"""An MPEG-4 picture that says there is none (ISO/IEC 14496-2, 6.2.5), at a time of its own."""


def slots_of(path: Path, rate: int = 30) -> list[int]:
    """The slots at which all frames stand, which tile the video without a gap."""
    info, index = probe(os.fspath(path))
    (task,) = plan(info, index, EVERY)
    results = list(read_range(os.fspath(path), info, task, EVERY, size=32, fit=Fit.SQUASH))
    assert not [result for result in results if isinstance(result, Gap)]
    assert results[-1].end_us == info.duration_us
    samples = [result for result in results if isinstance(result, DecodedSample)]
    return [round(sample.t_us * rate / 1_000_000) for sample in samples]


def test_packets_without_a_picture_keep_their_slots(tmp_path: Path) -> None:
    """A picture that is coded as none moves none of the others: each stands at its own slot."""
    empty = {5, 20, 21, 40}
    path = encode(
        tmp_path / "holed.avi",
        frames(60),
        codec="mpeg4",
        options={"g": "30", "bf": "0"},
        change=lambda number, packet: replaced(packet, NOT_CODED) if number in empty else packet,
    )
    assert slots_of(path) == [number for number in range(60) if number not in empty]


@pytest.mark.parametrize(
    ("slot", "lasting"),
    [
        (lambda number: number + 40 * (number == 59), 1),
        (lambda number: number + max(0, number - 30), 2),
        (lambda number: number + 40 * (number >= 58), 1),
    ],
    ids=["a pause before the last", "slower at its end", "a pause before the last but one"],
)
def test_the_last_picture_lasts_a_step_and_no_pause(
    slot: Callable[[int], int], lasting: int, tmp_path: Path
) -> None:
    """What the last frame lasts nothing tells: as long as one before it, but not as long as a
    pause."""
    path = encode(
        tmp_path / "paused.avi",
        frames(60),
        codec="mpeg4",
        options={"g": "30", "bf": "0"},
        pts=slot,
    )
    info, _index = probe(os.fspath(path))
    assert info.duration_us == (slot(59) + lasting) * 1_000_000 // 30
    assert slots_of(path) == [slot(number) for number in range(60)]


@pytest.mark.parametrize("name", ["film.avi", "film.h264"])
@pytest.mark.parametrize(
    "sampling", [EVERY, Sampling(rate=Fraction(5)), Sampling(SamplingMode.KEYFRAMES, None)], ids=str
)
def test_several_goes_count_as_one_does(
    name: str, sampling: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video whose frames are counted and that has too many samples for one range: each range
    reads from the start, and gives its own part of the samples."""
    path = encode(tmp_path / name, frames(90), options=x264(gop=10), rate=25)
    info, index = probe(os.fspath(path))
    assert index.counted

    def read() -> list[tuple[int, int, int, int, bytes]]:
        return [
            (one.bucket, one.t_us, one.start_us, one.end_us, one.picture.tobytes())
            for task in plan(info, index, sampling)
            for one in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
            if isinstance(one, DecodedSample)
        ]

    whole = read()
    assert whole[-1][3] == info.duration_us
    monkeypatch.setattr("workers.footage.plan.MOST_SAMPLES", 4)
    # When a keyframe is shown is known after decoding only, so they are not divided.
    assert len(plan(info, index, sampling)) == (
        1 if sampling.mode is SamplingMode.KEYFRAMES else -(-len(whole) // 4)
    )
    assert read() == whole


def test_a_counted_video_of_which_nothing_decodes_any_more_is_a_gap(tmp_path: Path) -> None:
    """After probing its pictures were overwritten: all of its time is a gap."""
    path = encode(tmp_path / "film.avi", frames(60), codec="mpeg4", options={"g": "10"})
    info, index = probe(os.fspath(path))
    (task,) = plan(info, index, EVERY)
    encode(
        path,
        frames(60),
        codec="mpeg4",
        options={"g": "10"},
        change=lambda _number, packet: replaced(packet, bytes(packet.size)),
    )
    (gap,) = read_range(os.fspath(path), info, task, EVERY, size=32, fit=Fit.SQUASH)
    assert isinstance(gap, Gap)
    assert (gap.start_us, gap.end_us, gap.kind) == (0, 2_000_000, GapKind.DAMAGED)


def reordered_hevc(path: Path, slot: Callable[[int], int]) -> Path:
    """An AVI of 60 pictures that are shown at these slots, of which the decoder delays two; no
    muxer at hand writes HEVC into AVI, but recorders do."""
    parameters = "keyint=30:min-keyint=30:bframes=3:repeat-headers=1:log-level=none:pools=1"
    given_path = encode(
        path.with_suffix(".ts"),
        frames(60),
        codec="libx265",
        options={"preset": "ultrafast", "x265-params": f"{parameters}:frame-threads=1"},
    )
    with av.open(str(given_path)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = (packet for packet in given.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, 30), 1
            packet.pts = packet.dts = number if number < 2 else slot(number - 2) + 2
            container.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"HEVC"))
    return path


def test_hevc_in_an_avi_stands_at_its_slots(tmp_path: Path) -> None:
    """FFmpeg has no times for it, as of H.264, and its pictures are reordered."""

    def slot(number: int) -> int:
        return number + 6 * min(max(number - 30, 0), 10)

    path = reordered_hevc(tmp_path / "film.avi", slot)
    info, index = probe(os.fspath(path))
    assert (info.codec, index.counted) == ("hevc", True)
    assert slots_of(path) == [slot(number) for number in range(60)]


def standing(path: Path, *, sound: bool = False) -> Path:
    """An AVI of 60 pictures of odd sizes and of 240 empty slots behind them; sound is its first
    stream."""
    name = b"01dc" if sound else b"00dc"
    with av.open(str(path), "w") as container:
        if sound:
            beside = container.add_stream("pcm_u8", rate=8000, layout="mono")
        stream = container.add_stream("mpeg4", rate=30, options={"g": "30", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if sound:
            silence = av.AudioFrame.from_ndarray(
                np.full((1, 16_000), 128, np.uint8), format="u8", layout="mono"
            )
            silence.rate, silence.pts = 8000, 0
            container.mux(beside.encode(silence))
        for number, picture in enumerate(frames(61)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number if number < 60 else 300, Fraction(1, 30)
            for packet in stream.encode(frame):
                container.mux(odd(packet))
    data = bytearray(path.read_bytes())
    index = data.index(b"idx1")
    for at in (data.rindex(name, 0, index), data.rindex(name, index)):
        data[at : at + 4] = b"JUNK"  # the picture that ended the pause
    path.write_bytes(data)
    return path


def odd(packet: Packet[Stream]) -> Packet[Stream]:
    return packet if packet.size % 2 else replaced(packet, bytes(packet) + b"\0")


def with_chunks(path: Path, name: bytes, chunks: bytes) -> Path:
    """Put other chunks between the empty slots of an AVI."""
    data = path.read_bytes()
    at = data.rindex(name + bytes(4), 0, data.index(b"idx1")) - 8 * 100
    assert data[at : at + 8] == name + bytes(4)
    path.write_bytes(data[:at] + chunks + data[at:])
    return path


@pytest.mark.parametrize(
    ("sound", "chunks"),
    [
        (False, b""),
        (False, b"JUNK\3\0\0\0abc\0"),
        (False, b"01wb\0\0\0\0" + b"01dc\0\0\0\0" + b"00pc\0\0\0\0"),
        (False, b"RIFF\0\0\0\x08AVIXLIST\0\0\0\x04movi"),
        (True, b"00wb\0\0\0\0" + b"00dc\0\0\0\0" + b"02dc\0\0\0\0"),
    ],
    ids=["nothing", "an odd chunk", "other streams", "another RIFF", "sound before"],
)
def test_empty_slots_at_the_end_of_an_avi_are_counted(
    sound: bool, chunks: bytes, tmp_path: Path
) -> None:
    """The last picture stands for each empty slot of its own stream, whatever lies between them: in
    files above a gigabyte other lists begin on the way."""
    path = standing(tmp_path / "still.avi", sound=sound)
    name = b"01dc" if sound else b"00dc"
    info, _index = probe(os.fspath(with_chunks(path, name, chunks)))
    assert info.frame_count == 60
    assert info.duration_us == info.indexed_us == 10_000_000


def test_empty_slots_of_uncompressed_pictures_are_counted(tmp_path: Path) -> None:
    """Their chunks have another name."""
    path = standing(tmp_path / "still.avi")
    path.write_bytes(path.read_bytes().replace(b"00dc", b"00db"))
    assert probe(os.fspath(path))[0].duration_us == 10_000_000
