"""Near-duplicates: what counts as one, and that skipping does not depend on how a video is cut."""

from __future__ import annotations

import itertools
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from footage_files import Picture, encode, patch, scenery, x264

from storage.records import Fit, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, read_range
from workers.footage.duplicates import Duplicates, is_audited, is_duplicate, thumbnail
from workers.footage.plan import plan
from workers.footage.probe import probe
from workers.footage.sample import DUPLICATE_WINDOW

GREY = patch((100, 100, 100), 224, 224)


def with_square(side: int, level: int) -> Picture:
    """Grey with a square in the upper left block of the thumbnail, which is 56 pixels wide."""
    picture = GREY.copy()
    picture[7 : 7 + side, 7 : 7 + side] = level
    return picture


@pytest.mark.parametrize(
    ("other", "duplicate"),
    [
        (GREY, True),
        (patch((102, 102, 102), 224, 224), True),
        (patch((103, 103, 103), 224, 224), False),  # a fade
        (patch((100, 100, 108), 224, 224), True),  # 2.7 levels on the mean of three colours
        (patch((100, 100, 109), 224, 224), False),
        (with_square(21, 160), True),  # 60 levels in 9 of the block's 64 pixels: 8.4
        (with_square(21, 175), False),  # 75 levels: 10.5, though only 0.7 on the whole
    ],
)
def test_a_duplicate_differs_little_on_the_whole_and_in_every_part(
    other: Picture, duplicate: bool
) -> None:
    """Mean difference below 3 levels, and below 10 in the worst 8 x 8 block of 32 x 32."""
    one, two = thumbnail(GREY), thumbnail(other)
    assert is_duplicate(one, two) == is_duplicate(two, one) == duplicate


def test_thumbnails_are_made_of_any_shape() -> None:
    """A strip of three squares and a picture smaller than a thumbnail give 32 x 32 too."""
    for width, height in ((672, 224), (224, 672), (16, 16), (1, 1)):
        assert thumbnail(patch((1, 2, 3), width, height)).shape == (32, 32, 3)


def test_a_slow_change_is_compared_with_what_was_sent() -> None:
    """Pictures that brighten by one level a sample: each third is sent, since differences are not
    summed up from one skipped picture to the next."""
    duplicates = Duplicates()
    shades = [patch((level, level, level), 32, 32) for level in range(100, 110)]
    sources = [duplicates.source(bucket, shade) for bucket, shade in enumerate(shades)]
    assert sources == [None, 0, 0, None, 3, 3, None, 6, 6, None]


def test_the_comparison_begins_anew_at_fixed_buckets() -> None:
    """Of a still picture one sample is sent for each window of buckets, wherever a range begins."""
    for first in (0, DUPLICATE_WINDOW, 2 * DUPLICATE_WINDOW):
        duplicates = Duplicates()
        for bucket in range(first, 3 * DUPLICATE_WINDOW):
            window = bucket // DUPLICATE_WINDOW * DUPLICATE_WINDOW
            assert duplicates.source(bucket, GREY) == (None if bucket == window else window)


def test_the_audit_takes_its_share_and_always_the_same() -> None:
    """About the asked share, none of 0 and all of 1; of another video other samples."""
    for share in (Fraction(0), Fraction(1, 20), Fraction(1, 2), Fraction(1)):
        grey = [is_audited(bucket, GREY, share) for bucket in range(2_000)]
        assert abs(sum(grey) / len(grey) - share) < 0.03
        assert grey == [is_audited(bucket, GREY, share) for bucket in range(2_000)]
        other = [is_audited(bucket, scenery(1), share) for bucket in range(2_000)]
        assert (grey != other) == (0 < share < 1)


@pytest.fixture(scope="module")
def half_still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 s at 10 frames a second: still for 20 s, moving for 20 s, still again."""
    pictures: list[Picture] = [scenery(0)] * 200
    pictures += [scenery(number * 9) for number in range(200)]
    pictures += [scenery(500)] * 200
    path = tmp_path_factory.mktemp("still") / "half_still.mp4"
    return encode(path, pictures, rate=10, options=x264(gop=20))


@pytest.mark.parametrize(
    "mode", [SamplingMode.PREFER_KEYFRAME, SamplingMode.FIRST, SamplingMode.EVERY_FRAME]
)
def test_what_is_skipped_does_not_depend_on_task_cuts(mode: SamplingMode, half_still: Path) -> None:
    """Tasks of a second, of twenty and of an hour find the same duplicates of the same sources."""
    rate = None if mode is SamplingMode.EVERY_FRAME else Fraction(2)
    sampling = Sampling(mode, rate, skip_duplicates=True)
    info, index = probe(os.fspath(half_still))
    found, counts = [], []
    for task_us in (1_000_000, 20_000_000, 3_600_000_000):
        tasks = plan(info, index, sampling, task_us)
        assert all(
            task.bucket_start // DUPLICATE_WINDOW != before.buckets[-1] // DUPLICATE_WINDOW
            for before, task in itertools.pairwise(tasks)
        )
        counts.append(len(tasks))
        sources: list[tuple[int, int | None]] = []
        for task in tasks:
            duplicates = Duplicates()
            for sample in read_range(
                os.fspath(half_still), info, task, sampling, size=64, fit=Fit.CROP
            ):
                assert isinstance(sample, DecodedSample)
                sources.append((sample.bucket, duplicates.source(sample.bucket, sample.picture)))
        found.append(sources)
    assert counts[0] > counts[1] > counts[2] == 1
    assert found[0] == found[1] == found[2]
    skipped = np.mean([source is not None for _bucket, source in found[0]])
    assert 0.4 < skipped < 0.8


def test_samplings_with_and_without_skipping_are_told_apart() -> None:
    """Their texts differ, so that stored vectors of one never serve for the other."""
    plain = Sampling()
    skipping = Sampling(skip_duplicates=True)
    audited = Sampling(skip_duplicates=True, audit=Fraction(1, 100))
    keyframes = Sampling(SamplingMode.KEYFRAMES, None, skip_duplicates=True)
    texts = [str(one) for one in (plain, skipping, audited, keyframes)]
    assert texts == [
        "prefer-keyframe@1",
        "prefer-keyframe@1+skip-duplicates",
        "prefer-keyframe@1+skip-duplicates:1/100",
        "keyframes+skip-duplicates",
    ]
    assert [Sampling.parse(text) for text in texts] == [plain, skipping, audited, keyframes]
    with pytest.raises(ValueError, match="audit"):
        Sampling(audit=Fraction(1, 100))
    with pytest.raises(ValueError, match="share"):
        Sampling(skip_duplicates=True, audit=Fraction(2))
