"""Frames that share their time, come in two fields, or have no time of their own."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.packet import Packet
from av.stream import Stream
from footage_fields import field_pictures
from footage_files import encode, frames, x264

from storage.records import Fit, Gap, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.picture import Renderer
from workers.footage.plan import plan
from workers.footage.probe import probe

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
KEYFRAMES = Sampling(SamplingMode.KEYFRAMES, None)
FIRST = Sampling(SamplingMode.FIRST, Fraction(5))
SIZE = 64


def read(path: Path, sampling: Sampling) -> list[DecodedSample | Gap]:
    """What the tasks of a video give; they tile it, and each result lasts."""
    info, index = probe(os.fspath(path))
    how = {"size": SIZE, "fit": Fit.SQUASH}
    results = [
        result
        for task in plan(info, index, sampling, 1_000_000)
        for result in read_range(os.fspath(path), info, task, sampling, **how)  # type: ignore[arg-type]
    ]
    edges = [0, *(result.end_us for result in results)]
    assert [result.start_us for result in results] == edges[:-1]
    assert edges[-1] == info.duration_us
    assert all(result.start_us < result.end_us for result in results)
    return results


def one_pass(path: Path) -> list[bytes]:
    """The pictures of every frame, in the decoder's order."""
    info, _index = probe(os.fspath(path))
    one = Fraction(1)
    renderer = Renderer(SIZE, Fit.SQUASH, pixel_aspect=one, interlaced=info.interlaced)
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return [renderer.picture(frame).tobytes() for frame in container.decode(stream)]


def pictures(results: list[DecodedSample | Gap]) -> list[bytes]:
    assert not [result for result in results if isinstance(result, Gap)]
    return [result.picture.tobytes() for result in results if isinstance(result, DecodedSample)]


def in_pairs(path: Path, first: int) -> Path:
    """A video of which two frames each have one timestamp; frame `first` begins a pair."""
    return encode(
        path,
        frames(90),
        options=x264(gop=30, bframes=0),
        change=lambda number, packet: _at(packet, (number + first) // 2),
    )


def _at(packet: Packet[Stream], pts: int) -> Packet[Stream]:
    packet.pts = packet.dts = pts
    return packet


@pytest.mark.parametrize("first", [0, 1])
def test_frames_of_one_timestamp_are_all_had(first: int, tmp_path: Path) -> None:
    """With every frame each of two is a sample; with keyframes alone the one that is a keyframe,
    whether it comes first or second."""
    path = in_pairs(tmp_path / "pairs.mkv", first)
    info, _index = probe(os.fspath(path))
    assert info.sequential_reason == "presentation timestamps repeat"
    whole = one_pass(path)
    assert pictures(read(path, EVERY)) == whole
    assert pictures(read(path, KEYFRAMES)) == whole[::30]


@pytest.mark.parametrize("most", [2, 7, 31])
@pytest.mark.parametrize("first", [0, 1])
def test_ranges_do_not_part_frames_of_one_timestamp(
    first: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in several goes, each from the start, a video of frames in pairs gives every frame once:
    by their order in a range the frames of a pair are told apart."""
    monkeypatch.setattr("workers.footage.plan.MOST_SAMPLES", most)
    path = in_pairs(tmp_path / "pairs.mkv", first)
    info, index = probe(os.fspath(path))
    assert len(plan(info, index, EVERY)) > 2
    assert pictures(read(path, EVERY)) == one_pass(path)


def swapped(number: int, packet: Packet[Stream]) -> Packet[Stream]:
    packet.pts, packet.dts = (number ^ 1) + 2, number
    return packet


def test_intra_pictures_that_are_stored_out_of_order_are_shown_in_order(tmp_path: Path) -> None:
    """Each is a keyframe, and yet no range may begin at one: the file is read in one piece, and has
    every frame at its own time."""
    path = encode(
        tmp_path / "swapped.mkv",
        frames(60),
        codec="mjpeg",
        pixel_format="yuvj420p",
        change=swapped,
    )
    info, _index = probe(os.fspath(path))
    assert info.sequential_reason == "keyframes are not in the order of their timestamps"
    whole = one_pass(path)
    assert pictures(read(path, EVERY)) == [whole[number ^ 1] for number in range(60)]


def test_more_frames_than_microseconds_end_no_task(tmp_path: Path) -> None:
    """Half a microsecond apart: results last a microsecond at least, and what is left has none."""
    path = encode(
        tmp_path / "dense.mp4",
        frames(60),
        rate=2_000_000,
        options=x264(gop=10, bframes=0),
        container_options={"video_track_timescale": "2000000"},
    )
    whole = one_pass(path)
    assert pictures(read(path, EVERY)) == whole[:30]
    assert pictures(read(path, KEYFRAMES)) == whole[::10]


@pytest.mark.parametrize("apart", [False, True])
def test_pictures_of_two_fields_are_whole(apart: bool, tmp_path: Path) -> None:
    """Broadcasts whose fields are coded apart, with a timestamp for both or one each: every frame
    is had, with both fields, and stands for both."""
    path = field_pictures(tmp_path / "fields.ts", 100, apart=apart)
    info, _index = probe(os.fspath(path))
    assert info.interlaced
    assert info.duration_us == 4_000_000
    whole = one_pass(path)
    assert len(set(whole)) == 100
    every = read(path, EVERY)
    assert pictures(every) == whole
    assert [result.start_us for result in every] == [number * 40_000 for number in range(100)]
    assert pictures(read(path, FIRST)) == whole[::5]


def test_damage_is_no_second_field(tmp_path: Path) -> None:
    """A damaged field costs what refers to it, and nothing else: second fields are no gaps
    elsewhere."""
    path = field_pictures(tmp_path / "fields.ts", 250, apart=True, damaged=60)
    results = read(path, EVERY)
    (gap,) = [result for result in results if isinstance(result, Gap)]
    assert 2_300_000 <= gap.start_us <= 2_400_000
    assert gap.end_us == 3_000_000
    assert len(results) == 250 - 15 + 1


def without_most_times(path: Path, kept: int) -> Path:
    """Leave timestamps to one picture in so many of a transport stream (ISO/IEC 13818-1,
    2.4.3)."""
    data, seen = bytearray(path.read_bytes()), 0
    for at in range(0, len(data), 188):
        begins, filled = data[at + 1] & 0x40, data[at + 3] & 0x20
        head = at + 4 + (1 + data[at + 4] if filled else 0)
        if begins and data[head : head + 4] == b"\0\0\1\xe0":
            if seen % kept:
                data[head + 7] &= 0x3F
                length = data[head + 8]
                data[head + 9 : head + 9 + length] = b"\xff" * length
            seen += 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kept", [5, 30])
def test_sparse_timestamps_tell_the_rate(kept: int, tmp_path: Path) -> None:
    """Broadcasts may give a timestamp now and then: frames in between are counted at the rate that
    they have, and not at that of the timestamps."""
    path = encode(tmp_path / "sparse.ts", frames(150), options=x264(bframes=0))
    info, index = probe(os.fspath(without_most_times(path, kept)))
    assert index.counted
    assert info.frame_count == 150
    assert abs(info.duration_us - 5_000_000) < 70_000


def test_fields_without_timestamps_are_not_counted_as_frames(tmp_path: Path) -> None:
    """Of fields that are coded apart only the pictures with a timestamp are samples, at their
    times."""
    path = field_pictures(tmp_path / "fields.ts", 250)
    info, index = probe(os.fspath(without_most_times(path, 5)))
    assert not index.counted
    assert abs(info.duration_us - 10_000_000) < 250_000
    whole = one_pass(path)
    samples = read(path, Sampling(SamplingMode.FIRST, Fraction(1)))
    assert pictures(samples) == whole[::25]
