"""Which smoothing finds scenes best? Measured on tapes joined from real clips at known times.

    python benchmarks/scenes.py FOLDER [--tapes 200] [--fps 1]

Every clip of FOLDER is a label, given by five example pictures spread over it. Pictures are
embedded once, five a second, by the offline engine; a tape is a random sequence of pieces of 3 to
12 seconds whose joints lie anywhere between samples. A scene counts as found where its label is
right and both of its ends are at most one sample off; F1 is that of all scenes of all tapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from clipserver.engines.offline.engine import OfflineEngine
from storage.columns import SampleColumns
from storage.scenes import labelled_scenes
from storage.scoring import best_labels, centroid, picture_changes, similarities

A_SECOND = 5
"""Pictures of a clip that are embedded."""
LONGEST_S = 60
EXAMPLES = 5
SECOND_US = 1_000_000

Vectors = np.typing.NDArray[np.float16]
Event = tuple[int, int, int]
"""Label, start and end in microseconds."""


def embedded(clip: Path, engine: OfflineEngine) -> Vectors:
    """The clip's pictures as unit vectors, `A_SECOND` a second."""
    rows, waiting, after = [], [], Fraction(0)

    def embed() -> None:
        found = engine.embed_images(np.stack(waiting))
        rows.append(found / np.linalg.norm(found, axis=1, keepdims=True))
        waiting.clear()

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            t = frame.pts * stream.time_base
            if t < after:
                continue
            if t > LONGEST_S:
                break
            after += Fraction(1, A_SECOND)
            size = engine.description.input_size
            side = min(frame.width, frame.height)
            pixels = frame.to_ndarray(format="rgb24")
            top, left = (frame.height - side) // 2, (frame.width - side) // 2
            square = pixels[top : top + side, left : left + side]
            waiting.append(
                square[np.linspace(0, side - 1, size).astype(int)][
                    :, np.linspace(0, side - 1, size).astype(int)
                ]
            )
            if len(waiting) == 32:
                embed()
    if waiting:
        embed()
    return np.concatenate(rows).astype(np.float16)


def tape(
    clips: list[Vectors], random: np.random.Generator, fps: int
) -> tuple[SampleColumns, Vectors, list[Event]]:
    """Samples of a tape without their labels yet, their vectors, and what truly is on it."""
    pieces: list[Vectors] = []
    truth: list[Event] = []
    t = 0
    last = -1
    for _ in range(int(random.integers(4, 12))):
        label = int(random.choice([at for at in range(len(clips)) if at != last]))
        longest = min(12 * A_SECOND, len(clips[label]))
        length = int(random.integers(min(3 * A_SECOND, longest - 1), longest))
        start = int(random.integers(0, len(clips[label]) - length + 1))
        pieces.append(clips[label][start : start + length])
        span = length * SECOND_US // A_SECOND
        truth.append((label, t, t + span))
        t, last = t + span, label
    dense = np.concatenate(pieces)
    chosen = np.arange(0, len(dense), A_SECOND // fps)
    times = chosen * SECOND_US // A_SECOND
    ends = np.append(times[1:], t)
    return _columns(times, ends), dense[chosen], truth


def _columns(starts: np.ndarray, ends: np.ndarray) -> SampleColumns:
    none = np.zeros((len(starts), 1))
    where = np.arange(len(starts))
    return SampleColumns(where, starts, starts, ends, none.astype(np.int64), none, none)


def labelled(bare: SampleColumns, vectors: Vectors, matrix: np.ndarray) -> SampleColumns:
    """The samples with their five best labels, as a job keeps them."""
    label, similarity, confidence = best_labels(similarities(vectors, matrix), 5)
    return SampleColumns(
        bare.bucket, bare.t_us, bare.start_us, bare.end_us,
        label.astype(np.int64), similarity.astype(float), confidence.astype(float),
    )  # fmt: skip


def viterbi(
    samples: SampleColumns, vectors: Vectors, names: list[str], *, cuts: bool, stickiness_us: int
) -> list[Event]:
    """As a job finds them."""
    changes = picture_changes([vectors]) if cuts else None
    found = labelled_scenes(samples, [], names, changes=changes, stickiness_us=stickiness_us)
    return [(label, scene.start_us, scene.end_us) for label, scene in found]


def plain(samples: SampleColumns, vectors: Vectors, names: list[str]) -> list[Event]:
    """Runs of each sample's best label, nothing smoothed."""
    return _runs(samples.label[:, 0], samples)


def hysteresis(
    samples: SampleColumns, vectors: Vectors, names: list[str], *, lasting: int, enter: float
) -> list[Event]:
    """A new label is taken once it is the best of `lasting` samples in a row, each with a
    confidence of at least `enter`; the scene then begins at the first of them."""
    best, confidence = samples.label[:, 0], samples.confidence[:, 0]
    path = np.empty(len(best), dtype=np.int64)
    now = int(best[0])
    for at in range(len(best)):
        ahead = slice(at, at + lasting)
        same = (best[ahead] == best[at]).all() and (confidence[ahead] >= enter).all()
        if best[at] != now and same and len(best[ahead]) == min(lasting, len(best) - at):
            now = int(best[at])
        path[at] = now
    return _runs(path, samples)


def _runs(path: np.ndarray, samples: SampleColumns) -> list[Event]:
    edges = [0, *(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
    return [
        (int(path[a]), int(samples.start_us[a]), int(samples.end_us[b - 1]))
        for a, b in pairwise(edges)
    ]


def found_of(truth: list[Event], said: list[Event], tolerance_us: int) -> int:
    """How many true scenes are told with the right label and both ends near."""
    left = list(said)
    count = 0
    for label, start, end in truth:
        for one in left:
            near = abs(one[1] - start) <= tolerance_us and abs(one[2] - end) <= tolerance_us
            if one[0] == label and near:
                left.remove(one)
                count += 1
                break
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tapes", type=int, default=200)
    parser.add_argument("--fps", type=int, default=1, choices=[1, 5])
    options = parser.parse_args()
    engine = OfflineEngine(1)
    paths = sorted(p for p in options.folder.iterdir() if p.suffix in (".mp4", ".webm"))
    clips = [embedded(path, engine) for path in paths]
    names = [path.stem for path in paths]
    spread = [np.linspace(0, len(clip) - 1, 2 * EXAMPLES + 1).astype(int)[1::2] for clip in clips]
    matrix = np.stack([centroid(clip[at]) for clip, at in zip(clips, spread, strict=True)])
    ways: dict[str, Callable[..., list[Event]]] = {
        "best label of each sample": plain,
        **{
            f"hysteresis, {n} samples of {enter:g}": partial(hysteresis, lasting=n, enter=enter)
            for n in (2, 3) for enter in (0.0, 0.3, 0.5)
        },
        **{
            f"Viterbi, sticky for {sticky:g} s, {'with' if cuts else 'no'} cuts":
            partial(viterbi, stickiness_us=round(sticky * SECOND_US), cuts=cuts)
            for sticky in (0.5, 1, 2, 3, 4) for cuts in (False, True)
        },
    }  # fmt: skip
    tapes = []
    for seed in range(options.tapes):
        bare, vectors, truth = tape(clips, np.random.default_rng(seed), options.fps)
        tapes.append((labelled(bare, vectors, matrix), vectors, truth))
    total = sum(len(truth) for *_, truth in tapes)
    print(
        f"{len(clips)} clips, {len(tapes)} tapes, {total} scenes, {options.fps} sample(s) a second"
    )
    for name, way in ways.items():
        hits, said = 0, 0
        for samples, vectors, truth in tapes:
            answer = way(samples, vectors, names)
            hits += found_of(truth, answer, SECOND_US // options.fps)
            said += len(answer)
        print(f"F1 {2 * hits / (total + said):.4f}  scenes {said:5}  {name}")


if __name__ == "__main__":
    main()
