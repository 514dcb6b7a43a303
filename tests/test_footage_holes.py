"""Matroska and FLV of which a part was overwritten or is missing: no frame stands for it."""

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


def shortened(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + data[end:]


@pytest.mark.parametrize("kind", ["mkv", "flv"])
@pytest.mark.parametrize("change", [zeroed, overwritten, shortened])
def test_no_frame_stands_for_what_is_gone(
    change: Callable[[bytes, int, int], bytes], kind: str, tmp_path: Path
) -> None:
    """A second and more in the middle is gone: what is given are true pictures, and none of them,
    but for a frame's time at either end, answers for frames that are not there."""
    path = encode(tmp_path / f"film.{kind}", frames(240), options=FINE)
    true = pictures(read(path, EVERY))
    assert len(true) == 240
    data = path.read_bytes()
    with av.open(os.fspath(path)) as container:
        at = [packet.pos or 0 for packet in container.demux(video=0) if packet.size]
    path.write_bytes(change(data, at[70] + 2, at[110] + 300))
    info, index = probe(os.fspath(path))
    assert info.duration_us == 8_000_000
    there = set(index.pts[~index.lost].tolist())
    assert 120 < len(there) < 205
    assert any("frames are missing" in warning for warning in info.warnings)
    tick_us, frame_us = 1_000_000 * info.time_base, 33_400
    gone = sorted(int((pts - info.first_pts) * tick_us) for pts in true if pts not in there)
    for sampling in (EVERY, FIVE_A_SECOND):
        results = read(path, sampling)
        assert pictures(results).items() <= true.items()
        (gap, *others) = [result for result in results if isinstance(result, Gap)]
        assert {one.kind for one in (gap, *others)} == {GapKind.DAMAGED}
        width_us = frame_us if sampling is EVERY else 200_000
        end_us = max(one.end_us for one in (gap, *others))
        assert gap.start_us <= gone[0] + width_us
        assert end_us >= gone[-1] - width_us
        assert sum(one.end_us - one.start_us for one in (gap, *others)) >= end_us - gap.start_us


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
