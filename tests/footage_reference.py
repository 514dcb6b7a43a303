"""What a video's samples are by definition, told from one pass of a decoder that skips and seeks
nothing, and what tasks in random order make of the same video, in the same form."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from storage.records import Fit, Gap, Sampling, SamplingMode, VideoInfo
from workers.footage.decode import DecodedSample, read_range
from workers.footage.index import Index
from workers.footage.picture import Picture, Renderer
from workers.footage.plan import plan

SIZE = 224
TASK_US = 2_500_000
ONE_TASK_US = 10**15
RATES = (Fraction(1, 5), Fraction(1), Fraction(3))
SAMPLINGS = [
    *(Sampling(SamplingMode.PREFER_KEYFRAME, rate) for rate in RATES),
    *(Sampling(SamplingMode.FIRST, rate) for rate in RATES),
    Sampling(SamplingMode.KEYFRAMES, None),
]
"""Three rates by three modes; the third mode has no rate."""


class Sample(NamedTuple):
    """A sample, with a hash in the place of its picture."""

    bucket: int
    t_us: int
    start_us: int
    picture: bytes


def digest(picture: Picture) -> bytes:
    """A hash that no two pictures share."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Reference:
    """The truth about a video: what it presents, in order, and the pictures that may be samples."""

    tick: Fraction
    """Seconds of the numbers below."""
    presented: list[tuple[int, bool]]
    """Time and keyframe mark of every frame."""
    pictures: dict[int, bytes]
    """Hashes by time."""

    def samples(self, sampling: Sampling) -> list[Sample]:
        """What a sampling takes, by its definition in plain fractions."""
        first = self.presented[0][0]
        found = []
        for bucket, at in chosen(self.presented, self.tick, sampling):
            t_us = int((at - first) * self.tick * 1_000_000)
            start_us = t_us if sampling.rate is None else int(bucket * 1_000_000 / sampling.rate)
            found.append(Sample(bucket, t_us, start_us if found else 0, self.pictures[at]))
        return found


def chosen(
    presented: list[tuple[int, bool]], tick: Fraction, sampling: Sampling
) -> list[tuple[int, int]]:
    """Bucket and time of each sample among frames in order."""
    if sampling.rate is None:
        return list(enumerate(at for at, key in presented if key))
    buckets: dict[int, list[tuple[int, bool]]] = {}
    for at, key in presented:
        seconds = (at - presented[0][0]) * tick
        buckets.setdefault(int(seconds * sampling.rate), []).append((at, key))
    prefers = sampling.mode is SamplingMode.PREFER_KEYFRAME
    return [
        (bucket, next((at for at, key in frames if key and prefers), frames[0][0]))
        for bucket, frames in buckets.items()
    ]


def timed(path: Path, info: VideoInfo) -> Reference:
    """The truth about a file with timestamps to trust: time is what its packets say."""
    with av.open(str(path)) as container:
        stream = container.streams[info.stream_index]
        assert stream.time_base is not None
        tick = stream.time_base
        presented = sorted(
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard and packet.pts is not None
        )
    wanted = {at for each in SAMPLINGS for _bucket, at in chosen(presented, tick, each)}
    pictures: dict[int, bytes] = {}
    decoded = 0
    for frame, renderer in one_pass(path, info):
        decoded += 1
        if frame.pts in wanted:
            pictures.setdefault(frame.pts, digest(renderer.picture(frame)))
    assert decoded == len(presented), "the reference itself must be whole"
    return Reference(tick, presented, pictures)


def numbered(
    path: Path, info: VideoInfo, rate: int, at: Callable[[int], int] = lambda number: number
) -> Reference:
    """The truth about a file without timestamps to trust: frame n of the one pass stands at `at(n)`
    over the rate."""
    presented: list[tuple[int, bool]] = []
    pictures: dict[int, bytes] = {}
    tick = Fraction(1, rate)
    begun: set[tuple[Fraction, int]] = set()
    for number, (frame, renderer) in enumerate(one_pass(path, info)):
        key, time = frame.key_frame, at(number)
        presented.append((time, key))
        buckets = {(each, int(time * tick * each)) for each in RATES}
        if key or not buckets <= begun:
            pictures[time] = digest(renderer.picture(frame))
        begun |= buckets
    return Reference(tick, presented, pictures)


def one_pass(path: Path, info: VideoInfo) -> Iterator[tuple[av.VideoFrame, Renderer]]:
    """Every frame in the decoder's order, with what renders it."""
    with av.open(str(path)) as container:
        stream = container.streams[info.stream_index]
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        renderer = Renderer(SIZE, Fit.SQUASH, pixel_aspect=aspect)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in frames:
                yield frame, renderer


def whole_frames(path: Path, info: VideoInfo) -> list[int]:
    """Timestamps of the frames of one pass that are decoded before any damage in their group of
    pictures: an error, or a frame marked as corrupt."""
    packets: dict[int, tuple[int, int]] = {}
    damaged: dict[int, int] = {}
    decoded = []
    group = 0
    with av.open(str(path)) as container:
        stream = container.streams[info.stream_index]
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_count = 1
        for number, packet in enumerate(container.demux(stream)):
            group += packet.is_keyframe
            if packet.pts is not None:
                packets[packet.pts] = group, number
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                damaged.setdefault(group, number)
                continue
            for frame in frames:
                if frame.pts is not None:
                    decoded.append(frame.pts)
                    of_group, at = packets[frame.pts]
                    if frame.is_corrupt:
                        damaged[of_group] = min(at, damaged.get(of_group, at))
    return [pts for pts in decoded if packets[pts][1] < damaged.get(packets[pts][0], 2**63)]


def read_all(
    path: Path, info: VideoInfo, index: Index, sampling: Sampling, task_us: int = TASK_US
) -> tuple[int, list[Sample | Gap]]:
    """The number of tasks, and what they gave when run in random order, put in order of time.

    The order follows from the file's name and the sampling, and is printed. Fails unless the tasks
    tile the video and their results tile the tasks.
    """
    tasks = plan(info, index, sampling, task_us)
    edges = [0, *(task.end_us for task in tasks)]
    assert [task.start_us for task in tasks] == edges[:-1]
    assert edges[-1] == info.duration_us
    assert [task.bucket_start for task in tasks[1:]] == [task.bucket_end for task in tasks[:-1]]
    order = list(range(len(tasks)))
    seed = f"{path.name} {sampling}"
    random.Random(seed).shuffle(order)
    print(f"random.Random({seed!r}): tasks in the order {order}")  # noqa: T201
    results: dict[int, list[Sample | Gap]] = {}
    for number in order:
        task = tasks[number]
        reached, results[number] = task.start_us, []
        decoded = read_range(os.fspath(path), info, task, sampling, size=SIZE, fit=Fit.SQUASH)
        with closing(decoded):
            for result in decoded:
                assert result.start_us == reached <= result.end_us
                reached = result.end_us
                results[number].append(result if isinstance(result, Gap) else taken(result))
        assert reached == task.end_us
    return len(tasks), [result for number in sorted(results) for result in results[number]]


def taken(sample: DecodedSample) -> Sample:
    """A sample of the reader in the form of the reference."""
    return Sample(sample.bucket, sample.t_us, sample.start_us, digest(sample.picture))
