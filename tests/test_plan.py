"""The plan: ranges that tile the video, in exact arithmetic, from an index alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from storage.records import FrameRange, Sampling, SamplingMode, VideoInfo
from workers.footage.index import Index
from workers.footage.plan import MOST_SAMPLES, plan
from workers.footage.sample import DUPLICATE_WINDOW, Grid, scaled

MINUTE_US = 60_000_000


def indexed(
    frames: int,
    *,
    gop: int = 60,
    rate: int = 30,
    first: int = 0,
    lacking_us: int = 0,
    reason: str | None = None,
) -> tuple[VideoInfo, Index]:
    """A video of `frames` frames at `rate` a second with a keyframe every `gop`."""
    index = Index(
        pts=np.arange(first, first + frames, dtype=np.int64),
        duration=np.ones(frames, np.int64),
        keyframe=np.arange(frames) % gop == 0,
        lost=np.zeros(frames, np.bool_),
        promised_pts=first + frames,
        first_dts=first,
        time_base=Fraction(1, rate),
        counted=False,
        sequential_reason=reason,
        packets=frames,
        jumps=0,
        moved=False,
        cuts=0,
        marked_damaged=0,
        others_end_us=0,
    )
    length_us = frames * 1_000_000 // rate
    info = VideoInfo(
        container="mov",
        codec="h264",
        pixel_format="yuv420p",
        stream_index=0,
        stream_reason="only",
        width=64,
        height=48,
        rotation=0,
        time_base=index.time_base,
        frame_rate=Fraction(rate),
        frame_count=frames,
        first_pts=first,
        duration_us=length_us + lacking_us,
        indexed_us=length_us,
        header_us=None,
        sequential_reason=reason,
        interlaced=False,
        bit_depth=8,
        transfer="bt709",
    )
    return info, index


def assert_tiles(tasks: list[FrameRange], info: VideoInfo) -> None:
    assert tasks[0].start_us == 0
    assert tasks[0].bucket_start == 0
    assert tasks[-1].end_us == info.duration_us
    for before, after in itertools.pairwise(tasks):
        assert before.end_us == after.start_us
        assert before.bucket_end == after.bucket_start
    for task in tasks:
        assert list(task.buckets) == sorted(set(task.buckets))
        assert all(task.bucket_start <= bucket < task.bucket_end for bucket in task.buckets)
        assert FrameRange.from_json(task.to_json()) == task


@pytest.mark.parametrize("mode", SamplingMode)
@pytest.mark.parametrize("rate", [Fraction(1), Fraction(30_000, 1001), Fraction(1, 300)])
@pytest.mark.parametrize("task_us", [1, 3_000_000, MINUTE_US])
def test_ranges_tile_the_video_whatever_the_sampling(
    mode: SamplingMode, rate: Fraction, task_us: int
) -> None:
    """Ranges meet without a hole or an overlap, and every sample is in exactly one."""
    gridded = mode in (SamplingMode.FIRST, SamplingMode.PREFER_KEYFRAME)
    sampling = Sampling(mode, rate if gridded else None)
    info, index = indexed(9_000, first=77)
    tasks = plan(info, index, sampling, task_us)
    assert_tiles(tasks, info)
    buckets, pts = Grid.of(info, sampling).choose(index.pts, index.keyframe, index.lost)
    assert [bucket for task in tasks for bucket in task.buckets] == buckets.tolist()
    assert [moment for task in tasks for moment in task.pts] == pts.tolist()


def test_ranges_are_cut_at_keyframes() -> None:
    """Every range but the first seeks to a keyframe at or before its first sample."""
    info, index = indexed(18_000, gop=50)
    tasks = plan(info, index, Sampling())
    assert len(tasks) == 10
    assert tasks[0].seek_pts is None
    for task in tasks[1:]:
        assert task.seek_pts is not None
        assert task.seek_pts % 50 == 0
        assert task.seek_pts <= task.pts[0] < task.seek_pts + 50
        assert task.end_us - task.start_us >= MINUTE_US // 2


def test_a_video_that_cannot_be_split_is_one_range() -> None:
    """The sequential reason decides, not the length."""
    info, index = indexed(100_000, reason="fewer than two keyframes")
    tasks = plan(info, index, Sampling())
    assert len(tasks) == 1
    assert_tiles(tasks, info)


@pytest.mark.parametrize("counted", [False, True])
def test_a_long_video_that_cannot_be_split_is_read_in_several_goes(counted: bool) -> None:
    """Ten hours of every frame: no range holds more than MOST_SAMPLES, all read from the start, and
    what each carries stays small."""
    info, index = indexed(1_080_000, gop=2_000_000, reason="fewer than two keyframes")
    index = replace(index, counted=counted)
    tasks = plan(info, index, Sampling(SamplingMode.EVERY_FRAME, None))
    assert len(tasks) == 54
    assert_tiles(tasks, info)
    assert max(len(task.buckets) for task in tasks) <= MOST_SAMPLES
    assert all(task.seek_pts is None for task in tasks)
    assert all(len(task.pts) == (0 if counted else len(task.buckets)) for task in tasks)
    assert max(len(task.to_json()) for task in tasks) < 100_000
    assert len(plan(info, index, Sampling(SamplingMode.FIRST, Fraction(1, 2)))) == 1


@pytest.mark.parametrize("mode", SamplingMode)
@pytest.mark.parametrize("reason", [None, "fewer than two keyframes"])
@pytest.mark.parametrize("task_us", [1, 7_000_000, MINUTE_US])
def test_ranges_that_skip_duplicates_begin_at_windows(
    mode: SamplingMode, reason: str | None, task_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each range begins with the first sample of a window, so that the comparison with the frame
    sent last never reaches from one range into the next."""
    monkeypatch.setattr("workers.footage.plan.MOST_SAMPLES", 100)
    gridded = mode in (SamplingMode.FIRST, SamplingMode.PREFER_KEYFRAME)
    sampling = Sampling(mode, Fraction(2) if gridded else None, skip_duplicates=True)
    info, index = indexed(9_000, reason=reason)
    tasks = plan(info, index, sampling, task_us)
    assert_tiles(tasks, info)
    for before, task in itertools.pairwise(tasks):
        assert before.buckets[-1] // DUPLICATE_WINDOW < task.bucket_start // DUPLICATE_WINDOW
        if reason is None:
            assert task.seek_pts is not None
            assert task.seek_pts <= task.pts[0]


def test_a_truncated_tail_belongs_to_the_last_range() -> None:
    """The last range answers for what the header promises and the file lacks."""
    info, index = indexed(6_000, lacking_us=500_000_000)
    tasks = plan(info, index, Sampling())
    assert_tiles(tasks, info)
    assert tasks[-1].end_us == info.indexed_us + 500_000_000


def test_keyframes_are_preferred_within_their_bucket() -> None:
    """Keyframes at 0, 2.5, 5 s: buckets 0, 2 and 5 give them, the others their first frame."""
    info, index = indexed(180, gop=75)
    (task,) = plan(info, index, Sampling())
    assert task.pts == (0, 30, 75, 90, 120, 150)
    (task,) = plan(info, index, Sampling(SamplingMode.FIRST, Fraction(1)))
    assert task.pts == (0, 30, 60, 90, 120, 150)
    (task,) = plan(info, index, Sampling(SamplingMode.KEYFRAMES, None))
    assert (task.buckets, task.pts) == ((0, 1, 2), (0, 75, 150))


def test_frames_decoded_before_their_keyframe_forbid_the_cut() -> None:
    """A keyframe that is shown before a frame decoded earlier is no place to cut at."""
    info, index = indexed(300, gop=30)
    index.pts[59], index.pts[60] = 60, 59
    keys = index.cut_points().tolist()
    assert 59 not in keys
    assert 30 in keys
    assert_tiles(plan(info, index, Sampling(), 1_000_000), info)


def test_ten_hours_are_planned_in_little_time_and_memory() -> None:
    """Two million frames: the index stays below 60 MB and each task's plan is short."""
    info, index = indexed(2_160_000, rate=60, gop=120)
    arrays = (index.pts, index.duration, index.keyframe, index.lost)
    assert sum(array.nbytes for array in arrays) < 60_000_000
    tasks = plan(info, index, Sampling())
    assert len(tasks) == 600
    assert_tiles(tasks, info)
    assert max(len(task.to_json()) for task in tasks) < 2_000


def test_buckets_are_exact_at_any_time_base() -> None:
    """Nanosecond clocks and odd rates give the floor of the exact fraction, beyond 64 bits too."""
    values = np.array([0, 1, 999_999_999, 10**15 + 1, 3 * 10**17], np.int64)
    for factor in (Fraction(30_000, 1001 * 10**9), Fraction(10**9 + 7, 10**9 + 9)):
        exact = [int(v) * factor.numerator // factor.denominator for v in values]
        assert scaled(values, factor).tolist() == exact


@pytest.mark.parametrize(
    "rate", ["0.3333333333333333", "0.0333333333333333", "23.976023976023978", "0." + "3" * 27]
)
def test_a_rate_may_be_a_long_decimal(rate: str) -> None:
    """Fractions whose terms exceed 64 bits give the plan of what they stand for."""
    info, index = indexed(2_700, rate=15_360, gop=1)
    (task,) = plan(info, index, Sampling(rate=Fraction(rate)), 10**9)
    exact = {int(Fraction(pts, 15_360) * Fraction(rate)) for pts in index.pts.tolist()}
    assert task.buckets == tuple(sorted(exact))


def test_a_task_lasts_some_time() -> None:
    """A task of no length is refused."""
    info, index = indexed(30)
    with pytest.raises(ValueError, match="microseconds"):
        plan(info, index, Sampling(), 0)


def test_planning_loads_no_decoder() -> None:
    """A scheduler that plans needs neither PyAV nor OpenCV."""
    heavy = "{'av', 'cv2', 'PIL'} & set(sys.modules)"
    code = f"import sys, workers.footage.plan; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
