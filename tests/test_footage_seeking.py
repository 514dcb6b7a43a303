"""Where reading begins: far ahead, further back, at the file's start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream
from footage_files import encode, frames, replaced, scenery, x264

from storage.records import Fit, Gap, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.picture import Renderer
from workers.footage.plan import plan
from workers.footage.probe import probe
from workers.footage.source import Source
from workers.footage.trial import Landmarks

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
SIZE = 48


def read(path: Path, sampling: Sampling, task_us: int = 10**15) -> list[DecodedSample | Gap]:
    info, index = probe(os.fspath(path))
    assert info.sequential_reason is None
    return [
        result
        for task in reversed(plan(info, index, sampling, task_us))
        for result in read_range(os.fspath(path), info, task, sampling, size=SIZE, fit=Fit.SQUASH)
    ]


def one_pass(path: Path) -> dict[int | None, bytes]:
    """The picture of every frame, by its timestamp."""
    renderer = Renderer(SIZE, Fit.SQUASH, pixel_aspect=Fraction(1))
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return {frame.pts: renderer.picture(frame).tobytes() for frame in container.decode(stream)}


def assert_true(results: list[DecodedSample | Gap], true: dict[int | None, bytes]) -> None:
    for result in results:
        assert isinstance(result, DecodedSample), result
        assert result.picture.tobytes() == true[result.pts]


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_what_lies_far_from_the_next_sample_is_not_read(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half an hour three frames are wanted, each far behind its keyframe: their pictures are the
    true ones, and most of the file is sought over, where there is an index and where there is
    none."""
    path = encode(
        tmp_path / f"long.{suffix}",
        [scenery(number, 64, 48) for number in range(2000)],
        rate=1,
        options=x264(gop=25),
    )
    seen = []
    packets = Source.packets

    def counted(source: Source, **options: bool) -> Iterator[Packet[Stream]]:
        for packet in packets(source, **options):
            seen.append(packet.pts)
            yield packet

    true = one_pass(path)
    info, index = probe(os.fspath(path))
    sampling = Sampling(SamplingMode.FIRST, Fraction(1, 712))
    (task,) = plan(info, index, sampling, 10**15)
    monkeypatch.setattr(Source, "packets", counted)
    results = list(read_range(os.fspath(path), info, task, sampling, size=SIZE, fit=Fit.SQUASH))
    assert len(results) == 3
    assert_true(results, true)
    assert len(seen) < 300


def with_headers_once(path: Path) -> Path:
    """A transport stream of two recordings of four seconds, one after the other, of which the
    second says how it is coded at its beginning only."""
    with av.open(str(path), "w") as container:
        stream = None
        for part, extra in enumerate(("cabac=1", "cabac=0:8x8dct=0:weightp=0:ref=3")):
            pictures = [scenery(at) for at in range(120 * part, 120 * part + 120)]
            made = encode(path.with_name("part.ts"), pictures, options=x264(bframes=0, extra=extra))
            with av.open(str(made)) as given:
                for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
                    if stream is None:
                        stream = container.add_stream_from_template(given.streams.video[0])
                    assert packet.pts is not None
                    time = (number + 120 * part) * 3000
                    kept = packet if number == 0 or not part else bare(packet)
                    kept.stream, kept.time_base = stream, Fraction(1, 90_000)
                    kept.pts = kept.dts = time
                    kept.is_keyframe = number == 0  # Others the muxer would give headers.
                    container.mux(kept)
    return path


def bare(packet: Packet[VideoStream]) -> Packet[VideoStream]:
    """The packet without its parameter sets (ITU-T H.264, 7.4.1)."""
    units = bytes(packet).replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    kept = [unit for unit in units if unit[0] & 31 not in (7, 8)]
    return replaced(packet, b"".join(b"\0\0\0\1" + unit for unit in kept))


def test_what_does_not_decode_is_tried_from_further_back(tmp_path: Path) -> None:
    """Tasks that begin behind the place where a broadcast tells how it is coded have the true
    pictures all the same."""
    path = with_headers_once(tmp_path / "joined.ts")
    true = one_pass(path)
    assert len(true) == 240
    assert_true(read(path, Sampling(SamplingMode.FIRST, Fraction(2)), 1_000_000), true)


GROUP = 3
"""Frames of a group of pictures, of which the file below has 48."""


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int], Landmarks]:
    """A file, where its packets stand in it, and what passed when it was read."""
    path = encode(
        tmp_path_factory.mktemp("grouped") / "film.mkv",
        frames(48 * GROUP),
        options=x264(gop=GROUP, bframes=0),
    )
    data, landmarks = path.read_bytes(), Landmarks()
    with Source(os.fspath(path)) as source:
        passed = [bytes(one) for one in landmarks.passing(source.packets(), source.stream.index)]
    places = [data.index(packet) for packet in passed]
    assert len(places) == 48 * GROUP
    assert landmarks.are_found(os.fspath(path), 0, lambda: None)
    return data, places, landmarks


def groups_missed(
    grouped: tuple[bytes, list[int], Landmarks], path: Path, changed: int
) -> list[int]:
    """The groups of which seeks find that a byte so far from a packet's first is another."""
    data, places, landmarks = grouped
    missed = []
    for number, at in enumerate(places):
        other = bytearray(data)
        other[at + changed] ^= 1
        path.write_bytes(other)
        if not landmarks.are_found(os.fspath(path), 0, lambda: None):
            missed.append(number)
    return missed


def test_keyframes_all_over_a_file_are_sought(
    grouped: tuple[bytes, list[int], Landmarks], tmp_path: Path
) -> None:
    """Four of them, evenly spaced, the last one among them: each is known by what it holds."""
    missed = groups_missed(grouped, tmp_path / "other.mkv", 8)
    assert missed == [number * GROUP for number in (1, 17, 33, 47)]


def test_packets_behind_a_keyframe_must_be_the_same_too(
    grouped: tuple[bytes, list[int], Landmarks], tmp_path: Path
) -> None:
    """A wrong seek may give the keyframe the time that was sought, and what follows its own."""
    milliseconds = -2  # Of the block's header, before its last byte.
    missed = groups_missed(grouped, tmp_path / "other.mkv", milliseconds)
    behind = [number * GROUP + place for number in (1, 17, 33, 47) for place in (1, 2)]
    assert set(behind) <= set(missed)


def test_sound_is_no_place_to_seek_to(tmp_path: Path) -> None:
    """Its packets, which all are keyframes, pass by beside the pictures and are not compared."""
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        stream = container.add_stream("libx264", rate=30, options=x264(bframes=0))
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number, picture in enumerate(frames(120)):
            if number % 10 == 0:
                noise = np.random.default_rng(number).integers(-99, 99, (1, 2666), np.int16)
                heard = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
                heard.rate, heard.pts = 8000, number // 10 * 2666
                container.mux(sound.encode(heard))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    landmarks = Landmarks()
    with Source(os.fspath(path)) as source:
        every = source.packets(every_stream=True)
        passed = list(landmarks.passing(every, source.stream.index))
    assert len({packet.stream_index for packet in passed}) == 2
    assert landmarks.are_found(os.fspath(path), 1, lambda: None)
    assert probe(os.fspath(path))[0].sequential_reason is None
