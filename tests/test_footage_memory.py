"""Memory: what reading a video takes is what its decoder takes, and it is given back."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from av.video.frame import VideoFrame
from footage_files import HEIGHT, WIDTH, encode, frames, replaced, scenery, x264

from storage.records import Fit, Sampling, SamplingMode
from workers.footage.decode import read_range
from workers.footage.plan import plan
from workers.footage.probe import probe
from workers.footage.source import Source

EVERY_FRAME = Sampling(SamplingMode.EVERY_FRAME, None)


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("sampling", [Sampling(), EVERY_FRAME], ids=str)
@pytest.mark.usefixtures("no_garbage_collector")
def test_no_frame_waits_for_the_garbage_collector(sampling: Sampling, tmp_path: Path) -> None:
    """A file that is probed and read to its end leaves no frame and no decoder behind, turned
    or not, and of colours that the scaler does not know."""
    for clockwise, matrix in ((0, "bt709"), (90, "bt709"), (90, "YCgCo")):
        path = os.fspath(
            encode(
                tmp_path / f"{clockwise}{matrix}.mp4",
                frames(60),
                options=x264(extra=f"colormatrix={matrix}"),
                configure=lambda stream, turn=-clockwise: stream.set_display_rotation(turn),
            )
        )
        info, index = probe(path)
        assert info.rotation == clockwise
        for task in plan(info, index, sampling, 1_000_000):
            assert list(read_range(path, info, task, sampling, size=48, fit=Fit.CROP))
    assert not [found for found in gc.get_objects() if isinstance(found, Source)]
    left = [found for found in gc.get_objects() if isinstance(found, VideoFrame)]
    assert not [frame for frame in left if (frame.width, frame.height) == (WIDTH, HEIGHT)]


GROWTH = """
import sys
from pathlib import Path

import av

from storage.records import Fit, Sampling
from workers.footage.decode import read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

def mb(name):
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) / 1024

def bare():
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            stream.codec_context.decode(packet)

def ours():
    for _ in read_range(path, info, task, sampling, size=224, fit=Fit.CROP):
        pass

path, sampling = sys.argv[1], Sampling.parse(sys.argv[2])
info, index = probe(path)
(task,) = plan(info, index, sampling)
for read in (bare, ours):
    read()  # and what is loaded and touched but once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = mb("VmRSS:")
    read()
    print(mb("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second and a half of 4K, whose decoded pictures take 12 MB each."""
    shown = [scenery(number, 3840, 2160) for number in range(2)]
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    options = x264(gop=15) | {"preset": "ultrafast"}
    return encode(path, [shown[number % 2] for number in range(45)], options=options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("sampling", ["prefer-keyframe@1", "first@5", "every-frame"])
def test_reading_takes_no_picture_more_than_decoding(large: Path, sampling: str) -> None:
    """At its peak a range of 4K holds what the decoder needs for itself, and not one frame more."""
    # As in a worker, or the second to read finds memory that the first has not given back.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", GROWTH, os.fspath(large), sampling]
    said = subprocess.check_output(command, text=True, env=settings)
    bare_mb, ours_mb = (float(line) for line in said.splitlines())
    assert bare_mb > 30
    assert ours_mb < bare_mb + 9


BOUND = """
import resource
import sys

from storage.records import Fit, Gap, Sampling
from workers.footage import decode
from workers.footage.plan import plan
from workers.footage.probe import probe

path, sampling = sys.argv[1], Sampling.parse("first@5")
info, index = probe(path)
(task,) = plan(info, index, sampling)
before = resource.getrlimit(resource.RLIMIT_DATA)
enough = decode.MAX_MEMORY_BYTES
for most in (100 * 2**20, enough):
    decode.MAX_MEMORY_BYTES = most
    results = list(decode.read_range(path, info, task, sampling, size=48, fit=Fit.CROP))
    assert results[-1].end_us == info.duration_us
    print(*(f"{one.kind}: {one.detail}" for one in results if isinstance(one, Gap)), sep=", ")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_pictures_that_take_too_much_memory_are_a_gap_that_says_so(large: Path) -> None:
    """What does not fit is a gap, and the process reads on: the limit ends with the range."""
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    said = subprocess.check_output(
        [sys.executable, "-c", BOUND, os.fspath(large)], text=True, env=settings
    )
    assert said.splitlines() == ["damaged: decoding it takes more memory than a file may", ""]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_limit_of_memory_ends_with_the_last_range(tmp_path: Path) -> None:
    """Ranges that are read side by side, and closed early in any order, leave no limit behind."""
    path = os.fspath(encode(tmp_path / "film.mp4", frames(60), options=x264()))
    info, index = probe(path)
    (task,) = plan(info, index, EVERY_FRAME)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    first, second = (
        read_range(path, info, task, EVERY_FRAME, size=48, fit=Fit.CROP) for _ in range(2)
    )
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    next(first)
    next(second)
    first.close()
    assert resource.getrlimit(resource.RLIMIT_DATA) != before
    second.close()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


HELD = """
import sys
from pathlib import Path

from storage.records import Fit, Gap, Sampling
from workers.footage.decode import read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

def mb(name):
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) / 1024

path, sampling = sys.argv[1], Sampling.parse("first@1/6")
Path("/proc/self/clear_refs").write_text("5")
before = mb("VmRSS:")
info, index = probe(path)
for task in plan(info, index, sampling):
    for sample in read_range(path, info, task, sampling, size=48, fit=Fit.CROP):
        assert not isinstance(sample, Gap)
print(mb("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("gop", [10_000, 190])
def test_a_huge_group_of_pictures_holds_no_memory(gop: int, tmp_path: Path) -> None:
    """Of 190 MB between one keyframe and the next wanted picture a small part waits at a time."""
    filler = b"\0\0\0\1\x0c" + b"\xff" * 2**20 + b"\x80"
    path = encode(
        tmp_path / "huge.mkv",
        frames(200),
        options=x264(gop=gop, bframes=0),
        change=lambda _number, packet: replaced(packet, bytes(packet) + filler),
    )
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", HELD, os.fspath(path)]
    assert float(subprocess.check_output(command, text=True, env=settings)) < 80


FREED = """
import ctypes, sys

class Info(ctypes.Structure):
    _fields_ = [(f"field{n}", ctypes.c_size_t) for n in range(10)]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallinfo2.restype = Info

if sys.argv[1:]:
    from workers import startup
    startup._give_memory_back()
libc.free(libc.malloc(8 * 2**20))
held = libc.malloc(8 * 2**20)
print(libc.mallinfo2().field4 >= 8 * 2**20)  # bytes that are mapped apart
"""


def test_a_worker_gives_the_memory_of_pictures_back() -> None:
    """What takes megabytes is mapped apart, also once some of it has been freed: by itself the C
    library would keep it from then on."""
    plain = subprocess.run(
        [sys.executable, "-c", FREED], capture_output=True, text=True, check=False
    )
    if plain.returncode:
        pytest.skip("needs glibc 2.33")
    assert plain.stdout == "False\n"
    settled = subprocess.check_output([sys.executable, "-c", FREED, "settled"], text=True)
    assert settled == "True\n"
