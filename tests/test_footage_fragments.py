"""Fragmented MP4s whose fragments are missing, damaged, repeated, out of order, or of several
recordings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from footage_files import encode, frames, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
KEYFRAMES = Sampling(SamplingMode.KEYFRAMES, None)
FIVE_A_SECOND = Sampling(SamplingMode.FIRST, Fraction(5))
AT_KEYFRAMES = "frag_keyframe+empty_moov+default_base_moof"
EACH_FRAME = "frag_every_frame+empty_moov+default_base_moof"
OPEN = x264(extra="open-gop=1")
CLOSED = x264()


def fragmented(
    path: Path,
    *,
    options: dict[str, str] = CLOSED,
    movflags: str = AT_KEYFRAMES,
    pts: Callable[[int], int] = lambda number: number,
    first: int = 0,
) -> tuple[bytes, list[bytes]]:
    """Eight seconds of 240 frames: what comes before the fragments, and the fragments."""
    pictures = frames(first + 240)[first:]
    encode(path, pictures, options=options, container_options={"movflags": movflags}, pts=pts)
    data = path.read_bytes()
    data = data[: data.rindex(b"mfra") - 4]
    begins = [at for at in range(len(data)) if data.startswith(b"moof", at + 4)]
    ends = [*begins[1:], len(data)]
    return data[: begins[0]], [data[a:b] for a, b in zip(begins, ends, strict=True)]


def write(path: Path, head: bytes, fragments: Sequence[bytes]) -> Path:
    path.write_bytes(head + b"".join(fragments))
    return path


def read(path: Path, sampling: Sampling) -> list[DecodedSample | Gap]:
    """What the tasks of a video give; they tile it."""
    info, index = probe(os.fspath(path))
    results = [
        result
        for task in plan(info, index, sampling, 1_000_000)
        for result in read_range(os.fspath(path), info, task, sampling, size=64, fit=Fit.SQUASH)
    ]
    edges = [0, *(result.end_us for result in results)]
    assert [result.start_us for result in results] == edges[:-1]
    assert edges[-1] == info.duration_us
    return results


def pictures(results: Sequence[DecodedSample | Gap]) -> dict[int | None, bytes]:
    return {one.pts: one.picture.tobytes() for one in results if isinstance(one, DecodedSample)}


def gaps(results: Sequence[DecodedSample | Gap]) -> list[Gap]:
    return [result for result in results if isinstance(result, Gap)]


def without(fragments: list[bytes], number: int) -> list[bytes]:
    return fragments[:number] + fragments[number + 1 :]


def unknown(fragments: list[bytes], number: int) -> list[bytes]:
    """The type of a fragment's tables is damaged."""
    return [
        one.replace(b"moof", b"maaf") if i == number else one for i, one in enumerate(fragments)
    ]


def damaged(fragments: list[bytes], number: int) -> list[bytes]:
    """A fragment's tables are damaged."""
    hurt = fragments[number][:8] + b"\xff" * 60 + fragments[number][68:]
    return [hurt if i == number else one for i, one in enumerate(fragments)]


@pytest.mark.parametrize("change", [without, unknown, damaged])
def test_the_time_of_a_missing_fragment_is_a_gap(
    change: Callable[[list[bytes], int], list[bytes]], tmp_path: Path
) -> None:
    """All other frames are had, the right ones; and the time of those that are gone is no other
    frame's, however it is sampled."""
    path = tmp_path / "f.mp4"
    head, fragments = fragmented(path)
    true = pictures(read(path, EVERY))
    assert len(true) == 240
    write(path, head, change(fragments, 3))
    info, _index = probe(os.fspath(path))
    assert (info.duration_us, info.indexed_us, info.frame_count) == (8_000_000, 8_000_000, 210)
    assert "30 frames are missing" in info.warnings
    results = read(path, EVERY)
    assert pictures(results) == {
        pts: picture for i, (pts, picture) in enumerate(true.items()) if i // 30 != 3
    }
    for sampling in (EVERY, KEYFRAMES, FIVE_A_SECOND):
        (gap,) = gaps(read(path, sampling))
        assert (gap.start_us, gap.end_us) == (3_000_000, 4_000_000)
        assert gap.kind is GapKind.DAMAGED
        assert "missing from the file" in (gap.detail or "")


@pytest.mark.parametrize(
    ("options", "movflags", "number"), [(OPEN, AT_KEYFRAMES, 3), (CLOSED, EACH_FRAME, 100)]
)
def test_what_refers_to_a_missing_fragment_is_no_sample(
    options: dict[str, str], movflags: str, number: int, tmp_path: Path
) -> None:
    """Neither the pictures before a keyframe that refer to the group before it, nor what follows up
    to the next keyframe."""
    path = tmp_path / "f.mp4"
    head, fragments = fragmented(path, options=options, movflags=movflags)
    true = pictures(read(path, EVERY))
    write(path, head, without(fragments, number))
    for sampling in (EVERY, KEYFRAMES, FIVE_A_SECOND):
        results = read(path, sampling)
        had = pictures(results)
        assert had.items() <= true.items()
        assert gaps(results)
    results = read(path, EVERY)
    assert 240 - 60 < len(pictures(results)) < len(true)
    kinds = {gap.detail for gap in gaps(results)}
    assert kinds == {
        "frames of this time are missing from the file",
        "no frame of this time decodes undamaged",
    }


@pytest.mark.parametrize("others", [0, 1])
def test_a_recorder_that_writes_nothing_while_nothing_moves_lacks_nothing(
    others: int, tmp_path: Path
) -> None:
    """Time passes between two fragments that follow each other by their numbers, also where those
    of another track were taken out."""

    def pts(number: int) -> int:
        return number if number < 120 else number + 150

    path = tmp_path / "f.mp4"
    head, fragments = fragmented(path, pts=pts)
    for number, fragment in enumerate(fragments):
        at = fragment.index(b"mfhd") + 8
        new = (1 + number * (1 + others)).to_bytes(4, "big")
        fragments[number] = fragment[:at] + new + fragment[at + 4 :]
    write(path, head, fragments)
    results = read(path, EVERY)
    assert gaps(results) == []
    assert len(results) == 240
    assert max(result.end_us - result.start_us for result in results) > 5_000_000


@pytest.mark.parametrize("movflags", [AT_KEYFRAMES, EACH_FRAME])
def test_a_fragment_that_is_there_twice_changes_nothing(movflags: str, tmp_path: Path) -> None:
    """A copy is passed over, and what follows does not refer to it."""
    path = tmp_path / "f.mp4"
    head, fragments = fragmented(path, movflags=movflags)
    true = pictures(read(path, EVERY))
    number = len(fragments) // 2 + 1
    write(path, head, fragments[: number + 1] + fragments[number:])
    info, _index = probe(os.fspath(path))
    assert info.sequential_reason == "fragments repeat or are out of order"
    assert any("passed over" in warning for warning in info.warnings)
    results = read(path, EVERY)
    assert gaps(results) == []
    assert pictures(results) == true


def test_a_fragment_out_of_order_is_a_gap(tmp_path: Path) -> None:
    """The frames around it are the right ones, and none of them stands for its time."""
    path = tmp_path / "f.mp4"
    head, fragments = fragmented(path, options=OPEN)
    true = pictures(read(path, EVERY))
    fragments[3], fragments[4] = fragments[4], fragments[3]
    write(path, head, fragments)
    results = read(path, EVERY)
    assert pictures(results).items() < true.items()
    assert len(pictures(results)) >= 240 - 30 - 3
    assert 900_000 <= sum(gap.end_us - gap.start_us for gap in gaps(results)) <= 1_100_000


@pytest.mark.parametrize("parts", [8, 2, 1])
def test_fragmented_recordings_that_are_joined_run_on(parts: int, tmp_path: Path) -> None:
    """FFmpeg hides the beginning of each but the first, or all of it where that is one fragment:
    all of their frames are had, one after the other."""
    joined, alone = b"", []
    for number in range(3):
        path = tmp_path / "part.mp4"
        head, fragments = fragmented(path, first=240 * number)
        write(path, head, fragments[:parts])
        alone += pictures(read(path, EVERY)).values()
        joined = joined or head
        joined += b"".join(fragments[:parts])
    path.write_bytes(joined)
    info, index = probe(os.fspath(path))
    assert (index.jumps, info.frame_count) == (2, 3 * 30 * parts)
    assert info.duration_us == info.indexed_us == 3_000_000 * parts
    assert np.diff(np.sort(index.pts)).min() > 0
    results = read(path, EVERY)
    assert gaps(results) == []
    assert list(pictures(results).values()) == alone


def test_a_piece_of_a_live_stream_lacks_nothing(tmp_path: Path) -> None:
    """A fragmented MP4 that begins late, as what is saved of a live stream does: it lasts from its
    first picture on, and not from the broadcast's beginning."""
    path = tmp_path / "live.mp4"
    head, fragments = fragmented(path)
    write(path, head, fragments[3:])
    info, _index = probe(os.fspath(path))
    assert info.duration_us == info.indexed_us == 5_000_000
    assert info.warnings == ()


def test_bytes_missing_from_a_fragment_cost_no_time_in_silence(tmp_path: Path) -> None:
    """Behind a hole FFmpeg finds no fragment any more: what it does not reach is a gap, up to where
    the last one begins."""
    path = tmp_path / "hole.mp4"
    head, fragments = fragmented(path)
    at = fragments[1].index(b"mdat") + 400
    fragments[1] = fragments[1][:at] + fragments[1][at + 3000 :]
    write(path, head, fragments)
    info, _index = probe(os.fspath(path))
    assert info.indexed_us < 3_000_000
    assert info.duration_us == 7_000_000
    gap = read(path, FIVE_A_SECOND)[-1]
    assert isinstance(gap, Gap)
    assert (gap.kind, gap.end_us) == (GapKind.TRUNCATED, 7_000_000)
