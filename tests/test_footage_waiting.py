"""What is known of a range is given as soon as it is known, and its frames as they come."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from footage_files import Picture, damaged, encode, frames, replaced, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.picture import Renderer
from workers.footage.plan import plan
from workers.footage.probe import probe
from workers.footage.source import Source

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)


@pytest.mark.parametrize("gop", [10_000, 30])
def test_a_missing_frame_does_not_hold_up_those_behind_it(
    gop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame is gone after probing, and later the storage hangs: the gap and the samples behind it
    are given by then, and do not wait in memory for the end of the range."""
    whole = encode(tmp_path / "whole.mp4", frames(240), codec="mpeg4", options={"g": str(gop)})
    holed = encode(
        tmp_path / "holed.mp4",
        frames(240),
        codec="mpeg4",
        options={"g": str(gop)},
        change=lambda number, packet: None if number == 99 else packet,
    )
    info, index = probe(os.fspath(whole))
    (task,) = plan(info, index, EVERY)
    release, packets = threading.Event(), Source.packets

    def hanging(source: Source, **options: bool) -> Iterator[Packet[Stream]]:
        for number, packet in enumerate(packets(source, **options)):
            if number == 180:
                release.wait()
            yield packet

    monkeypatch.setattr(Source, "packets", hanging)
    try:
        results = list(
            read_range(os.fspath(holed), info, task, EVERY, size=32, fit=Fit.SQUASH, stall_s=0.5)
        )
    finally:
        release.set()
    *given, stalled = results
    gaps = [result for result in given if isinstance(result, Gap)]
    assert [(gap.kind, gap.start_us // 1000) for gap in gaps] == [(GapKind.READ_ERROR, 3300)]
    assert isinstance(given[-1], DecodedSample)
    assert isinstance(stalled, Gap)
    assert stalled.kind is GapKind.STALLED
    assert 4_900_000 < stalled.start_us < 6_100_000


def read(path: Path, sampling: Sampling) -> list[DecodedSample | Gap]:
    info, index = probe(os.fspath(path))
    return [
        result
        for task in plan(info, index, sampling, 2_000_000)
        for result in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
    ]


@pytest.mark.parametrize(
    "sampling", [Sampling(SamplingMode.FIRST, Fraction(2)), Sampling()], ids=str
)
@pytest.mark.parametrize("gop", [40, 10_000])
def test_pictures_are_made_of_samples_alone(
    sampling: Sampling, gop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decoded for the sake of others is not scaled, be it near a sample or not; but for a
    bidirectional picture that follows one, and may have to stand in for it."""
    path = encode(tmp_path / "film.mp4", frames(240), options=x264(gop=gop, bframes=1))
    made = []
    picture = Renderer.picture

    def counted(renderer: Renderer, frame: VideoFrame) -> Picture:
        made.append(frame.pts)
        return picture(renderer, frame)

    monkeypatch.setattr(Renderer, "picture", counted)
    samples = read(path, sampling)
    assert len(samples) == (16 if sampling.rate == 2 else 8)
    assert len(made) == len(samples)


def test_a_frame_before_a_damaged_keyframe_stands_in_for_it(tmp_path: Path) -> None:
    """The default mode wants the keyframe in the middle of a second; where it is damaged, a whole
    frame of that second from before it is the sample."""
    path = encode(
        tmp_path / "spoiled.mp4",
        frames(120),
        options=x264(gop=40, bframes=0),
        change=lambda number, packet: damaged(packet) if number == 40 else packet,
    )
    whole = encode(tmp_path / "whole.mp4", frames(120), options=x264(gop=40, bframes=0))
    results, true = read(path, Sampling()), read(whole, EVERY)
    (sample,) = (one for one in results if one.start_us == 1_000_000)
    assert isinstance(sample, DecodedSample)
    assert (sample.bucket, sample.t_us) == (1, 1_000_000)
    other = true[30]
    assert isinstance(other, DecodedSample)
    assert sample.picture.tobytes() == other.picture.tobytes()


def test_the_first_whole_frame_of_a_second_stands_in(tmp_path: Path) -> None:
    """Of several that may stand in for a lost frame the nearest behind it does."""
    path = encode(
        tmp_path / "holed.mp4",
        frames(120),
        codec="mjpeg",
        pixel_format="yuvj420p",
        change=lambda number, packet: (
            replaced(packet, b"\0" * packet.size) if number in (30, 31) else packet
        ),
    )
    (sample,) = (
        one
        for one in read(path, Sampling(SamplingMode.FIRST, Fraction(1)))
        if one.start_us == 1_000_000
    )
    assert isinstance(sample, DecodedSample)
    assert sample.t_us == 32 * 1_000_000 // 30
