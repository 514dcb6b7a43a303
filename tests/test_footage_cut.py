"""Files that end too early, or hold less than their containers promise, in whatever order it is
shown."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from footage_files import edited, encode, frames, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode, VideoInfo
from workers.footage.decode import DecodedSample, read_range
from workers.footage.index import Index
from workers.footage.plan import plan
from workers.footage.probe import Rejected, RejectKind, probe

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
SAMPLINGS = [
    EVERY,
    Sampling(SamplingMode.FIRST, Fraction(5)),
    Sampling(SamplingMode.PREFER_KEYFRAME, Fraction(2)),
    Sampling(SamplingMode.KEYFRAMES, None),
]
BACK_AND_FORTH = [(2, 4.1), (2, 0.5), (1.5, 6.2), (2, 1.7)]
"""Edits, of which every second one shows an earlier part of the media."""


def shown_back_and_forth(path: Path) -> Path:
    """Eight seconds of media behind their tables, shown by BACK_AND_FORTH."""
    options = {"movflags": "+faststart"}
    encode(path, frames(240), options=x264() | {"crf": "1"}, container_options=options)
    before = path.read_bytes().index(b"mdat")
    data = edited(path, *BACK_AND_FORTH).read_bytes()
    # The table of more edits has moved the pictures.
    at, moved = data.index(b"stco") + 8, data.index(b"mdat") - before
    offsets = struct.unpack_from(f">{int.from_bytes(data[at : at + 4])}I", data, at + 4)
    new = struct.pack(f">{len(offsets)}I", *(offset + moved for offset in offsets))
    path.write_bytes(data[: at + 4] + new + data[at + 4 + len(new) :])
    return path


def read(
    path: Path, info: VideoInfo, index: Index, sampling: Sampling
) -> list[DecodedSample | Gap]:
    return [
        result
        for task in plan(info, index, sampling, 1_000_000)
        for result in read_range(os.fspath(path), info, task, sampling, size=64, fit=Fit.SQUASH)
    ]


@pytest.mark.parametrize("percent", [90, 80, 65, 50, 35])
def test_what_a_cut_file_lacks_in_its_middle_is_a_gap(percent: int, tmp_path: Path) -> None:
    """Edits lead beyond the end and back: every frame that is there is had, the right one; none of
    the others is claimed; and the file lasts as long as it would if it were whole."""
    path = shown_back_and_forth(tmp_path / "cut.mp4")
    info, index = probe(os.fspath(path))
    true: dict[int | None, list[bytes]] = defaultdict(list)
    for sample in read(path, info, index, EVERY):
        assert isinstance(sample, DecodedSample)
        true[sample.pts].append(sample.picture.tobytes())
    assert sum(map(len, true.values())) == len(index.pts) > 200
    size = path.stat().st_size * percent // 100
    with av.open(os.fspath(path)) as container:
        shown = [one for one in container.demux(video=0) if one.size and not one.is_discard]
        there = {one.pts for one in shown if (one.pos or 0) + one.size <= size}
    whole_us = info.duration_us
    os.truncate(path, size)
    info, index = probe(os.fspath(path))
    assert info.duration_us == whole_us
    assert any("truncated" in warning for warning in info.warnings)
    lost = [
        int((pts - info.first_pts) * info.time_base * 1_000_000)
        for pts in true.keys() - there
        if pts is not None
    ]
    for sampling in SAMPLINGS:
        results = read(path, info, index, sampling)
        samples = [result for result in results if isinstance(result, DecodedSample)]
        gaps = [result for result in results if isinstance(result, Gap)]
        assert {gap.kind for gap in gaps} <= {GapKind.TRUNCATED}
        for sample in samples:
            assert sample.pts in there
            assert sample.picture.tobytes() in true[sample.pts]
        if sampling == EVERY:
            assert {sample.pts for sample in samples} == there
            assert all(any(gap.start_us <= at < gap.end_us for gap in gaps) for at in lost)


@pytest.mark.parametrize("percent", [90, 40])
def test_a_long_row_of_lost_packets_is_not_read(
    percent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hours that are cut off only the last packets are looked at; the duration is the same."""
    path = encode(
        tmp_path / "long.mp4",
        frames(600),
        options=x264(),
        container_options={"movflags": "+faststart"},
    )
    whole, _index = probe(os.fspath(path))
    os.truncate(path, path.stat().st_size * percent // 100)
    one_by_one, read_whole = probe(os.fspath(path))
    monkeypatch.setattr("workers.footage.source._MOST_LOST_BYTES", 2**15)
    monkeypatch.setattr("workers.footage.skim._LATE", 20)
    info, index = probe(os.fspath(path))
    assert info == one_by_one
    assert info.duration_us == whole.duration_us > info.indexed_us
    assert np.array_equal(index.pts, read_whole.pts)


def test_edits_of_which_nothing_is_sure_are_refused(tmp_path: Path) -> None:
    """A file whose tables are cut off shows other frames at other times than it was meant to."""
    noise = np.random.default_rng(1).integers(0, 256, (240, 96, 160, 3), np.uint8)
    path = edited(
        encode(tmp_path / "cut.mp4", noise, options=x264() | {"crf": "1"}), *BACK_AND_FORTH
    )
    data = path.read_bytes()
    at = data.rindex(b"stco") + 8
    assert int.from_bytes(data[at : at + 4]) > 2
    os.truncate(path, at + 4 + 2 * 4)
    with pytest.raises(Rejected, match="in the middle of its tables") as caught:
        probe(os.fspath(path))
    assert caught.value.kind is RejectKind.UNREADABLE


def with_empty_slots(path: Path, codec: str) -> Path:
    """An AVI of 60 frames, and of 240 slots behind them that hold nothing."""
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    encode(
        path,
        frames(61),
        codec=codec,
        pixel_format=pixel_format,
        pts=lambda number: number if number < 60 else 300,
    )
    data = bytearray(path.read_bytes())
    index = data.index(b"idx1")
    for at in (data.rindex(b"00dc", 0, index), data.rindex(b"00dc", index)):
        data[at : at + 4] = b"JUNK"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_the_last_picture_of_an_avi_stands_as_long_as_slots_follow(
    codec: str, tmp_path: Path
) -> None:
    """A recorder that drops frames to the end leaves empty slots: the file is whole. Cut among
    them, it lacks those that are gone."""
    path = with_empty_slots(tmp_path / "still.avi", codec)
    info, index = probe(os.fspath(path))
    assert info.duration_us == info.indexed_us == 10_000_000
    assert not any("truncated" in warning for warning in info.warnings)
    *_others, last = read(path, info, index, Sampling(SamplingMode.FIRST, Fraction(1)))
    assert isinstance(last, DecodedSample)
    assert (last.start_us, last.end_us) == (1_000_000, 10_000_000)
    data = path.read_bytes()
    os.truncate(path, data.rindex(b"00dc\0\0\0\0", 0, data.index(b"idx1")) - 8 * 119)
    info, _index = probe(os.fspath(path))
    assert info.indexed_us == 6_000_000
    assert 9_900_000 <= info.duration_us <= 10_100_000
    assert any("truncated" in warning for warning in info.warnings)


def test_what_lies_behind_the_pictures_is_told(tmp_path: Path) -> None:
    """Recordings joined byte by byte, of which a demuxer reads the first: a warning says so."""
    path = encode(tmp_path / "first.flv", frames(300), options=x264() | {"crf": "1"})
    info, _index = probe(os.fspath(path))
    assert info.warnings == ()
    joined = tmp_path / "joined.flv"
    joined.write_bytes(path.read_bytes() * 2)
    info, _index = probe(os.fspath(joined))
    assert info.duration_us == 10_000_000
    assert any("no picture of this stream in its last" in warning for warning in info.warnings)
