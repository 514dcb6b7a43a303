"""What there is to send is measured: on some frames of a large archive, on all of a small one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from contract_server import ContractServer, contract_server
from rows import info, ranges

from nightreel.cli import run_command
from scheduler import weighing
from scheduler.estimate import Planned, estimate
from scheduler.weighing import Weighing, Weight
from storage.records import ArchiveFile, Fit, Label, LabelSet, Sampling, SamplingMode
from workers.api import ApiClient
from workers.calls import prompts_of
from workers.classify import embed_labels, prompt_weights
from workers.contract import base64_length
from workers.footage.picture import encode_jpeg
from workers.probing import Asked, probe_and_plan
from workers.settings import WorkerSettings
from workers.weighing import Weighed, weigh

EVERY_FRAME = Sampling(SamplingMode.EVERY_FRAME, None)
SIZE = 64


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with contract_server() as running:
        yield running


def noisy_clip(path: Path, seed: int, seconds: int = 20, *, gop: int = 10) -> Path:
    """Ten frames a second of noise whose coarseness and strength wander, so pictures of all
    weights."""
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.gop_size = gop
        stream.options = {"preset": "ultrafast", "crf": "20"}
        for at in range(10 * seconds):
            strength = 60 + 50 * np.sin(at / 23 + seed)
            coarse = 1 << (seed + at // 50) % 4
            noise = random.normal(128, strength, (64 // coarse, 96 // coarse, 3))
            frame = np.clip(noise, 0, 255).astype(np.uint8).repeat(coarse, 0).repeat(coarse, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def planned(path: Path, sampling: Sampling = EVERY_FRAME, task_us: int = 4_000_000) -> Planned:
    stat = path.stat()
    asked = Asked(ArchiveFile(str(path), stat.st_size, stat.st_mtime_ns), None)
    found = probe_and_plan(asked, sampling, task_us)
    assert found.info is not None
    return Planned(str(path), found.info, found.ranges, [False] * len(found.ranges))


def weighed(plans: list[Planned]) -> Weight | None:
    some = Weighing()
    assert list(some.watch(plans)) == plans
    return some.weigh(EVERY_FRAME, SIZE, Fit.CROP, processes=2)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Planned]:
    """Six clips of 200 frames in ranges of 40."""
    folder = tmp_path_factory.mktemp("noise")
    return [planned(noisy_clip(folder / f"{seed}.mp4", seed)) for seed in range(6)]


def test_a_small_archive_is_weighed_whole(plans: list[Planned]) -> None:
    """Each frame is decoded and encoded as a worker does; what is stored is left out."""
    found = weighed(plans[:1])
    assert found is not None
    assert (found.of, found.frames, found.error) == (200, 200, 0)
    one = plans[0]
    alone = [
        sum(weigh(Weighed(one.path, one.info, r, range(40)), EVERY_FRAME, SIZE, Fit.CROP))
        for r in one.ranges
    ]
    assert found.mean == sum(alone) / 200
    rest = weighed([replace(one, embedded=[True, False, True, True, True])])
    assert rest is not None
    assert (rest.of, rest.mean) == (40, alone[1] / 40)
    assert weighed([replace(one, embedded=[True] * 5)]) is None


def test_a_large_archive_is_weighed_by_an_even_sample(
    plans: list[Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between half as many frames as are allowed and as many give the mean of all of them, within
    the error that is told."""
    whole = weighed(plans)
    monkeypatch.setattr(weighing, "MOST_FRAMES", 500)
    some = weighed(plans)
    assert whole is not None
    assert some is not None
    assert (whole.of, whole.frames, some.of, some.frames) == (1200, 1200, 1200, 300)
    assert some.mean != whole.mean
    assert abs(some.mean / whole.mean - 1) < min(some.error, 0.02)
    assert some.error < 0.1


@pytest.mark.parametrize("gop", [10, 10_000], ids=["split", "sequential"])
def test_some_frames_of_a_range_weigh_what_they_weigh_among_all(tmp_path: Path, gop: int) -> None:
    """Whichever frames are chosen, those very frames are decoded: in a video that is cut at
    keyframes by seeking, in one that is not by reading on."""
    one = planned(noisy_clip(tmp_path / "clip.mp4", 3, gop=gop))
    last = one.ranges[-1]
    whole = weigh(
        Weighed(one.path, one.info, last, range(len(last.buckets))), EVERY_FRAME, SIZE, Fit.TILES
    )
    at = range(3, len(last.buckets), 7)
    some = weigh(Weighed(one.path, one.info, last, at), EVERY_FRAME, SIZE, Fit.TILES)
    assert some == whole[3::7]


def test_frames_that_are_gone_weigh_nothing(tmp_path: Path, plans: list[Planned]) -> None:
    """A file that vanished after it was planned is left out; without any other, nothing is
    known."""
    gone = replace(plans[0], path=str(tmp_path / "gone.mp4"))
    found = weighed([gone, plans[1]])
    assert found is not None
    assert (found.of, found.frames) == (400, 200)
    assert weighed([gone]) is None


def test_a_plan_takes_bounded_time_and_says_what_it_does_not_know(
    tmp_path: Path,
    server: ContractServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where no frame decodes in time all but the bytes is told, with one line; where only some of
    them were decoded, how far off the bytes may be."""
    noisy_clip(tmp_path / "clip.mp4", 1)
    words = ["plan", str(tmp_path / "clip.mp4"), "--api", server.url, "--all-frames"]
    words += ["--db", f"sqlite:///{tmp_path / 'results.db'}"]
    monkeypatch.setattr(weighing, "MOST_FRAMES", 60)
    assert run_command([*words, "--format", "csv"]) == 0
    said = capsys.readouterr()
    assert "the MiB are reckoned from 50 of 200 frames: within about " in said.err
    monkeypatch.setattr(weighing, "LONGEST_S", 0.0)
    began = time.monotonic()
    assert run_command([*words, "--format", "csv"]) == 0
    assert time.monotonic() - began < 20
    said = capsys.readouterr()
    assert ",200,0,26,1,," in said.out
    assert "what there is to send is not known" in said.err


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("key", [None, "rf_secret_0123456789"])
def test_labels_are_weighed_to_the_byte(
    server: ContractServer, embeds: bool, key: str | None
) -> None:
    """Prompts beyond what one call takes, accents and quotes, example pictures, and the key that
    goes with each request."""
    random = np.random.default_rng(2)
    pictures = tuple(
        encode_jpeg(random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(11)
    )
    prompts = tuple(f'a "café" n° {n}' for n in range(10))
    labels = LabelSet(
        "all",
        (
            Label("many", prompts, examples=pictures if embeds else ()),
            Label("one", ("a\nline",)),
            Label("two", (prompts[0], "another")),
        ),
    )
    way = "embed" if embeds else "compare"
    api = ApiClient(WorkerSettings(api_url=server.url, api_key=key, api_way=way))
    api.endpoint()
    before = api.spent.bytes_sent
    if embeds:
        embed_labels(labels, api)
    else:
        prompt_weights(labels, api)
    found = estimate(
        [Planned("", info(1), ranges(1, 1), [False])],
        labels,
        labels_known=False,
        fit=Fit.CROP,
        embeds=embeds,
        batch=8 if embeds else 1,
        weight=api.wire.weight,
        asking_bytes=0,
    )
    assert found.text_calls == api.spent.text_calls
    if embeds:
        api.embed_images(pictures[:1])
    else:
        api.compare(pictures[0], prompts_of(labels))
    frame_bytes = base64_length(len(pictures[0]))
    assert found.frames_sent == (1 if embeds else 2)
    assert found.bytes_at(frame_bytes) == api.spent.bytes_sent - before
    api.close()
