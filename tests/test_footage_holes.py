"""Matroska, FLV and transport streams of which a part was overwritten or is missing: no frame
stands for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from footage_files import encode, frames, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)
FIVE_A_SECOND = Sampling(SamplingMode.FIRST, Fraction(5))
FINE = x264(gop=15, bframes=0) | {"crf": "4"}


def read(path: Path, sampling: Sampling) -> list[DecodedSample | Gap]:
    info, index = probe(os.fspath(path))
    return [
        result
        for task in plan(info, index, sampling, 2_000_000)
        for result in read_range(os.fspath(path), info, task, sampling, size=64, fit=Fit.SQUASH)
    ]


def pictures(results: list[DecodedSample | Gap]) -> dict[int | None, bytes]:
    return {one.pts: one.picture.tobytes() for one in results if isinstance(one, DecodedSample)}


def zeroed(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + bytes(end - begin) + data[end:]


def overwritten(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + np.random.default_rng(3).bytes(end - begin) + data[end:]


@pytest.mark.parametrize("kind", ["mkv", "flv"])
@pytest.mark.parametrize("change", [zeroed, overwritten])
def test_no_frame_stands_for_what_is_gone(
    change: Callable[[bytes, int, int], bytes], kind: str, tmp_path: Path
) -> None:
    """More than a second in the middle is gone, up to a keyframe: what is given are true pictures,
    and none of them answers for frames that are not there."""
    path = encode(tmp_path / f"film.{kind}", frames(240), options=FINE)
    true = pictures(read(path, EVERY))
    assert len(true) == 240
    data = path.read_bytes()
    with av.open(os.fspath(path)) as container:
        at = [packet.pos or 0 for packet in container.demux(video=0) if packet.size]
    path.write_bytes(change(data, at[70] + 2, at[105] - 30))
    info, index = probe(os.fspath(path))
    assert info.duration_us == 8_000_000
    there = set(index.pts[~index.lost].tolist())
    assert 190 < len(there) < 208
    assert any("frames are missing" in warning for warning in info.warnings)
    tick_us = 1_000_000 * info.time_base
    gone = [int((pts - info.first_pts) * tick_us) for pts in true if pts not in there]
    results = read(path, EVERY)
    assert pictures(results).items() <= true.items()
    gaps = [result for result in results if isinstance(result, Gap)]
    assert {gap.kind for gap in gaps} == {GapKind.DAMAGED}
    assert all(any(gap.start_us <= at < gap.end_us for gap in gaps) for at in gone)
    results = read(path, FIVE_A_SECOND)
    assert pictures(results).items() <= true.items()
    (gap,) = [result for result in results if isinstance(result, Gap)]
    assert gap.end_us - gap.start_us >= 1_000_000


@pytest.mark.parametrize("kind", ["mkv", "flv"])
def test_a_pause_is_no_hole(kind: str, tmp_path: Path) -> None:
    """A recorder that writes nothing while nothing moves lacks nothing: its frames stand."""
    path = encode(
        tmp_path / f"screen.{kind}",
        frames(120),
        options=FINE,
        pts=lambda number: number if number < 50 else number + 120,
    )
    info, _index = probe(os.fspath(path))
    assert not any("missing" in warning for warning in info.warnings)
    results = read(path, EVERY)
    assert len(results) == len(pictures(results)) == 120
    assert max(result.end_us - result.start_us for result in results) >= 4_000_000


@pytest.mark.parametrize("begin", [200, 500, 900])
@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_what_is_lost_on_reception_is_a_gap(codec: str, begin: int, tmp_path: Path) -> None:
    """100 packets of a transport stream were not received: what is given are true pictures, and
    none of them answers for frames that did not come."""
    options = x264() | {"crf": "8"} if codec == "libx264" else {"g": "12", "bf": "2", "b": "3M"}
    path = encode(tmp_path / "film.ts", frames(240), codec=codec, options=options)
    info, _index = probe(os.fspath(path))
    true = pictures(read(path, EVERY))
    assert len(true) == 240
    data = path.read_bytes()
    path.write_bytes(data[: begin * 188] + data[(begin + 100) * 188 :])
    _info, index = probe(os.fspath(path))
    there = set(index.pts[~index.lost].tolist())
    assert 5 < 240 - len(there) < 80
    tick_us = 1_000_000 * info.time_base
    gone = [int((pts - info.first_pts) * tick_us) for pts in true if pts not in there]
    results = read(path, EVERY)
    assert pictures(results).items() < true.items()
    assert len(pictures(results)) >= len(there) - 40
    gaps = [result for result in results if isinstance(result, Gap)]
    assert all(any(gap.start_us <= at < gap.end_us for gap in gaps) for at in gone)
