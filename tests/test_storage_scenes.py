"""Scenes: runs of one label after smoothing, which claim all that was seen and nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from rows import RANGE, SECOND, planned, sample, work
from sqlalchemy import Engine

from storage import ledger
from storage.records import Gap, GapKind, Prediction, SampleResult
from storage.scenes import _most_likely_paths, scenes, scenes_of

NAMES = ("summer", "winter", "fire")


def run(text: str, confidence: float = 0.95) -> list[SampleResult]:
    """One sample a second for each letter: s, w, f; a blank leaves a second out."""
    return [
        sample(at, "swf".index(letter), confidence)
        for at, letter in enumerate(text)
        if letter != " "
    ]


def shown(text: str, confidence: float = 0.95) -> list[tuple[str, int, int]]:
    """Label, start and end in seconds of each scene of the run."""
    return [
        (scene.label, scene.start_us // SECOND, scene.end_us // SECOND)
        for scene in scenes_of(run(text, confidence), [], NAMES)
    ]


def test_nothing_has_no_scenes() -> None:
    """No sample, no scene."""
    assert scenes_of([], [Gap(0, SECOND, GapKind.DAMAGED)], NAMES) == []


def test_a_change_that_lasts_is_a_scene() -> None:
    """Long runs become scenes with their true edges."""
    assert shown("ssssswwwwwsssss") == [("summer", 0, 5), ("winter", 5, 10), ("summer", 10, 15)]


@pytest.mark.parametrize("text", ["sssswssss", "wssssssss", "ssssssssw"])
def test_a_flicker_is_no_scene(text: str) -> None:
    """One sample of another label cuts nothing, wherever it stands."""
    assert shown(text) == [("summer", 0, 9)]


def between_two(*winter: float) -> list[SampleResult]:
    """Samples of which each gives this confidence to winter and the rest to summer."""
    return [
        replace(
            sample(at, 0),
            predictions=tuple(
                sorted(
                    (Prediction(1, 0.3, share), Prediction(0, 0.3, 1 - share)),
                    key=lambda one: -one.confidence,
                )
            ),
        )
        for at, share in enumerate(winter)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sssswfffff", [("summer", 0, 4), ("fire", 4, 10)]),
        ("sssssswwffffff", [("summer", 0, 6), ("winter", 6, 8), ("fire", 8, 14)]),
    ],
)
def test_a_scene_between_two_others_lasts_two_seconds(
    text: str, expected: list[tuple[str, int, int]]
) -> None:
    """A second of a third label joins a neighbour, however freely labels may change; two seconds
    are a scene."""
    found = scenes_of(run(text), [], NAMES, stickiness_us=0)
    assert [(one.label, one.start_us // SECOND, one.end_us // SECOND) for one in found] == expected


@pytest.mark.parametrize(
    ("sureness", "lasting", "count"),
    [(0.95, 1, 1), (0.95, 2, 1), (0.95, 3, 3), (0.6, 3, 1), (0.6, 14, 1), (0.6, 15, 3)],
)
def test_doubt_needs_more_samples_than_certainty(sureness: float, lasting: int, count: int) -> None:
    """Weak contrary evidence has to last longer before it counts as a scene."""
    around = [1 - sureness] * 12
    samples = between_two(*around, *[sureness] * lasting, *around)
    assert len(scenes_of(samples, [], NAMES)) == count


def test_an_outlier_does_not_outvote_a_scene() -> None:
    """One sample that is sure of something else does not turn a scene of mild agreement."""
    (scene,) = scenes_of(between_two(0.3, 0.3, 1.0, 0.3, 0.3), [], NAMES)
    assert (scene.label, scene.agreeing) == ("summer", 0.8)


def test_no_scene_reaches_over_a_gap() -> None:
    """The same label before and after what was not seen makes two scenes."""
    assert shown("ssss  ssss") == [("summer", 0, 4), ("summer", 6, 10)]


def test_a_lone_sample_between_gaps_is_its_own_scene() -> None:
    """What was seen is told, however short it is."""
    assert shown("sss w sss") == [("summer", 0, 3), ("winter", 4, 5), ("summer", 6, 9)]


def test_a_scene_ends_with_its_last_samples_interval() -> None:
    """Slow sampling: the end is where the last sample's interval ends, not at its frame."""
    slow = [
        replace(sample(at, label), t_us=at * 5 * SECOND + 7, start_us=at * 5 * SECOND,
                end_us=(at + 1) * 5 * SECOND)
        for at, label in enumerate([0, 0, 1, 1])
    ]  # fmt: skip
    assert [(one.start_us, one.end_us) for one in scenes_of(slow, [], NAMES)] == [
        (0, 10 * SECOND),
        (10 * SECOND, 20 * SECOND),
    ]


def test_dense_samples_share_their_vote() -> None:
    """Every frame at 25 a second gives the scenes that one sample a second gives."""
    step = SECOND // 25
    dense = [
        replace(sample(at, label, 0.95), t_us=at * step, start_us=at * step, end_us=(at + 1) * step)
        for at, label in enumerate([0] * 125 + [1] * 20 + [0] * 125 + [2] * 100)
    ]
    assert [one.label for one in scenes_of(dense, [], NAMES)] == ["summer", "fire"]


def test_numbers_of_a_scene() -> None:
    """Mean and peak confidence, samples, and the share that agrees."""
    mixed = [sample(0, 0, 0.8), sample(1, 0, 0.6), sample(2, 1, 0.7), sample(3, 0, 0.9)]
    (scene,) = scenes_of(mixed, [], NAMES)
    # Of the third sample only 0.7 and 0.3 for two other labels is known: nothing is left for it.
    assert scene.confidence == pytest.approx((0.8 + 0.6 + 0.0 + 0.9) / 4)
    assert (scene.peak, scene.samples, scene.agreeing) == (pytest.approx(0.9), 4, 0.75)


def test_what_the_best_labels_leave_over_is_shared() -> None:
    """A label that is not among the best has an equal part of the rest."""
    top_one = [
        SampleResult(
            at, at * SECOND, at * SECOND, (at + 1) * SECOND, (Prediction(label, 0.3, 0.6),)
        )
        for at, label in enumerate([0, 0, 0, 1, 0, 0, 0])
    ]
    (scene,) = scenes_of(top_one, [], NAMES)
    assert scene.confidence == pytest.approx((6 * 0.6 + 0.2) / 7)


def test_one_label_is_one_scene() -> None:
    """A label set of one label has nothing to change to."""
    only = [replace(sample(at, 0), predictions=(Prediction(0, 0.3, 1.0),)) for at in range(3)]
    (scene,) = scenes_of(only, [], ["all"])
    assert (scene.confidence, scene.agreeing) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_the_best_of_all_paths(seed: int) -> None:
    """Viterbi's path has the most evidence less switches of all paths, counted one by one."""
    evidence = np.log(np.random.default_rng(seed).dirichlet([0.5] * 3, size=6))

    def worth(path: tuple[int, ...]) -> float:
        switches = sum(a != b for a, b in itertools.pairwise(path))
        return float(sum(evidence[at, label] for at, label in enumerate(path)) - 2 * switches)

    best = max(itertools.product(range(3), repeat=6), key=worth)
    (found,) = _most_likely_paths([evidence], 2.0)
    assert worth(tuple(found)) == pytest.approx(worth(best))


def test_a_path_does_not_depend_on_those_beside_it() -> None:
    """Many stretches of any lengths together get the paths that each gets alone."""
    random = np.random.default_rng(5)
    lengths = [1, 300, 7, 2, 299, 40, 1, 0, 3000, 12]
    evidence = [np.log(0.1 + random.dirichlet(np.full(5, 0.2), size)) for size in lengths]
    together = _most_likely_paths(evidence, 2.4)
    for path, one in zip(together, evidence, strict=True):
        (alone,) = _most_likely_paths([one], 2.4)
        assert len(path) == len(one)
        assert path.tolist() == alone.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_scenes_claim_each_sample_once(seed: int) -> None:
    """Whatever the samples, scenes cover exactly their time, and neighbours differ."""
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("swf  "), size=200))
    samples = run(text, 0.6)
    got = scenes_of(samples, [], NAMES)
    assert sum(scene.samples for scene in got) == len(samples)
    seen = sum(one.end_us - one.start_us for one in samples)
    assert sum(scene.end_us - scene.start_us for scene in got) == seen
    for before, after in itertools.pairwise(got):
        assert before.end_us < after.start_us or before.label != after.label


def test_scenes_are_there_once_a_video_is_closed(engine: Engine) -> None:
    """Closing writes the scenes; they are read by job, or by video."""
    job = planned(engine, 2 * RANGE, RANGE)
    work(engine)
    assert scenes(engine, job.job_id) == {}
    ledger.close_finished(engine)
    got = scenes(engine, job.job_id)
    assert list(got) == job.video_ids
    one = job.video_ids[0]
    assert [(s.label, s.start_us, s.end_us) for s in got[one]] == [("summer", 0, 8 * SECOND)]
    assert scenes(engine, job.job_id, one) == {one: got[one]}
