"""Damage, loss and stalls while decoding: what can be had is had, the rest is a gap."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.stream import Stream
from footage_files import Picture, damaged, encode, frames, replaced, scenery, x264
from footage_reference import SAMPLINGS

from storage.records import Fit, FrameRange, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, FootageError, read_range
from workers.footage.picture import Renderer
from workers.footage.plan import plan
from workers.footage.probe import probe
from workers.footage.source import Source
from workers.footage.watchdog import Stalled, watched

SIZE = 32
FIRST = Sampling(SamplingMode.FIRST, Fraction(2))
EVERY = Sampling(SamplingMode.EVERY_FRAME, None)


def read(path: Path, sampling: Sampling, task_us: int = 1_000_000) -> list[DecodedSample | Gap]:
    """All results of a file's tasks, which must tile it, run from the last to the first."""
    info, index = probe(os.fspath(path))
    results: list[DecodedSample | Gap] = []
    for task in reversed(plan(info, index, sampling, task_us)):
        results[:0] = read_range(os.fspath(path), info, task, sampling, size=SIZE, fit=Fit.SQUASH)
    edges = [0, *(result.end_us for result in results)]
    assert [result.start_us for result in results] == edges[:-1]
    assert edges[-1] == info.duration_us
    return results


@pytest.mark.parametrize("spoiled", [3, 7, 22, 30])
def test_damage_that_moves_the_end_of_a_frame_is_seen(spoiled: int, tmp_path: Path) -> None:
    """Of WMV, whose decoder goes on with whatever it reads, a frame that does not end where its
    packet does is damaged; a whole file has none."""

    def flipped(number: int, packet: Packet[Stream]) -> Packet[Stream]:
        data = bytearray(bytes(packet))
        data[len(data) // 2] ^= 0x10
        return replaced(packet, bytes(data)) if number == spoiled else packet

    coding = {"codec": "wmv2", "options": {"g": "20"}}
    whole = read(encode(tmp_path / "whole.wmv", frames(60), **coding), EVERY)
    hurt = read(encode(tmp_path / "hurt.wmv", frames(60), **coding, change=flipped), EVERY)
    unhurt = {one.start_us: one.picture.tobytes() for one in whole if not isinstance(one, Gap)}
    assert len(unhurt) == 60
    shown = {one.start_us: one.picture.tobytes() for one in hurt if not isinstance(one, Gap)}
    assert shown.items() < unhurt.items()
    assert 60 - len(shown) <= 20


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("spoiled", [range(1), range(3), range(210, 211), range(215, 240)])
def test_damage_stays_in_its_group(container: str, spoiled: range, tmp_path: Path) -> None:
    """Noise for packets in the first or last group of pictures changes nothing outside of it."""
    whole = encode(tmp_path / f"whole.{container}", frames(240), options=x264(bframes=0))
    path = encode(
        tmp_path / f"damaged.{container}",
        frames(240),
        options=x264(bframes=0),
        change=lambda number, packet: damaged(packet) if number in spoiled else packet,
    )
    group = spoiled.start // 30
    for sampling in (*SAMPLINGS, EVERY):
        unhurt = {
            sample.t_us: sample.picture.tobytes()
            for sample in read(whole, sampling)
            if isinstance(sample, DecodedSample)
        }
        for result in read(path, sampling):
            if result.start_us // 1_000_000 != group:
                assert isinstance(result, DecodedSample), result
                assert result.picture.tobytes() == unhurt[result.t_us]


def spoiled_at(path: Path, number: int, count: int, options: dict[str, str]) -> Path:
    """A video of which one packet, in decoding order, is noise."""
    return encode(
        path,
        [grainy(at) for at in range(count)],
        options=options,
        change=lambda at, packet: damaged(packet) if at == number else packet,
    )


@pytest.mark.parametrize("spoiled", [0, 37, 59, 119])
@pytest.mark.parametrize("bframes", [0, 3])
def test_no_picture_is_made_of_damage(bframes: int, spoiled: int, tmp_path: Path) -> None:
    """Decoders tell of damage, make up what they lack, and go on from that to the next keyframe:
    none of it is a sample. Each is, bit for bit, what the undamaged file gives; most are had."""
    options = x264(bframes=bframes)
    whole = spoiled_at(tmp_path / "whole.mp4", -1, 120, options)
    path = spoiled_at(tmp_path / "spoiled.mp4", spoiled, 120, options)
    true = {
        sample.t_us: sample.picture.tobytes()
        for sample in read(whole, EVERY)
        if isinstance(sample, DecodedSample)
    }
    for sampling in (*SAMPLINGS, EVERY):
        samples = [result for result in read(path, sampling) if isinstance(result, DecodedSample)]
        assert len(samples) >= len(read(whole, sampling)) // 2
        for sample in samples:
            assert sample.picture.tobytes() == true[sample.t_us]


@pytest.mark.parametrize("spoiled", [37, 119])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("film.avi", "mpeg4", {"g": "30", "bf": "2"}),
        ("film.avi", "libx264", x264(bframes=3)),
        ("film.h264", "libx264", x264(bframes=0)),
        ("film.h264", "libx264", x264(bframes=3, extra="open-gop=1")),
    ],
    ids=["mpeg4", "h264", "bare", "bare, open groups"],
)
def test_damaged_frames_are_counted_and_no_samples(
    name: str, codec: str, options: dict[str, str], spoiled: int, tmp_path: Path
) -> None:
    """Frames without timestamps: what damage reaches is a gap, or another frame of its bucket
    stands in, and all others keep their places. No sample lasts over damage."""

    def film(folder: str, change: Callable[[int, Packet[Stream]], Packet[Stream]]) -> Path:
        (tmp_path / folder).mkdir()
        pictures = [grainy(number) for number in range(120)]
        return encode(
            tmp_path / folder / name, pictures, codec=codec, options=options, change=change
        )

    def spoil(number: int, packet: Packet[Stream]) -> Packet[Stream]:
        return damaged(packet) if number == spoiled else packet

    whole, path = film("whole", lambda _number, packet: packet), film("damaged", spoil)
    true = {
        sample.t_us: sample for sample in read(whole, EVERY) if isinstance(sample, DecodedSample)
    }
    assert len(true) == 120
    for sampling in (*SAMPLINGS, EVERY):
        results = read(path, sampling)
        samples = [result for result in results if isinstance(result, DecodedSample)]
        assert len(samples) >= len(read(whole, sampling)) // 2
        for sample in samples:
            assert sample.picture.tobytes() == true[sample.t_us].picture.tobytes()
            if sampling == EVERY:
                assert sample.end_us == true[sample.t_us].end_us
    gaps = [result for result in read(path, EVERY) if isinstance(result, Gap)]
    assert {gap.kind for gap in gaps} == {GapKind.DAMAGED}


def test_a_whole_frame_stands_in_for_one_that_refers_to_damage(tmp_path: Path) -> None:
    """Frames 50 to 79 refer to damage: of the second from 60 on, the keyframe 80 is the sample."""
    path = spoiled_at(tmp_path / "spoiled.mp4", 50, 120, x264(gop=40, bframes=0))
    results = read(path, Sampling(SamplingMode.FIRST, Fraction(1)))
    assert all(isinstance(result, DecodedSample) for result in results)
    assert [(result.start_us, result.end_us) for result in results] == [
        (second * 1_000_000, (second + 1) * 1_000_000) for second in range(4)
    ]
    assert isinstance(results[2], DecodedSample)
    assert (results[2].bucket, results[2].t_us) == (2, 2_666_666)


def test_time_without_a_whole_frame_is_a_gap(tmp_path: Path) -> None:
    """Half a second of which every frame refers to damage is a gap with its reason."""
    path = spoiled_at(tmp_path / "spoiled.mp4", 40, 120, x264(bframes=0))
    gaps = [result for result in read(path, FIRST) if isinstance(result, Gap)]
    assert [(gap.start_us, gap.end_us, gap.kind) for gap in gaps] == [
        (1_500_000, 2_000_000, GapKind.DAMAGED)
    ]
    assert "undamaged" in gaps[0].detail


def test_damage_without_a_keyframe_after_it_ends_after_ten_seconds(tmp_path: Path) -> None:
    """A file with one keyframe is not lost for one damaged packet."""
    path = spoiled_at(tmp_path / "spoiled.mp4", 75, 450, x264(gop=10_000, bframes=0))
    results = read(path, FIRST)
    kinds = [kind for kind, _results in itertools.groupby(results, key=type)]
    assert kinds == [DecodedSample, Gap, DecodedSample]
    (lost,) = (result for result in results if isinstance(result, Gap))
    assert (lost.start_us, lost.end_us) == (2_500_000, 12_500_000)


def theora(path: Path, *paging: str) -> Path:
    """Eight seconds of pictures, a keyframe every 16 of them."""
    source = ["-f", "lavfi", "-i", "testsrc2=s=160x96:r=30:d=8"]
    coding = ["-c:v", "libtheora", "-q:v", "6", "-g", "16", *paging]
    subprocess.run(["ffmpeg", "-v", "error", *source, *coding, os.fspath(path)], check=True)
    return path


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
def test_a_packet_across_a_missing_page_is_damaged(tmp_path: Path) -> None:
    """Whichever page of an Ogg is missing, what began before it is not shown with the end of what
    goes on behind it; of a whole file all frames are."""
    path = theora(tmp_path / "whole.ogv", "-pagesize", "4000")
    true = {
        sample.t_us: sample.picture.tobytes()
        for sample in read(path, EVERY)
        if isinstance(sample, DecodedSample)
    }
    assert len(true) == 240
    head, *pages = path.read_bytes().split(b"OggS")
    across = 0
    for number in range(10, len(pages) - 10, 6):
        path.write_bytes(b"OggS".join([head, *pages[:number], *pages[number + 1 :]]))
        _info, index = probe(os.fspath(path))
        across += index.marked_damaged
        for sample in read(path, EVERY):
            if isinstance(sample, DecodedSample):
                assert sample.picture.tobytes() == true[sample.t_us]
    assert across > 0


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
def test_pages_that_are_missing_from_an_ogg_are_a_gap(tmp_path: Path) -> None:
    """Theora has a packet for every frame, so where none is there some are missing; what follows is
    made of them, up to the next keyframe."""
    path = theora(tmp_path / "video.ogv", "-page_duration", "100000")
    true = {
        sample.t_us: sample.picture.tobytes()
        for sample in read(path, EVERY)
        if isinstance(sample, DecodedSample)
    }
    assert len(true) == 240
    head, *pages = path.read_bytes().split(b"OggS")
    middle = len(pages) // 2
    assert middle > 10
    path.write_bytes(b"OggS".join([head, *pages[:middle], *pages[middle + 4 :]]))
    info, index = probe(os.fspath(path))
    assert index.lost.sum() == 240 - info.frame_count > 10
    assert info.duration_us == 8_000_000
    for sampling in (*SAMPLINGS, EVERY):
        results = read(path, sampling)
        samples = [result for result in results if isinstance(result, DecodedSample)]
        for sample in samples:
            assert sample.picture.tobytes() == true[sample.t_us]
        if sampling == EVERY:
            gaps = [result for result in results if isinstance(result, Gap)]
            assert {gap.kind for gap in gaps} == {GapKind.DAMAGED}
            lost_us = sum(gap.end_us - gap.start_us for gap in gaps)
            assert lost_us >= index.lost.sum() * 1_000_000 // 30


def test_a_dropped_packet_is_no_endless_search(tmp_path: Path) -> None:
    """A file whose wanted packet is gone after probing: a gap for it, samples for the rest."""
    whole = encode(tmp_path / "whole.mkv", frames(240), options=x264(bframes=0))
    holed = encode(
        tmp_path / "holed.mkv",
        frames(240),
        options=x264(bframes=0),
        change=lambda number, packet: None if number == 119 else packet,
    )
    info, index = probe(os.fspath(whole))
    (task,) = plan(info, index, EVERY)
    results = list(read_range(os.fspath(holed), info, task, EVERY, size=SIZE, fit=Fit.SQUASH))
    gaps = [result for result in results if isinstance(result, Gap)]
    assert [(gap.kind, gap.start_us, gap.end_us) for gap in gaps] == [
        (GapKind.DAMAGED, 3_967_000, 4_000_000)
    ]
    assert len(results) == 240


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("cut.avi", "mpeg4", {"g": "30", "bf": "2"}), ("cut.h264", "libx264", x264())],
)
@pytest.mark.parametrize("sampling", [FIRST, EVERY], ids=str)
def test_a_counted_video_that_ends_early_is_no_long_sample(
    name: str, codec: str, options: dict[str, str], sampling: Sampling, tmp_path: Path
) -> None:
    """Of a video without timestamps half is gone after probing: the last sample lasts as long as
    its frames, and the rest is a gap."""
    path = encode(tmp_path / name, frames(240), codec=codec, options=options)
    info, index = probe(os.fspath(path))
    (task,) = plan(info, index, sampling)
    assert not task.pts
    os.truncate(path, path.stat().st_size // 2)
    results = list(read_range(os.fspath(path), info, task, sampling, size=SIZE, fit=Fit.SQUASH))
    *samples, lost = results
    assert all(isinstance(sample, DecodedSample) for sample in samples)
    assert isinstance(lost, Gap)
    assert (lost.kind, lost.end_us) == (GapKind.READ_ERROR, 8_000_000)
    assert 3_000_000 < lost.start_us < 5_000_000
    assert lost.start_us - samples[-1].start_us <= 500_000


def test_another_frame_of_the_bucket_stands_in(tmp_path: Path) -> None:
    """Where the wanted frame is lost but its bucket has others, one of them is the sample."""
    path = encode(
        tmp_path / "holed.mp4",
        frames(120),
        codec="mjpeg",
        pixel_format="yuvj420p",
        change=lambda number, packet: (
            replaced(packet, b"\0" * packet.size) if number in (30, 31) else packet
        ),
    )
    results = read(path, Sampling(SamplingMode.FIRST, Fraction(1)))
    samples = [result for result in results if isinstance(result, DecodedSample)]
    assert len(samples) == len(results) == 4
    assert samples[1].bucket == 1
    assert samples[1].start_us == 1_000_000
    assert 1_060_000 < samples[1].t_us < 2_000_000


def test_gaps_that_touch_are_one(tmp_path: Path) -> None:
    """A second of lost pictures is one gap, not one a frame."""
    path = encode(
        tmp_path / "holed.mp4",
        frames(120),
        codec="mjpeg",
        pixel_format="yuvj420p",
        change=lambda number, packet: (
            replaced(packet, b"\0" * packet.size) if number in range(30, 60) else packet
        ),
    )
    results = read(path, EVERY, 60_000_000)
    gaps = [result for result in results if isinstance(result, Gap)]
    assert [(gap.start_us, gap.end_us, gap.kind) for gap in gaps] == [
        (1_000_000, 2_000_000, GapKind.DAMAGED)
    ]


def pictures_from(path: Path, seek_us: int) -> dict[int, Picture]:
    """What a decoder gives that starts at the keyframe before a time and knows nothing else."""
    renderer = Renderer(160, Fit.SQUASH, pixel_aspect=Fraction(1))
    with av.open(str(path)) as container:
        if seek_us:
            container.seek(seek_us)
        return {
            frame.pts: renderer.picture(frame)
            for frame in container.decode(video=0)
            if frame.pts is not None
        }


OLD_444 = Path(__file__).with_name("h264_444_core148.mp4")
"""Sixty pictures of `grainy`, five a second, in H.264 4:4:4 by the x264 of 2016 (ffmpeg N-81741,
`-pix_fmt yuv444p -c:v libx264 -threads 1 -preset slow -x264-params
keyint=15:min-keyint=15:scenecut=0:bframes=2:b-adapt=0:crf=36`). It chose the CABAC contexts of 8x8
blocks in a way of its own, which no encoder does any more; that they are to be read so is told by
the first packet alone."""


def older(path: Path) -> Path:
    """A stream of 4:2:0 that says it is by x264 of 2005, which derived direct motion otherwise."""

    def age(_number: int, packet: av.Packet) -> av.Packet:
        data = bytes(packet)
        at = data.find(b"x264 - core ")
        return packet if at < 0 else replaced(packet, data[: at + 12] + b"033" + data[at + 15 :])

    return encode(
        path,
        [grainy(number) for number in range(120)],
        options=x264(bframes=7, extra="b-pyramid=normal:direct=spatial:ref=4"),
        change=age,
    )


@pytest.mark.parametrize(
    ("made", "pixel_format", "levels"),
    [(lambda _path: OLD_444, "yuv444p", 50), (older, "yuv420p", 0)],
    ids=["444", "420"],
)
def test_headers_that_stand_in_the_first_packet_alone_are_known(
    made: Callable[[Path], Path], pixel_format: str, levels: int, tmp_path: Path
) -> None:
    """Streams of old x264 versions decode differently from new ones, in 4:4:4 to garbage, and only
    the file's first packet tells the version: tasks in the middle, in any order, give the pictures
    of the one pass."""
    path = made(tmp_path / "old.mp4")
    info, index = probe(os.fspath(path))
    assert info.pixel_format == pixel_format
    assert info.sequential_reason is None
    plain, unprimed = pictures_from(path, 0), pictures_from(path, info.duration_us // 2)
    assert len(plain) == info.frame_count
    wrong = [np.abs(picture.astype(int) - plain[pts]).mean() for pts, picture in unprimed.items()]
    assert max(wrong) > levels, "the trap must be there"
    for sampling in (*SAMPLINGS, EVERY):
        tasks = plan(info, index, sampling, info.duration_us // 4)
        assert len(tasks) == 4 or sampling is not EVERY
        seen = []
        for task in reversed(tasks):
            for sample in read_range(
                os.fspath(path), info, task, sampling, size=160, fit=Fit.SQUASH
            ):
                assert isinstance(sample, DecodedSample)
                assert sample.pts is not None
                assert (sample.picture == plain[sample.pts]).all()
                seen.append(sample.pts)
        assert sorted(seen) == sorted(pts for task in tasks for pts in task.pts)


def grainy(number: int) -> Picture:
    """A still scene with film grain and one thing that moves."""
    grain = np.random.default_rng(number).integers(-6, 7, (96, 160, 3))
    picture = (scenery(3).astype(int) + grain).clip(0, 255).astype(np.uint8)
    left = number * 2 % 120
    picture[20:50, left : left + 30] = (255 - number * 9 % 100, 40, 90)
    return picture


def planned(path: Path) -> Iterator[DecodedSample | Gap]:
    info, index = probe(os.fspath(path))
    (task,) = plan(info, index, FIRST)
    return read_range(os.fspath(path), info, task, FIRST, size=SIZE, fit=Fit.SQUASH)


def changed_to_other_codec(path: Path) -> None:
    encode(path, frames(30), codec="mpeg4")


def changed_to_other_times(path: Path) -> None:
    encode(path, frames(30), options=x264(), pts=lambda number: number * 7 + 90_000, rate=31)


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no video any more"),
        changed_to_other_codec,
        changed_to_other_times,
    ],
)
def test_a_file_that_vanished_or_changed_is_an_error_of_one_line(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    """Between plan and work a file was removed, emptied or replaced: FootageError, no crash."""
    path = encode(tmp_path / "video.mkv", frames(60), options=x264())
    results = planned(path)
    change(path)
    with pytest.raises(FootageError) as caught:
        list(results)
    assert str(caught.value).isprintable()


def open_files() -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.fspath(descriptor.readlink()))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_closing_gives_the_file_back_at_once(tmp_path: Path) -> None:
    """After `close`, and after the end, neither file nor thread is left."""
    path = encode(tmp_path / "video.mp4", frames(600), options=x264())
    results = planned(path)
    next(iter(results))
    assert os.fspath(path) in open_files()
    results.close()  # type: ignore[attr-defined]
    assert os.fspath(path) not in open_files()
    assert len(list(planned(path))) == 40
    assert os.fspath(path) not in open_files()
    assert not [thread for thread in threading.enumerate() if thread.name == "footage"]


def test_a_range_without_progress_ends_with_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a packet never comes, what came is had and a `stalled` gap stands for the rest."""
    path = encode(tmp_path / "video.mp4", frames(240), options=x264(bframes=0))
    info, index = probe(os.fspath(path))
    (task,) = plan(info, index, FIRST)
    release, packets = threading.Event(), Source.packets

    def hanging(source: Source, **options: bool) -> Iterator[Packet[Stream]]:
        for number, packet in enumerate(packets(source, **options)):
            if number == 150:
                release.wait()
            yield packet

    monkeypatch.setattr(Source, "packets", hanging)
    try:
        results = list(
            read_range(os.fspath(path), info, task, FIRST, size=SIZE, fit=Fit.SQUASH, stall_s=0.5)
        )
    finally:
        release.set()
    *samples, stalled = results
    assert samples
    assert all(isinstance(sample, DecodedSample) for sample in samples)
    assert isinstance(stalled, Gap)
    assert (stalled.kind, stalled.end_us) == (GapKind.STALLED, info.duration_us)
    assert stalled.start_us == samples[-1].end_us <= 5_000_000


def test_a_reader_without_progress_is_left_behind() -> None:
    """A reader that hangs after its first result: that is had, and then Stalled is raised."""
    release = threading.Event()

    def hanging(beat: Callable[[], None]) -> Iterator[int]:
        beat()
        yield 1
        release.wait()

    results = watched(hanging, 0.2)
    try:
        assert next(results) == 1
        with pytest.raises(Stalled):
            next(results)
    finally:
        release.set()


def test_slow_progress_is_no_stall() -> None:
    """A reader that gives no result for long but steps on is waited for."""
    steps = threading.Event()

    def slow(beat: Callable[[], None]) -> Iterator[int]:
        for _ in range(20):
            beat()
            steps.wait(0.05)
        yield 1

    assert list(watched(slow, 0.3)) == [1]


def test_a_range_without_a_sample_is_a_gap(tmp_path: Path) -> None:
    """A planned range that wants nothing still answers for its time."""
    path = encode(tmp_path / "video.mp4", frames(30), options=x264())
    info, _index = probe(os.fspath(path))
    nothing = FrameRange(0, 0, 0, info.duration_us, None, (), ())
    (gap,) = read_range(os.fspath(path), info, nothing, FIRST, size=SIZE, fit=Fit.SQUASH)
    assert isinstance(gap, Gap)
    assert (gap.start_us, gap.end_us) == (0, 1_000_000)
