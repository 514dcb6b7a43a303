"""Every container, codec and cut against one rule: tasks in any order give exactly the frames of
one sequential pass by a decoder that skips and seeks nothing."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import pytest
from footage_files import CLIPS, HARD_FILES, MEDIA, VARIANTS, needs_media, needs_variants, variants

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode, VideoInfo
from workers.footage.decode import DecodedSample, read_range
from workers.footage.index import Index
from workers.footage.picture import Renderer
from workers.footage.plan import plan
from workers.footage.probe import Rejected, probe

__all__ = ["variants"]

SIZE = 32
TASK_US = 2_500_000
RATES = (Fraction(1, 5), Fraction(1), Fraction(3))
SAMPLINGS = [
    *(Sampling(SamplingMode.PREFER_KEYFRAME, rate) for rate in RATES),
    *(Sampling(SamplingMode.FIRST, rate) for rate in RATES),
    Sampling(SamplingMode.KEYFRAMES, None),
]
REJECTED = {
    "bad_audio_only.mp4": "no-video-stream",
    "bad_zero_byte.mp4": "empty",
    "bad_no_moov.mp4": "not-a-video",
    "bad_text.mp4": "not-a-video",
    "bad_playlist.mp4": "forbidden-format",
}


@dataclass(frozen=True)
class Plain:
    """One pass that decodes everything: the truth that tasks are compared with."""

    time_base: Fraction
    presented: list[tuple[int, bool]]
    """Timestamp and keyframe mark of every packet that is presented."""
    pictures: list[tuple[int | None, bytes]]
    """Timestamp and picture of every frame, in the decoder's order."""


def plain_pass(path: Path, info: VideoInfo) -> Plain:
    presented, pictures = [], []
    with av.open(str(path)) as container:
        stream = container.streams[info.stream_index]
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        renderer = Renderer(
            SIZE,
            Fit.SQUASH,
            pixel_aspect=Fraction(stream.sample_aspect_ratio or 1),
        )
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and packet.pts is not None:
                presented.append((packet.pts, packet.is_keyframe))
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            pictures += [(frame.pts, renderer.picture(frame).tobytes()) for frame in frames]
        assert stream.time_base is not None
        return Plain(stream.time_base, presented, pictures)


def expected(plain: Plain, sampling: Sampling) -> list[tuple[int, int]]:
    """Bucket and timestamp of every sample, by the definition, in plain fractions."""
    presented = sorted(plain.presented)
    if sampling.mode is SamplingMode.KEYFRAMES:
        return list(enumerate(pts for pts, key in presented if key))
    assert sampling.rate is not None
    buckets: dict[int, list[tuple[int, bool]]] = {}
    for pts, key in presented:
        seconds = (pts - presented[0][0]) * plain.time_base
        buckets.setdefault(int(seconds * sampling.rate), []).append((pts, key))
    if sampling.mode is SamplingMode.FIRST:
        return [(bucket, frames[0][0]) for bucket, frames in buckets.items()]
    return [
        (bucket, next((pts for pts, key in frames if key), frames[0][0]))
        for bucket, frames in buckets.items()
    ]


def read_all(
    path: Path, info: VideoInfo, index: Index, sampling: Sampling, task_us: int = TASK_US
) -> tuple[int, list[DecodedSample | Gap]]:
    """The number of tasks, and what they gave when run in random order, put in order of time.

    Fails unless the tasks tile the video and their results tile the tasks.
    """
    tasks = plan(info, index, sampling, task_us)
    edges = [0, *(task.end_us for task in tasks)]
    assert [task.start_us for task in tasks] == edges[:-1]
    assert edges[-1] == info.duration_us
    assert [task.bucket_start for task in tasks[1:]] == [task.bucket_end for task in tasks[:-1]]
    shuffled = tasks.copy()
    random.Random(7).shuffle(shuffled)
    results: dict[int, list[DecodedSample | Gap]] = {}
    for task in shuffled:
        reached = task.start_us
        for result in read_range(os.fspath(path), info, task, sampling, size=SIZE, fit=Fit.SQUASH):
            assert result.start_us == reached <= result.end_us
            reached = result.end_us
            results.setdefault(task.start_us, []).append(result)
        assert reached == task.end_us
    return len(tasks), [result for start in sorted(results) for result in results[start]]


def assert_conforms(path: Path, task_us: int = TASK_US) -> set[int]:
    """Compare all samplings of a file with a plain pass; the numbers of tasks that were needed."""
    info, index = probe(os.fspath(path))
    plain = plain_pass(path, info)
    pictures = dict(reversed(plain.pictures))
    assert info.frame_count == len(plain.presented)
    counts = set()
    for sampling in SAMPLINGS:
        count, results = read_all(path, info, index, sampling, task_us)
        counts.add(count)
        samples = [result for result in results if isinstance(result, DecodedSample)]
        assert [(s.bucket, s.pts) for s in samples] == expected(plain, sampling), str(sampling)
        assert len(results) == len(samples), "a gap where nothing is damaged"
        first = min(pts for pts, _key in plain.presented)
        for sample in samples:
            assert sample.pts is not None
            assert sample.t_us == int((sample.pts - first) * plain.time_base * 1_000_000)
            same = sample.picture.tobytes() == pictures[sample.pts]
            assert same, f"{sampling}: the picture at {sample.t_us} is another"
    return counts


@pytest.mark.parametrize("name", HARD_FILES)
def test_tasks_in_any_order_give_the_frames_of_one_pass(name: str, tmp_path: Path) -> None:
    """Made files: no sample is missing, added or doubled, and every picture is the same."""
    counts = assert_conforms(HARD_FILES[name](tmp_path / name), task_us=1_200_000)
    sequential = name in (
        "one_keyframe.mp4",
        "intra_refresh.mp4",
        "two_frames.mp4",
        "one_frame.mkv",
    )
    assert (max(counts) == 1) == sequential


@needs_media
@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_conform(name: str) -> None:
    """Real clips: tasks in any order give exactly the frames of one pass, without a gap."""
    assert_conforms(MEDIA / name)


@needs_variants
@pytest.mark.parametrize("name", VARIANTS)
def test_hard_variants_conform(name: str, variants: Path) -> None:
    """Variants of real clips in every container: exactly the frames of one pass."""
    assert_conforms(variants / name)


@needs_variants
@pytest.mark.parametrize("name", ["ts_discontinuity.ts", "ts_size_change.ts"])
def test_joined_recordings_run_on_in_time(name: str, variants: Path) -> None:
    """Where the clock falls back, time runs on: frame n of 30 a second stands at n/30 s."""
    path = variants / name
    info, index = probe(os.fspath(path))
    assert info.sequential_reason is not None
    assert "clock jumps" in info.sequential_reason
    pictures = [picture for _pts, picture in plain_pass(path, info).pictures]
    assert info.frame_count == len(pictures)
    count, results = read_all(path, info, index, Sampling(SamplingMode.FIRST, Fraction(3)))
    assert count == 1
    assert len(results) == -(-len(pictures) // 10)
    for number, sample in enumerate(results):
        assert isinstance(sample, DecodedSample)
        assert sample.t_us == number * 10 * 1_000_000 // 30
        assert sample.picture.tobytes() == pictures[number * 10]


@needs_variants
@pytest.mark.parametrize(("name", "rate"), [("raw_no_pts.h264", 30), ("xvid_b_frames.avi", 30)])
def test_files_without_timestamps_are_counted(name: str, rate: int, variants: Path) -> None:
    """Without timestamps, frame n in order of presentation stands at n over the rate."""
    path = variants / name
    info, index = probe(os.fspath(path))
    assert info.frame_rate == rate
    assert info.sequential_reason is not None
    assert "counted" in info.sequential_reason
    pictures = [picture for _pts, picture in plain_pass(path, info).pictures]
    for sampling in (Sampling(SamplingMode.FIRST, Fraction(2)), Sampling()):
        assert sampling.rate is not None
        step = int(rate / sampling.rate)
        count, results = read_all(path, info, index, sampling)
        assert count == 1
        assert len(results) == -(-len(pictures) // step)
        for number, sample in enumerate(results):
            assert isinstance(sample, DecodedSample)
            assert sample.pts is None
            assert sample.t_us == number * step * 1_000_000 // rate
            assert sample.picture.tobytes() == pictures[number * step]


def whole_frames(path: Path, info: VideoInfo) -> list[int]:
    """Timestamps of the frames of a plain pass that are decoded before any damage in their group of
    pictures: an error, or a frame marked as corrupt."""
    packets: dict[int, tuple[int, int]] = {}
    damaged: dict[int, int] = {}
    decoded = []
    group = 0
    with av.open(str(path)) as container:
        stream = container.streams[info.stream_index]
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        for number, packet in enumerate(container.demux(stream)):
            group += packet.is_keyframe
            if packet.pts is not None:
                packets[packet.pts] = group, number
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                damaged.setdefault(group, number)
                continue
            for frame in frames:
                if frame.pts is not None:
                    decoded.append(frame.pts)
                    of_group, at = packets[frame.pts]
                    if frame.is_corrupt:
                        damaged[of_group] = min(at, damaged.get(of_group, at))
    return [pts for pts in decoded if packets[pts][1] < damaged.get(packets[pts][0], 2**63)]


@needs_variants
@pytest.mark.parametrize("name", ["bad_corrupt_packets.mp4", "bad_garbage_middle.mp4"])
def test_damage_costs_only_the_buckets_without_a_whole_frame(name: str, variants: Path) -> None:
    """A damaged file gives a whole frame as the sample of each bucket that has one, and
    a `damaged` gap for each other."""
    path = variants / name
    info, index = probe(os.fspath(path))
    whole = set(whole_frames(path, info))
    alive = {int((pts - info.first_pts) * info.time_base) for pts in whole}
    assert 15 < len(alive) < 41
    for mode in (SamplingMode.FIRST, SamplingMode.PREFER_KEYFRAME):
        _count, results = read_all(path, info, index, Sampling(mode, Fraction(1)))
        samples = [result for result in results if isinstance(result, DecodedSample)]
        assert {sample.bucket for sample in samples} == alive
        # An error in a picture to which no other refers is not met: it is not decoded.
        assert len({sample.pts for sample in samples} - whole) <= 1
        for result in results:
            if isinstance(result, Gap):
                assert result.kind is GapKind.DAMAGED
                assert result.detail


@needs_variants
@pytest.mark.parametrize("name", ["h264_one_keyframe.mp4", "raw_no_pts.h264", "xvid_b_frames.avi"])
@pytest.mark.parametrize("sampling", [SAMPLINGS[2], Sampling(SamplingMode.EVERY_FRAME, None)])
def test_several_goes_from_the_start_give_what_one_gives(
    name: str, sampling: Sampling, variants: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video that cannot be split but has too many samples for one range: the same samples."""
    path = variants / name
    info, index = probe(os.fspath(path))
    _count, whole = read_all(path, info, index, sampling)
    monkeypatch.setattr("workers.footage.plan.MOST_SAMPLES", -(-len(whole) // 3))
    count, parts = read_all(path, info, index, sampling)
    assert count == 3
    assert [shown(result) for result in parts] == [shown(result) for result in whole]


def shown(result: DecodedSample | Gap) -> tuple[object, ...]:
    assert isinstance(result, DecodedSample)
    interval = result.start_us, result.end_us
    return result.bucket, result.pts, result.t_us, interval, result.picture.tobytes()


@needs_variants
@pytest.mark.parametrize(("name", "kind"), REJECTED.items())
def test_what_is_no_video_is_rejected(name: str, kind: str, variants: Path) -> None:
    """A file without a video is refused with its kind and one line of cause and remedy."""
    with pytest.raises(Rejected) as caught:
        probe(os.fspath(variants / name))
    assert caught.value.kind == kind
    assert "\n" not in str(caught.value)


@needs_variants
def test_truncation_is_told_by_the_header(variants: Path) -> None:
    """A truncated file lasts what its header says, and its tail is a `truncated` gap."""
    info, index = probe(os.fspath(variants / "bad_truncated_faststart.mp4"))
    assert info.duration_us == info.header_us == 40_033_333
    assert info.indexed_us < 20_000_000
    _count, results = read_all(variants / "bad_truncated_faststart.mp4", info, index, Sampling())
    gap = results[-1]
    assert isinstance(gap, Gap)
    assert (gap.kind, gap.start_us, gap.end_us) == (
        GapKind.TRUNCATED,
        info.indexed_us,
        info.duration_us,
    )


@needs_media
def test_the_default_stream_is_chosen() -> None:
    """Of two video streams that are both default the larger is analysed, and the choice is told."""
    info, _index = probe(os.fspath(MEDIA / "nasa_two_streams.mp4"))
    assert (info.stream_index, info.stream_reason) == (3, "largest")
    assert (info.width, info.height) == (480, 270)
