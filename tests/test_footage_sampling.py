"""Which interval of a video each sample answers for, where its stream pauses."""

from __future__ import annotations

import itertools
import os
from fractions import Fraction
from pathlib import Path

import pytest
from footage_files import encode, frames, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

RATE = 10
PAUSE = 65


def with_a_pause(path: Path, frames_lost: int = PAUSE) -> Path:
    """Three seconds of pictures, a pause, three more: 3 s at each end, keyframes every second."""
    codec = {"options": x264(gop=RATE, bframes=0)}
    if path.suffix == ".mpg":
        codec = {"codec": "mpeg2video", "options": {"g": "12"}}  # type: ignore[dict-item]
    rate = 25 if path.suffix == ".mpg" else RATE
    lost = frames_lost * rate // RATE
    return encode(
        path,
        frames(6 * rate),
        rate=rate,
        pts=lambda number: number + lost * (number >= 3 * rate),
        **codec,  # type: ignore[arg-type]
    )


def read(
    path: Path, sampling: Sampling, task_us: int = 60_000_000
) -> tuple[int, list[DecodedSample | Gap]]:
    """How long the video is, and what its ranges give."""
    info, index = probe(os.fspath(path))
    how = {"size": 32, "fit": Fit.SQUASH}
    found = [
        result
        for task in plan(info, index, sampling, task_us)
        for result in read_range(os.fspath(path), info, task, sampling, **how)  # type: ignore[arg-type]
    ]
    for before, after in itertools.pairwise(found):
        assert before.end_us == after.start_us
    assert (found[0].start_us, found[-1].end_us) == (0, info.duration_us)
    return info.duration_us, found


def seconds(results: list[DecodedSample | Gap]) -> list[tuple[float, float]]:
    """The gaps, in seconds, rounded to tenths."""
    gaps = [one for one in results if isinstance(one, Gap)]
    assert {gap.kind for gap in gaps} <= {GapKind.DAMAGED}
    return [(round(gap.start_us / 1e6, 1), round(gap.end_us / 1e6, 1)) for gap in gaps]


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
@pytest.mark.parametrize("task_us", [1_000_000, 60_000_000])
def test_a_stream_without_pictures_is_not_analysed(
    suffix: str, task_us: int, tmp_path: Path
) -> None:
    """Intervals in which a recorder's stream pauses are gaps, however the video is cut: a sample
    answers for its own interval and no longer."""
    path = with_a_pause(tmp_path / f"pause.{suffix}")
    duration_us, found = read(path, Sampling(SamplingMode.FIRST, Fraction(1)), task_us)
    assert 12_400_000 < duration_us < 12_700_000
    assert seconds(found) == [(3.0, 9.0)]
    _, found = read(path, Sampling(rate=Fraction(1, 3)), task_us)
    assert seconds(found) == [(3.0, 9.0)]
    _, found = read(path, Sampling(rate=Fraction(1, 20)), task_us)
    assert seconds(found) == []


def test_with_every_frame_a_pause_begins_after_its_last(tmp_path: Path) -> None:
    """A frame answers for the mean time between two."""
    path = with_a_pause(tmp_path / "pause.ts")
    _, found = read(path, Sampling(SamplingMode.EVERY_FRAME, None))
    assert seconds(found) == [(3.1, 9.5)]


def test_a_pause_of_an_interlaced_stream_is_a_gap(tmp_path: Path) -> None:
    """A frame that may be followed by its second field does not stand for the pause behind it."""
    path = encode(
        tmp_path / "pause.ts",
        frames(100),
        codec="mpeg2video",
        rate=25,
        options={"g": "12", "flags": "+ildct+ilme"},
        pts=lambda number: number + 150 * (number >= 50),
    )
    info, _index = probe(os.fspath(path))
    assert info.interlaced
    _, found = read(path, Sampling(SamplingMode.EVERY_FRAME, None))
    assert seconds(found) == [(2.1, 8.0)]
    assert len(found) == 100 + 1


@pytest.mark.parametrize(("suffix", "lost"), [("ts", 9), ("mp4", PAUSE), ("flv", PAUSE)])
def test_a_picture_that_stands_is_no_pause(suffix: str, lost: int, tmp_path: Path) -> None:
    """A second without a picture, and any time in containers whose pictures stand until the
    next."""
    _, found = read(with_a_pause(tmp_path / f"pause.{suffix}", lost), Sampling())
    assert seconds(found) == []
