"""AVI of which a part was overwritten, cut out or put in: what is left stands where it stood."""

from __future__ import annotations

import itertools
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from footage_files import encode, frames, x264

from nightreel.reports.frames import Clock, decoded_packet
from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode, VideoInfo
from workers.footage.clock import Slots
from workers.footage.decode import DecodedSample, read_range
from workers.footage.plan import plan
from workers.footage.probe import probe
from workers.footage.source import Source

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
RATE = 30
CODINGS = {
    "mpeg4": ("mpeg4", {"g": "30", "bf": "0"}),
    "mpeg4 with b-frames": ("mpeg4", {"g": "30", "bf": "2"}),
    "h264": ("libx264", x264(gop=12)),
    "mjpeg": ("mjpeg", {}),
    "mpeg2": ("mpeg2video", {"g": "15", "bf": "0"}),
}
"""Codecs of which AVI tells the times by slots alone, and two that it seeks in."""


def film(path: Path, coding: str, count: int = 120) -> Path:
    """An AVI of so many pictures."""
    codec, options = CODINGS[coding]
    return encode(
        path,
        frames(count),
        codec=codec,
        options=options,
        pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p",
    )


def read(path: Path, sampling: Sampling = EVERY) -> tuple[VideoInfo, dict[int, bytes], list[Gap]]:
    """What an AVI is, its samples by their slots, and its gaps; together they tile it."""
    info, index = probe(os.fspath(path))
    results = [
        result
        for task in plan(info, index, sampling)
        for result in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
    ]
    edges = [0, *(result.end_us for result in results)]
    assert [result.start_us for result in results] == edges[:-1]
    assert edges[-1] == info.duration_us
    samples = {
        round(result.t_us * RATE / 1_000_000): result.picture.tobytes()
        for result in results
        if isinstance(result, DecodedSample)
    }
    return info, samples, [result for result in results if isinstance(result, Gap)]


def slots(gap: Gap) -> tuple[int, int]:
    """The first slot of a gap, and that behind it."""
    return round(gap.start_us * RATE / 1_000_000), round(gap.end_us * RATE / 1_000_000)


def chunks_of(path: Path) -> list[tuple[int, int]]:
    """Where the chunks of an AVI's only stream lie, by its index, and how long they are."""
    with av.open(str(path)) as container:
        entries = container.streams.video[0].index_entries
        return [(entry.pos, entry.size) for entry in entries]


@pytest.mark.parametrize("lost", [range(37, 49), range(60, 61)], ids=str)
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("mpeg4", {"g": "30", "bf": "0"}),
        ("mpeg4", {"g": "30", "bf": "2"}),
        ("mjpeg", {}),
    ],
    ids=["mpeg4", "mpeg4 with b-frames", "mjpeg"],
)
def test_chunks_that_are_lost_move_no_other(
    codec: str, options: dict[str, str], lost: range, tmp_path: Path
) -> None:
    """Zeros lie over some chunks of an AVI and their headers: what follows stands where it did, the
    lost time is a gap, and what was made of the lost pictures is no sample."""
    path = encode(
        tmp_path / "film.avi",
        frames(120),
        codec=codec,
        options=options,
        pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p",
    )
    whole, index = probe(os.fspath(path))
    (task,) = plan(whole, index, EVERY)
    read = list(read_range(os.fspath(path), whole, task, EVERY, size=32, fit=Fit.SQUASH))
    true = {one.t_us: one.picture.tobytes() for one in read if isinstance(one, DecodedSample)}
    assert len(true) == 120
    data, chunks = bytearray(path.read_bytes()), chunks_of(path)
    begin, end = chunks[lost[0]][0], sum(chunks[lost[-1]])
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    info, index = probe(os.fspath(path))
    assert info.duration_us == whole.duration_us
    assert index.lost.sum() == len(lost)
    assert info.frame_count == 120 - len(lost)
    for sampling in (EVERY, Sampling(rate=Fraction(5)), Sampling(SamplingMode.KEYFRAMES, None)):
        (task,) = plan(info, index, sampling)
        results = list(read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH))
        edges = [0, *(result.end_us for result in results)]
        assert [result.start_us for result in results] == edges[:-1]
        assert edges[-1] == info.duration_us
        samples = [result for result in results if isinstance(result, DecodedSample)]
        for sample in samples:
            assert sample.picture.tobytes() == true[sample.t_us]
        if sampling != EVERY:
            continue
        assert samples[-1].t_us >= 3_800_000
        gaps = [result for result in results if isinstance(result, Gap)]
        assert {gap.kind for gap in gaps} == {GapKind.DAMAGED}
        lost_us = sum(gap.end_us - gap.start_us for gap in gaps)
        assert round((4_000_000 - lost_us) * 30 / 1_000_000) == len(samples)


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
@pytest.mark.parametrize("wrong", ["gone", "in part zeros", "in part noise", "elsewhere"])
def test_an_index_that_is_wrong_moves_nothing(codec: str, wrong: str, tmp_path: Path) -> None:
    """The chunks of an AVI are all there, but not where its index says: none counts as lost."""
    path = encode(
        tmp_path / "film.avi",
        frames(90),
        codec=codec,
        options={"g": "30"},
        pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p",
    )
    data = bytearray(path.read_bytes())
    at = data.rindex(b"idx1")
    entries = range(at + 8 + 16 * 40, at + 8 + 16 * 50, 16)
    if wrong == "gone":
        data[at : at + 4] = b"JUNK"
    for entry in entries:
        if wrong == "in part zeros":
            data[entry : entry + 16] = bytes(16)
        if wrong == "in part noise":
            data[entry + 4 : entry + 16] = np.random.default_rng(entry).bytes(12)
        if wrong == "elsewhere":
            data[entry + 8] ^= 1
    path.write_bytes(data)
    info, index = probe(os.fspath(path))
    (task,) = plan(info, index, EVERY)
    results = list(read_range(os.fspath(path), info, task, EVERY, size=32, fit=Fit.SQUASH))
    assert [round(result.start_us * 30 / 1_000_000) for result in results] == list(range(90))
    assert all(isinstance(result, DecodedSample) for result in results)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("change", ["cut out", "put in"])
def test_bytes_that_are_cut_out_or_put_in_move_nothing(
    change: str, coding: str, tmp_path: Path
) -> None:
    """FFmpeg does not find the index then, and counts the chunks that it comes across. They stand
    where the index says by their sizes, and what is torn is no sample."""
    path = film(tmp_path / "film.avi", coding)
    whole, true, _gaps = read(path)
    assert len(true) == 120
    data, chunks = path.read_bytes(), chunks_of(path)
    # Out of the middle of two chunks, and of all between them.
    begin, end = (sum(chunks[number]) - chunks[number][1] // 2 for number in (47, 52))
    middle = np.random.default_rng(1).bytes(5000) if change == "put in" else b""
    path.write_bytes(data[:begin] + middle + data[begin if change == "put in" else end :])
    info, samples, gaps = read(path)
    # What is torn is read on over what follows, perhaps over the head of the next one.
    lost = 120 - info.frame_count
    assert (info.duration_us, lost) in (
        (whole.duration_us, one) for one in ((0,) if middle else (5, 6))
    )
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone == true.keys() - samples.keys()
    # Up to the next keyframe at most, and what is shown before the torn one but made of it.
    until = 48 + lost if coding == "mjpeg" else 60
    assert {*range(47, 48 + lost)} <= gone <= {*range(45, until)} or coding == "h264"


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("rate", [Fraction(5), None], ids=str)
def test_a_cut_is_seen_at_every_rate(rate: Fraction | None, coding: str, tmp_path: Path) -> None:
    """Samples of whatever rate are those of the whole file, or gaps."""
    sampling = Sampling(rate=rate) if rate else Sampling(SamplingMode.KEYFRAMES, None)
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    data, chunks = path.read_bytes(), chunks_of(path)
    path.write_bytes(data[: chunks[40][0]] + data[chunks[80][0] + 5 :])
    _info, samples, gaps = read(path, sampling)
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    assert max(samples) >= 90
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone >= {*range(42, 78)}


def test_places_of_pictures_of_one_size(tmp_path: Path) -> None:
    """Of uncompressed pictures nothing tells one from another. Behind the last cut their number
    does; between two cuts their times are not known, and they are no samples."""
    path = encode(
        tmp_path / "raw.avi", frames(60), codec="rawvideo", pixel_format="yuv420p", options={}
    )
    true = read(path)[1]
    data, chunks = path.read_bytes(), chunks_of(path)
    once = data[: chunks[10][0] + 100] + data[chunks[13][0] + 300 :]
    path.write_bytes(once)
    _info, samples, gaps = read(path)
    assert samples == {slot: true[slot] for slot in true if slot not in range(10, 15)}
    assert [slots(gap) for gap in gaps] == [(10, 11), (11, 15)]  # torn, and missing
    moved = len(data) - len(once)
    again = once[: chunks[30][0] - moved + 100] + once[chunks[32][0] - moved + 300 :]
    path.write_bytes(again)
    _info, samples, gaps = read(path)
    assert samples == {slot: true[slot] for slot in true if slot not in range(10, 34)}
    assert [slots(gap) for gap in gaps] == [(10, 11), (11, 34)]


def in_parts(path: Path, part: int, *, ahead: bool = False) -> Path:
    """Make an AVI one as those above a gigabyte are (OpenDML), with so many pictures in each part,
    and without the index at the end. Its parts follow the pictures of which they tell, or lie ahead
    of them."""
    data, told = path.read_bytes(), chunks_of(path)
    header = bytearray(data[: data.index(b"movi") - 8])
    at = header.index(b"JUNK" + struct.pack("<I", 4120))  # reserved for it
    header[at : at + 4] = b"indx"
    with av.open(str(path)) as container:
        keys = [entry.is_keyframe for entry in container.streams.video[0].index_entries]
    parts, out = [], bytearray()
    for first in range(0, len(told), part):
        riff = len(header) + len(out) if first else 0
        out += (b"RIFF----AVIX" if first else b"") + b"LIST----movi"
        movie = len(header) + len(out) - 12
        members = range(first, min(first + part, len(told)))
        length = 32 + 8 * len(members)
        base = len(header) + len(out) + length * ahead
        pictures, entries = bytearray(), b""
        for number in members:
            begin, size = told[number]
            entries += struct.pack("<II", len(pictures) + 8, size | (not keys[number]) << 31)
            pictures += data[begin : begin + 8 + size + size % 2]
        index = struct.pack("<4sIHBBI", b"ix00", length - 8, 2, 0, 1, len(members))
        index += struct.pack("<4sQI", b"00dc", base, 0) + entries
        parts.append((base + (-length if ahead else len(pictures)), length, len(members)))
        out += index + pictures if ahead else pictures + index
        end = len(header) + len(out)
        for begin in (movie, riff):
            inside, at_head = (header, begin) if begin < len(header) else (out, begin - len(header))
            inside[at_head + 4 : at_head + 8] = struct.pack("<I", end - begin - 8)
    table = struct.pack("<HBBI4s12x", 4, 0, 0, len(parts), b"00dc")
    table += b"".join(struct.pack("<QII", *one) for one in parts)
    header[at + 8 : at + 8 + len(table)] = table
    path.write_bytes(header + out)
    return path


@pytest.mark.parametrize("coding", ["mpeg4", "h264", "mjpeg"])
def test_an_index_in_parts_is_followed_too(coding: str, tmp_path: Path) -> None:
    """Bytes were cut out of a file of four parts, so that none of the last two is where the header
    says."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    in_parts(path, 30)
    assert read(path)[1] == true
    data, chunks = path.read_bytes(), chunks_of(path)
    assert len(chunks) == 120
    path.write_bytes(data[: chunks[40][0] + 20] + data[chunks[43][0] + 30 :])
    info, samples, gaps = read(path)
    assert info.duration_us == 4_000_000
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    assert samples.keys() >= {*range(37), *range(60, 120)}
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone >= {*range(40, 44)}


@pytest.mark.parametrize("ahead", [False, True], ids=["behind", "ahead"])
@pytest.mark.parametrize("coding", ["mpeg4", "h264", "mjpeg"])
def test_a_part_that_is_cut_out_with_its_index_moves_nothing(
    coding: str, ahead: bool, tmp_path: Path
) -> None:
    """Of a file of six parts, more than one is gone, and what the index tells of it."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    in_parts(path, 20, ahead=ahead)
    assert read(path)[1] == true
    data, chunks = path.read_bytes(), chunks_of(path)
    path.write_bytes(data[: chunks[35][0] + 20] + data[chunks[66][0] + 30 :])
    info, samples, gaps = read(path)
    assert info.duration_us == 4_000_000
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    assert samples.keys() >= {*range(32), *range(90, 120)}
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone == true.keys() - samples.keys() >= {*range(35, 67)}


@pytest.mark.parametrize("lost", [5, 17, 23])
def test_a_decoder_that_swallows_pictures_moves_nothing(lost: int, tmp_path: Path) -> None:
    """Behind lost chunks the H.264 decoder gives some pictures that are there out of order, or not
    at all, and tells of no error: from the next keyframe on they stand where they stood."""
    path = film(tmp_path / "film.avi", "h264")
    true = read(path)[1]
    data, chunks = bytearray(path.read_bytes()), chunks_of(path)
    for first in range(20, 32):
        begin, end = chunks[first][0] + 12, chunks[first + lost][0] + 4
        path.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
        _info, samples, _gaps = read(path)
        assert not [slot for slot, picture in samples.items() if picture != true[slot]]
        assert samples.keys() >= {*range(first - 4), *range(first + lost + 13, 120)}


@pytest.mark.parametrize("coding", ["mpeg4 with b-frames", "h264"])
def test_the_last_pictures_of_a_cut_file_are_not_early(coding: str, tmp_path: Path) -> None:
    """A picture that others would come before, were they there, is no sample in their place."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    data, chunks = path.read_bytes(), chunks_of(path)
    for last in range(60, 72):
        path.write_bytes(data[: sum(chunks[last]) + 8])
        _info, samples, gaps = read(path)
        assert not [slot for slot, picture in samples.items() if picture != true[slot]]
        assert samples.keys() >= {*range(last - 3)}
        assert gaps[-1].kind is GapKind.TRUNCATED


def test_a_frame_that_comes_behind_its_keyframe_takes_no_slot() -> None:
    """A confused decoder gives what it has found too late."""
    clock = Slots("avi", "h264")
    for packet in range(4):
        clock.feed(packet)
    assert [clock.time(0, key=True), clock.time(1)] == [0, 1]
    clock.lose(4, key=False)
    for packet in range(5, 10):
        clock.feed(packet)
    assert clock.time(6, key=True) == 6
    assert clock.passed == [(2, False), (3, False), (4, False), (5, False)]
    clock.time(3)
    assert clock.stray
    assert (clock.time(7), clock.stray) == (7, False)


OTHERS = {
    40: b"gps0" + struct.pack("<I", 6) + b"52 N 4",
    45: b"LIST" + struct.pack("<I", 16) + b"INFOISFT" + struct.pack("<I", 4) + b"cam\0",
    50: b"gps0" + struct.pack("<I", 7) + b"52 N 4 ",
}
"""Chunks of a recorder's own, by the picture before which they lie. The last is not filled up."""


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("listed", ["all", "keyframes", "the first"])
def test_an_index_that_tells_of_some_loses_none(listed: str, coding: str, tmp_path: Path) -> None:
    """Between the pictures lie chunks that no index tells of, and neither does it of some of the
    pictures: all stand where they stood, and nothing is missing."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    data, told = path.read_bytes(), chunks_of(path)
    with av.open(str(path)) as container:
        keys = [entry.is_keyframe for entry in container.streams.video[0].index_entries]
    movie, out, entries = data.index(b"movi"), b"movi", b""
    for number, (begin, size) in enumerate(told):
        out += OTHERS.get(number, b"")
        if listed == "all" or (keys[number] if listed == "keyframes" else number < 30):
            entries += struct.pack("<4sIII", b"00dc", 16 * keys[number], len(out), size)
        out += data[begin : begin + 8 + size + size % 2]
    out += b"idx1" + struct.pack("<I", len(entries)) + entries
    size = len(out) - 8 - len(entries)
    out = data[8 : movie - 4] + struct.pack("<I", size) + out
    path.write_bytes(b"RIFF" + struct.pack("<I", len(out)) + out)
    info, samples, gaps = read(path)
    assert info.frame_count == 120
    assert samples == true
    assert not gaps


@pytest.mark.parametrize("left", range(4, 9))
@pytest.mark.parametrize("coding", ["mpeg4", "h264", "mjpeg"])
def test_a_file_that_ends_with_the_head_of_its_index_is_had(
    coding: str, left: int, tmp_path: Path
) -> None:
    """All pictures are there, and so are all samples."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1") + left])
    assert read(path)[1] == true


@pytest.mark.parametrize("coding", ["mpeg4", "h264"])
@pytest.mark.parametrize(
    ("where", "at", "value"),
    [
        ("indx", 12, struct.pack("<I", 2**32 - 1)),
        ("indx", 32 + 16, struct.pack("<Q", 2**63)),
        ("indx", 32 + 16, struct.pack("<Q", 2**64 - 1)),
        ("indx", 32 + 16 + 12, struct.pack("<I", 2**31)),
        ("ix00", 12, struct.pack("<I", 2**32 - 1)),
        ("ix00", 12, struct.pack("<I", 0)),
        ("ix00", 20, struct.pack("<Q", 2**64 - 1)),
        ("ix00", 20, struct.pack("<Q", 2**62 - 1)),
        ("ix00", 32, struct.pack("<II", 2**32 - 1, 2**32 - 1)),
        ("ix00", 0, bytes(32)),
    ],
    ids=str,
)
def test_nonsense_in_an_index_of_parts_takes_nothing_before_it(
    where: str, at: int, value: bytes, coding: str, tmp_path: Path
) -> None:
    """The index of the second part, or what the header tells of it, holds numbers that are out of
    reach, and bytes may be missing from that part: what was before is had."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    data, chunks = bytearray(in_parts(path, 30).read_bytes()), chunks_of(path)
    begin = data.index(b"indx")
    if where == "ix00":
        begin = data.index(b"ix00", data.index(b"ix00") + 4)
    elif value == struct.pack("<I", 2**31):
        there = data.index(b"ix00", data.index(b"ix00") + 4)
        data[there : there + 32] = bytes(32)
    data[begin + at : begin + at + len(value)] = value
    for cut in (slice(0), slice(chunks[40][0] + 20, chunks[43][0] + 30)):
        left = bytearray(data)
        del left[cut]
        path.write_bytes(left)
        _info, samples, _gaps = read(path)
        whole = range(120) if cut == slice(0) and where == "indx" else range(28)
        assert {slot: samples[slot] for slot in whole} == {slot: true[slot] for slot in whole}


@pytest.mark.parametrize("before", [4, 8, 12, 31, 32, 40])
def test_an_index_at_the_edge_of_what_is_read_is_none(before: int, tmp_path: Path) -> None:
    """A picture holds what looks like the head of an index, where the header that is looked at
    ends: the others stand right."""
    path = encode(
        tmp_path / "raw.avi", frames(60), codec="rawvideo", pixel_format="yuv420p", options={}
    )
    true = read(path)[1]
    data, chunks = bytearray(path.read_bytes()), chunks_of(path)
    head = b"indx" + struct.pack("<IHBBI4s12x", 2**31, 4, 0, 0, 2**32 - 1, b"00dc")
    data[2**20 - before : 2**20 - before + len(head)] = head
    del data[chunks[10][0] + 100 : chunks[13][0] + 300]
    path.write_bytes(data)
    _info, samples, _gaps = read(path)
    changed = {number for number, (at, size) in enumerate(chunks) if abs(at - 2**20) < size + 64}
    kept = {*range(10), *range(15, 60)} - changed
    assert {slot: samples.get(slot) for slot in kept} == {slot: true[slot] for slot in kept}


def of_one_size(path: Path, change: str) -> tuple[dict[int, bytes], list[tuple[int, int]]]:
    """A file in four parts of pictures of one size, with such a change to its 19th to 22nd; and its
    chunks."""
    encode(path, frames(60), codec="rawvideo", pixel_format="yuv420p", options={})
    true = read(path)[1]
    data, chunks = in_parts(path, 16).read_bytes(), chunks_of(path)
    begin, end = chunks[18][0] + 100, chunks[21][0] + 300
    middle = {"cut out": b"", "put in": b"x" * 5000, "zeros": bytes(end - begin)}[change]
    path.write_bytes(data[:begin] + middle + data[begin if change == "put in" else end :])
    return true, chunks


@pytest.mark.parametrize("change", ["cut out", "put in", "zeros"])
def test_pictures_of_one_size_in_parts_stand_right(change: str, tmp_path: Path) -> None:
    """Of a file in parts, too, one damage takes only what it touches."""
    path = tmp_path / "raw.avi"
    true, chunks = of_one_size(path, change)
    assert len(chunks) == 60
    info, samples, gaps = read(path)
    assert info.duration_us == 2_000_000
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    assert samples.keys() >= {*range(18), *range(23, 60)}
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone >= ({19, 20} if change != "put in" else set())


def annotated(path: Path) -> dict[int, bytes]:
    """The frames of an AVI by their slots, as they are decoded for an annotated film."""
    info, _index = probe(os.fspath(path))
    clock = Clock(info)
    with Source(os.fspath(path), info.stream_index) as source:
        return {
            round(timed.t * RATE): timed.frame.to_ndarray().tobytes()
            for packet in itertools.chain(source.packets(), [None])
            for timed in decoded_packet(source, clock, packet)
        }


@pytest.mark.parametrize("coding", ["mpeg4 with b-frames", "h264"])
@pytest.mark.parametrize("change", ["zeros", "cut out"])
def test_annotated_films_have_the_times_of_samples(
    change: str, coding: str, tmp_path: Path
) -> None:
    """A frame of a damaged file that is a sample is shown at its time."""
    path = film(tmp_path / "film.avi", coding)
    true = annotated(path)
    assert len(true) == 120
    data, chunks = path.read_bytes(), chunks_of(path)
    for first in range(40, 52):
        begin, end = chunks[first][0] + 12, chunks[first + 9][0] + 5
        middle = bytes(end - begin) if change == "zeros" else b""
        path.write_bytes(data[:begin] + middle + data[end:])
        samples, shown = read(path)[1], annotated(path)
        # A damaged frame, which is no sample, may stand in the place of the first one behind it.
        assert sum(shown.get(slot) != true[slot] for slot in samples) <= 1


def test_a_torn_picture_that_is_swallowed_moves_none_before_it(tmp_path: Path) -> None:
    """Of a torn chunk the H.264 decoder may give nothing, without an error: no picture that waited
    for that one is a sample in its place."""
    path = film(tmp_path / "film.avi", "h264")
    true = read(path)[1]
    data, chunks = path.read_bytes(), chunks_of(path)
    for first in range(48, 60):
        path.write_bytes(data[: chunks[first][0] + 12] + data[chunks[first + 9][0] + 5 :])
        _info, samples, _gaps = read(path)
        assert not [slot for slot, picture in samples.items() if picture != true[slot]]


@pytest.mark.parametrize("coding", ["mpeg4", "h264", "mjpeg"])
@pytest.mark.parametrize("change", ["zeros", "cut out"])
@pytest.mark.parametrize("until", ["index", "next part"])
def test_damage_that_takes_a_part_of_the_index_along_moves_nothing(
    until: str, change: str, coding: str, tmp_path: Path
) -> None:
    """The last pictures of a part are gone, and what the index tells of that part: the next part
    stands where it stood, and what is torn is no sample."""
    path = film(tmp_path / "film.avi", coding)
    true = read(path)[1]
    data, chunks = path.read_bytes(), chunks_of(in_parts(path, 30))
    data = path.read_bytes()
    begin = chunks[56][0] + 10
    end = data.index(b"ix00", begin) + 40 if until == "index" else chunks[62][0] + 20
    path.write_bytes(data[:begin] + bytes((end - begin) * (change == "zeros")) + data[end:])
    info, samples, gaps = read(path)
    assert info.duration_us == 4_000_000
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    first, last = (56, 64) if coding == "mjpeg" else (53, 90)
    assert samples.keys() >= {*range(first), *range(last, 120)}
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone == true.keys() - samples.keys() >= {*range(56, 60)}


@pytest.mark.parametrize("change", ["zeros", "noise", "cut out"])
@pytest.mark.parametrize("known", ["nothing", "keyframes"])
def test_a_torn_picture_is_none_where_no_index_tells_of_it(
    known: str, change: str, tmp_path: Path
) -> None:
    """Decoders of MJPEG complete what is torn without an error. That no chunk follows it tells."""
    path = film(tmp_path / "film.avi", "mjpeg")
    true = {picture: slot for slot, picture in read(path)[1].items()}
    data, chunks = bytearray(path.read_bytes()), chunks_of(path)
    index = data.rindex(b"idx1") + 8
    for number in range(120):
        if known == "nothing" or number % 30:
            data[index + 16 * number : index + 16 * number + 4] = b"99dc"
    if known == "nothing":
        data[index - 8 : index - 4] = b"JUNK"
    begin, end = (chunks[number][0] + chunks[number][1] // 2 for number in (40, 42))
    lost = np.random.default_rng(2).bytes(end - begin) if change == "noise" else bytes(end - begin)
    data[begin:end] = b"" if change == "cut out" else lost
    path.write_bytes(data)
    _info, samples, _gaps = read(path)
    # What follows stands early, but for the pictures of which the index tells.
    seen = [true.get(picture) for picture in samples.values()]
    assert None not in seen
    assert [*range(40), *range(46, 120)] == [slot for slot in seen if slot not in range(40, 46)]
    assert not {40, 41} & {*seen}


def test_a_torn_picture_is_none_behind_the_end_of_an_index(tmp_path: Path) -> None:
    """The index tells of the first half only, as that of a file above a gigabyte may."""
    path = film(tmp_path / "film.avi", "mjpeg")
    true = read(path)[1]
    data, chunks = bytearray(path.read_bytes()), chunks_of(path)
    index = data.rindex(b"idx1") + 8
    data[index - 4 : index] = struct.pack("<I", 16 * 60)
    del data[index + 16 * 60 :]
    begin, end = (chunks[number][0] + chunks[number][1] // 2 for number in (90, 92))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    _info, samples, _gaps = read(path)
    assert samples.keys() >= {*range(90)}
    assert not [slot for slot in range(91) if samples.get(slot, true[slot]) != true[slot]]
    assert true[91] not in samples.values()


def test_zeros_behind_a_chunk_spare_it(tmp_path: Path) -> None:
    """They begin at its end: it is whole."""
    path = film(tmp_path / "film.avi", "mjpeg")
    true = read(path)[1]
    data, chunks = bytearray(path.read_bytes()), chunks_of(path)
    begin, end = chunks[40][0], chunks[42][0] + 30
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    assert read(path)[1] == {slot: true[slot] for slot in true if slot not in range(40, 43)}
