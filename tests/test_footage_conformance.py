"""Every container, codec and cut against one rule: tasks in any order give exactly the frames of
one sequential pass by a decoder that skips and seeks nothing. Every file is read in three rates by
three modes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from footage_files import (
    CLIPS,
    HARD_FILES,
    MEDIA,
    VARIANTS,
    delayed_later,
    encode,
    frames,
    needs_media,
    needs_variants,
    variants,
    x264,
)
from footage_reference import (
    ONE_TASK_US,
    SAMPLINGS,
    TASK_US,
    Reference,
    Sample,
    digest,
    numbered,
    one_pass,
    read_all,
    timed,
    whole_frames,
)

from storage.records import Gap, GapKind, Sampling, SamplingMode, VideoInfo
from workers.footage.index import Index
from workers.footage.probe import Rejected, probe

__all__ = ["variants"]

JOINED = ["ts_discontinuity.ts", "ts_size_change.ts"]
COUNTED = ["raw_no_pts.h264", "xvid_b_frames.avi"]
RATE = 30
"""Frames a second of these four."""
DAMAGED = {
    "bad_corrupt_packets.mp4": Fraction(1, 5),
    "bad_garbage_middle.mp4": Fraction(0),
    "bad_truncated_faststart.mp4": Fraction(0),
}
"""What share of the samples may show another picture than the undamaged file: where a packet is
missing altogether, no decoder tells."""
REJECTED = {
    "bad_audio_only.mp4": ("no-video-stream", "no video stream"),
    "bad_zero_byte.mp4": ("empty", "empty (0 bytes)"),
    "bad_no_moov.mp4": ("not-a-video", "incomplete (a missing header)"),
    "bad_text.mp4": ("not-a-video", "not a video"),
    "bad_playlist.mp4": ("forbidden-format", "a playlist, which names other files"),
}


def assert_conforms(
    path: Path, info: VideoInfo, index: Index, truth: Reference, task_us: int = TASK_US
) -> int:
    """Compare all samplings of a file with the truth; the most tasks that one of them had."""
    assert info.frame_count == len(truth.presented)
    most = 0
    for sampling in SAMPLINGS:
        count, results = read_all(path, info, index, sampling, task_us)
        most = max(most, count)
        # Where frames are counted, which of them is a keyframe is known after decoding only.
        first = index.counted and sampling.mode is SamplingMode.PREFER_KEYFRAME
        wanted = truth.samples(replace(sampling, mode=SamplingMode.FIRST) if first else sampling)
        samples = [result for result in results if isinstance(result, Sample)]
        assert [one[:3] for one in samples] == [one[:3] for one in wanted], str(sampling)
        assert len(results) == len(samples), f"{sampling}: a gap where nothing is damaged"
        for found, true in zip(samples, wanted, strict=True):
            assert found == true, f"{sampling}: the picture at {found.t_us} is another"
    return most


@pytest.mark.parametrize("name", HARD_FILES)
def test_tasks_in_any_order_give_the_frames_of_one_pass(name: str, tmp_path: Path) -> None:
    """Made files: no sample is missing, added or doubled, and every picture is the same."""
    path = HARD_FILES[name](tmp_path / name)
    info, index = probe(os.fspath(path))
    most = assert_conforms(path, info, index, timed(path, info), task_us=1_200_000)
    sequential = name in (
        "one_keyframe.mp4",
        "intra_refresh.mp4",
        "changed_headers.flv",
        "changed_headers.mp4",
        "changed_palette.avi",
        "several_edits.mp4",
        "overlapping_edits.mp4",
        "two_frames.mp4",
        "one_frame.mkv",
    )
    assert (most == 1) == sequential


@pytest.mark.parametrize("name", ["changed_headers.flv", "changed_headers.mp4"])
def test_a_long_task_knows_headers_that_change_on_the_way(name: str, tmp_path: Path) -> None:
    """The packet that tells the decoder its new headers is not wanted itself, and yet is fed."""
    path = HARD_FILES[name](tmp_path / name)
    info, index = probe(os.fspath(path))
    assert_conforms(path, info, index, timed(path, info), task_us=ONE_TASK_US)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
def test_theora_of_a_camera_that_stands_still_conforms(tmp_path: Path) -> None:
    """Theora repeats a picture by a packet of no bytes, which is no damage."""
    path = tmp_path / "still.ogv"
    moving, still = "testsrc2=s=160x96:r=10:d=2", "color=red:s=160x96:r=10:d=0.7"
    graph = f"{moving}[a];{still}[b];{moving}[c];[a][b][c]concat=n=3"
    theora = ["-c:v", "libtheora", "-q:v", "5", "-g", "64"]
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", graph, *theora, os.fspath(path)]
    subprocess.run(command, check=True)
    info, index = probe(os.fspath(path))
    assert info.duration_us == info.header_us
    assert info.frame_count < index.packets, "the trap must be there"
    assert_conforms(path, info, index, timed(path, info))


@needs_media
@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_conform(name: str) -> None:
    """Real clips: tasks in any order give exactly the frames of one pass, without a gap."""
    info, index = probe(os.fspath(MEDIA / name))
    assert_conforms(MEDIA / name, info, index, timed(MEDIA / name, info))


@needs_variants
@pytest.mark.parametrize("name", VARIANTS)
def test_hard_variants_conform(name: str, variants: Path) -> None:
    """Variants of real clips in every container: exactly the frames of one pass, and what is read
    in one piece says why."""
    path = variants / name
    info, index = probe(os.fspath(path))
    most = assert_conforms(path, info, index, timed(path, info))
    assert (most == 1) == (info.sequential_reason is not None)


@needs_variants
@pytest.mark.parametrize(
    ("name", "reason"),
    [*((name, "clock jumps") for name in JOINED), *((name, "counted") for name in COUNTED)],
)
def test_frames_without_times_to_trust_run_on(name: str, reason: str, variants: Path) -> None:
    """Where the clock falls back or there is none, frame n of 30 a second stands at n/30 s."""
    path = variants / name
    info, index = probe(os.fspath(path))
    assert info.sequential_reason is not None
    assert reason in info.sequential_reason
    assert info.frame_rate == RATE
    assert assert_conforms(path, info, index, numbered(path, info, RATE)) == 1


def slot(number: int) -> int:
    """When frames are recorded of which six in seven are dropped for seven seconds."""
    return number + 6 * min(max(number - 60, 0), 30)


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_dropped_from_an_avi_leave_their_time(
    codec: str, bframes: int, tmp_path: Path
) -> None:
    """AVI of codecs without timestamps in which a recorder has dropped frames: every frame stands
    where it was recorded, and nothing is lacking at the end."""
    options = x264(bframes=bframes) if codec == "libx264" else {"g": "30", "bf": str(bframes)}
    path = encode(tmp_path / "dropped.avi", frames(150), codec=codec, options=options, pts=slot)
    info, index = probe(os.fspath(path))
    assert info.duration_us == info.indexed_us == (slot(149) + 1) * 1_000_000 // RATE
    assert assert_conforms(path, info, index, numbered(path, info, RATE, slot)) == 1


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_an_avi_with_every_second_slot_is_steady_to_its_end(codec: str, tmp_path: Path) -> None:
    """Frames that no packet brings out follow in the step of those before them, and the last one
    lasts as long: nothing of the duration is lacking, and nobody is warned."""
    options = x264(bframes=2) if codec == "libx264" else {"g": "30", "bf": "2"}
    path = encode(
        tmp_path / "halved.avi", frames(150), codec=codec, options=options, pts=lambda n: 2 * n
    )
    info, index = probe(os.fspath(path))
    assert info.duration_us == info.indexed_us == 300 * 1_000_000 // RATE
    assert info.frame_rate == RATE / 2
    assert assert_conforms(path, info, index, numbered(path, info, RATE, lambda n: 2 * n)) == 1


def test_a_decoder_that_begins_to_delay_moves_no_frame(tmp_path: Path) -> None:
    """An AVI whose later pictures are reordered over more frames than its first ones: all stand at
    their slots, and the last of them are samples too."""
    path = delayed_later(tmp_path / "later.avi")
    info, index = probe(os.fspath(path))
    assert info.frame_count == 120
    assert assert_conforms(path, info, index, numbered(path, info, RATE)) == 1


def joined(results: list[Sample | Gap]) -> list[Sample | tuple[GapKind, int, int]]:
    """The results with gaps that touch made one: tasks end where they may."""
    found: list[Sample | tuple[GapKind, int, int]] = []
    gaps = itertools.groupby(results, lambda one: one.kind if isinstance(one, Gap) else None)
    for kind, group in gaps:
        if kind is None:
            found += [one for one in group if isinstance(one, Sample)]
        else:
            touching = [one for one in group if isinstance(one, Gap)]
            found.append((kind, touching[0].start_us, touching[-1].end_us))
    return found


@pytest.fixture(scope="module")
def undamaged(variants: Path) -> list[bytes]:
    """The picture of every frame of the file that the damaged ones were made of."""
    path = variants / "h264_gop2s.mp4"
    info, _index = probe(os.fspath(path))
    return [digest(renderer.picture(frame)) for frame, renderer in one_pass(path, info)]


@needs_variants
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_costs_only_the_buckets_without_a_whole_frame(
    name: str, variants: Path, undamaged: list[bytes]
) -> None:
    """A damaged file gives in tasks in any order what it gives in one piece: a sample for each
    bucket that has a whole frame, with the picture that the undamaged file has there, and gaps with
    their reasons for the rest."""
    path = variants / name
    info, index = probe(os.fspath(path))
    begin = info.first_pts * info.time_base
    whole = [pts * info.time_base - begin for pts in whole_frames(path, info)]
    for sampling in SAMPLINGS:
        count, results = read_all(path, info, index, sampling)
        alone, in_one_piece = read_all(path, info, index, sampling, ONE_TASK_US)
        assert alone == 1 < count
        assert joined(results) == joined(in_one_piece)
        samples = [result for result in results if isinstance(result, Sample)]
        buckets = [sample.bucket for sample in samples]
        assert buckets == sorted(set(buckets))
        if sampling.rate is not None:
            assert {int(seconds * sampling.rate) for seconds in whole} <= set(buckets)
        numbers = [round((begin + Fraction(one.t_us, 1_000_000)) * RATE) for one in samples]
        others = [n for n, one in zip(numbers, samples, strict=True) if undamaged[n] != one.picture]
        assert len(others) <= DAMAGED[name] * len(samples), f"{sampling}: {others}"
        assert all(result.detail for result in results if isinstance(result, Gap))


@needs_variants
def test_truncation_is_told_by_the_header(variants: Path) -> None:
    """A truncated file lasts what its header says, and its tail is a `truncated` gap."""
    path = variants / "bad_truncated_faststart.mp4"
    info, index = probe(os.fspath(path))
    assert info.duration_us == info.header_us == 40_033_333
    assert info.indexed_us < 20_000_000
    for sampling in SAMPLINGS:
        _count, results = read_all(path, info, index, sampling)
        tail = joined(results)[-1]
        assert tail == (GapKind.TRUNCATED, info.indexed_us, info.duration_us)


@needs_variants
@pytest.mark.parametrize("name", ["h264_one_keyframe.mp4", *COUNTED])
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
    assert parts == whole


@needs_variants
@pytest.mark.parametrize("name", REJECTED)
def test_what_is_no_video_is_rejected(name: str, variants: Path) -> None:
    """A file without a video is refused with its kind and one line of cause and remedy."""
    kind, reason = REJECTED[name]
    with pytest.raises(Rejected) as caught:
        probe(os.fspath(variants / name))
    assert caught.value.kind == kind
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


@needs_variants
def test_no_variant_is_left_out(variants: Path) -> None:
    """Each file that is made stands in one of the tables above, and each of those is made."""
    tables = [*VARIANTS, *JOINED, *COUNTED, *DAMAGED, *REJECTED]
    assert sorted(tables) == sorted(path.name for path in variants.iterdir())


@needs_media
def test_the_default_stream_is_chosen() -> None:
    """Of two video streams that are both default the larger is analysed, and the choice is told."""
    info, _index = probe(os.fspath(MEDIA / "nasa_two_streams.mp4"))
    assert (info.stream_index, info.stream_reason) == (3, "largest")
    assert (info.width, info.height) == (480, 270)
