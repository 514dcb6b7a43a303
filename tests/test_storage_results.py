"""Results: what a commit accepts, and what is shared between jobs."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from rows import (
    DIMENSION,
    RANGE,
    SEASONS,
    SECOND,
    add_video,
    claimed,
    found,
    frame_range,
    planned,
    sample,
    spec,
    vectors_of,
    work,
)
from sqlalchemy import Engine

from storage import ledger, results
from storage.labels import label_set, label_vectors, store_label_vectors
from storage.ranges import LASTING_GAPS, StoredRange, stored_range
from storage.records import Fit, FrameRange, Gap, GapKind, RangeResult, Sampling, SamplingMode


def stored(engine: Engine, video_id: int, one: FrameRange, **other: object) -> StoredRange | None:
    job = replace(spec(), **other)  # type: ignore[arg-type]
    return stored_range(engine, video_id, job.sampling, job.fit, job.model, one)


def test_what_is_committed_is_read_back(engine: Engine) -> None:
    """Samples and their predictions come back as they were, best first, in order of time."""
    job = planned(engine, 2 * RANGE)
    work(engine)
    got = results.samples(engine, job.job_id, job.video_ids[0])
    assert got == [sample(bucket, 0) for bucket in range(2 * RANGE)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": ()}, "do not tile"),
        ({"samples": (sample(0, 0), sample(1, 0), sample(2, 0))}, "do not tile"),
        ({"gaps": (Gap(0, SECOND, GapKind.DAMAGED),)}, "do not tile"),
        ({"gaps": (Gap(4 * SECOND, 5 * SECOND, GapKind.DAMAGED),)}, "do not tile"),
        ({"gaps": (Gap(4 * SECOND, 4 * SECOND, GapKind.DAMAGED),)}, "do not tile"),
        (
            {"samples": tuple(replace(sample(b, 0), bucket=b + 7) for b in range(RANGE))},
            "ascending buckets",
        ),
        (
            {"samples": tuple(replace(sample(b, 0), bucket=0) for b in range(RANGE))},
            "ascending buckets",
        ),
        ({"vectors": b"1234"}, "bytes of vectors"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(
    engine: Engine, change: dict[str, object], said: str
) -> None:
    """Samples and gaps that leave time out or count it twice are never written, and the task is
    still its worker's to give back."""
    job = planned(engine, RANGE)
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    wrong = replace(found(claim), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        results.commit(engine, claim.task_id, claim.fence, wrong)
    assert results.samples(engine, job.job_id, job.video_ids[0]) == []
    assert ledger.heartbeat(engine, claim.task_id, claim.fence, 60)


def test_a_range_of_gaps_alone_is_a_result(engine: Engine) -> None:
    """A range of which nothing could be analysed is committed with its reason."""
    job = planned(engine, RANGE)
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    gap = Gap(0, RANGE * SECOND, GapKind.STALLED, "no frame\0for 30 s")
    assert results.commit(engine, claim.task_id, claim.fence, RangeResult((), (gap,), None, 0))
    status = ledger.status(engine, job.job_id)
    assert (status.samples, status.gap_us) == (0, RANGE * SECOND)


def test_a_second_job_finds_the_vectors_of_the_first(engine: Engine) -> None:
    """The very range comes back with times and vectors; other settings have none."""
    job = planned(engine, 2 * RANGE)
    work(engine)
    (video,) = job.video_ids
    one = frame_range(RANGE, 2 * RANGE)
    got = stored(engine, video, one)
    assert got is not None
    assert [time.bucket for time in got.samples] == [4, 5, 6, 7]
    assert (got.samples[0].start_us, got.samples[0].end_us) == (4 * SECOND, 5 * SECOND)
    assert got.vectors.dtype == np.float16
    assert got.vectors.tobytes() == vectors_of([4, 5, 6, 7])
    assert got.gaps == ()
    assert stored(engine, video + 1, one) is None
    assert stored(engine, video, one, fit=Fit.PAD) is None
    assert stored(engine, video, one, model="clip/2") is None
    slower = Sampling(SamplingMode.PREFER_KEYFRAME, Fraction(1, 2))
    assert stored(engine, video, one, sampling=slower) is None


@pytest.mark.parametrize(
    "one", [frame_range(0, 10), frame_range(2, 6), frame_range(5, 6), frame_range(8, 10)]
)
def test_ranges_cut_elsewhere_are_put_together(engine: Engine, one: FrameRange) -> None:
    """A range of other edges is made of those that were stored."""
    job = planned(engine, 10)
    work(engine)
    got = stored(engine, job.video_ids[0], one)
    assert got is not None
    assert [time.bucket for time in got.samples] == list(one.buckets)
    assert got.vectors.tobytes() == vectors_of(one.buckets)


def test_overlapping_ranges_give_each_sample_once(engine: Engine) -> None:
    """Jobs that cut differently store overlapping ranges; the next takes each sample once."""
    planned(engine, 10, key="one")
    work(engine)
    other = ledger.open_job(engine, spec("two"))
    video = add_video(engine, other.id, "v0", 10, each=3)
    work(engine)
    got = stored(engine, video, frame_range(1, 9))
    assert got is not None
    assert [time.bucket for time in got.samples] == list(range(1, 9))
    assert got.vectors.tobytes() == vectors_of(range(1, 9))


def test_half_of_a_range_is_not_enough(engine: Engine) -> None:
    """A range of which some was never embedded must be decoded."""
    job = planned(engine, 2 * RANGE)
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    results.commit(engine, claim.task_id, claim.fence, found(claim))
    assert stored(engine, job.video_ids[0], frame_range(0, RANGE)) is not None
    assert stored(engine, job.video_ids[0], frame_range(2, 6)) is None
    assert stored(engine, job.video_ids[0], frame_range(RANGE, 2 * RANGE)) is None


@pytest.mark.parametrize("kind", list(GapKind))
def test_gaps_of_the_content_are_known_and_others_are_tried_again(
    engine: Engine, kind: GapKind
) -> None:
    """Damage is remembered, so that no frame of its range is sent twice; bad luck is not."""
    job = planned(engine, RANGE)
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    gap = Gap(SECOND, 2 * SECOND, kind, "why")
    results.commit(engine, claim.task_id, claim.fence, found(claim, gaps=[gap]))
    got = stored(engine, job.video_ids[0], frame_range(0, RANGE))
    if kind in LASTING_GAPS:
        assert got is not None
        assert got.gaps == (gap,)
        assert [time.bucket for time in got.samples] == [0, 2, 3]
    else:
        assert got is None


def test_stored_ranges_can_be_committed_by_another_job(engine: Engine) -> None:
    """What the vectors give for other labels is a whole result: it tiles the task's interval."""
    first = planned(engine, 2 * RANGE)
    work(engine)
    before = results.samples(engine, first.job_id, first.video_ids[0])
    other = planned(engine, 2 * RANGE, key="other", top_n=1)
    for fed in ledger.feed(engine, 10):
        claim = claimed(engine, fed)
        known = stored_range(
            engine, claim.video_id, claim.sampling, claim.fit, claim.model, claim.frame_range
        )
        assert known is not None
        scored = tuple(sample(time.bucket, 1) for time in known.samples)
        assert results.commit(engine, fed, claim.fence, RangeResult(scored, known.gaps, None, 0))
    assert ledger.status(engine, other.job_id).usage.image_calls == 0
    assert results.samples(engine, other.job_id, other.video_ids[0]) == [
        sample(bucket, 1) for bucket in range(2 * RANGE)
    ]
    assert results.samples(engine, first.job_id, first.video_ids[0]) == before


def test_label_vectors_are_stored_once(engine: Engine) -> None:
    """The first vectors of a label set and model stay, whoever comes later."""
    label_set_id = ledger.open_job(engine, spec()).label_set_id
    assert label_vectors(engine, label_set_id, "clip/1") is None
    first = np.arange(3 * DIMENSION, dtype=np.float32).reshape(3, DIMENSION)
    store_label_vectors(engine, label_set_id, "clip/1", first)
    store_label_vectors(engine, label_set_id, "clip/1", first + 1)
    got = label_vectors(engine, label_set_id, "clip/1")
    assert got is not None
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, first)
    assert label_vectors(engine, label_set_id, "clip/2") is None


def test_label_sets_come_back_whole(engine: Engine) -> None:
    """Prompts, example pictures, thresholds and flags survive, and with them the digest."""
    label_set_id = ledger.open_job(engine, spec()).label_set_id
    got = label_set(engine, label_set_id)
    assert got == SEASONS
    assert got.digest == SEASONS.digest
