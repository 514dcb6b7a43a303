"""What sampling one frame a second costs, by several ways, side by side in one run.

    python benchmarks/decode.py CLIPS_FOLDER [--seconds 60] [--rounds 3] [--keep FOLDER]

Recipe of the measured files: the folder's clips, five seconds of each in the order of their names
and again from the start until the length is reached, scaled and padded to 1920x1080 at 30 frames a
second, H.264 (x264, 3 B-frames), no sound.

    archive preset medium, 4 Mbit/s, with a little noise (luma, strength 4, new in every frame); a
            keyframe where the scene changes and at least every 2 s
    camera  the same with 8 Mbit/s and noise of strength 8
    soft    preset veryfast, CRF 23, no noise; keyframes as before
    strict  as soft, but a keyframe exactly every 2 s and nowhere else, which at one sample a second
            is the worst place for keyframes: every other sample lies a whole second behind

The clips are small and soft, so that scaled up as they are they take 2 Mbit/s. What is delivered at
1080p takes 4 to 6 Mbit/s, which is `archive`; what a camera writes is sharper, has more noise and
takes 6 to 12 Mbit/s.

Two 4K files of 10 s by the soft recipe, H.264 of 8 bits and HEVC of 10 bits (x265), serve the
figures of memory, an hour of the strict file, repeated without encoding it again, the figures of
indexing. Every way runs in a process of its own with one decoder thread; CPU seconds are those of
the whole process after its imports. The ways take turns, three times, and the least that each took
counts: what else runs on a machine only ever adds.

Memory is measured twice: of the bare reader, and of a worker as an operator starts it, a process of
whose pool probes the 4K file and then takes its samples in five tasks; with a scheduler, a Redis
and a PostgreSQL of its own (Debian's binaries) and an API that costs nothing. Peaks are those of
resident memory (VmHWM), what a process shares with its parent included.
"""

# ruff: noqa: PLC0415 -- each way imports in its own process only what it uses
from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from itertools import cycle, product
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from storage.records import Sampling

SIZE = 224
RECIPES: dict[str, tuple[str, list[str]]] = {
    "archive": (
        ",noise=c0s=4:c0f=t",
        ["-preset", "medium", "-b:v", "4M", "-g", "60"],
    ),
    "camera": (
        ",noise=c0s=8:c0f=t",
        ["-preset", "medium", "-b:v", "8M", "-g", "60"],
    ),
    "soft": ("", ["-preset", "veryfast", "-crf", "23", "-g", "60"]),
    "strict": (
        "",
        [
            "-preset",
            "veryfast",
            "-crf",
            "23",
            "-g",
            "60",
            "-keyint_min",
            "60",
            "-sc_threshold",
            "0",
        ],
    ),
}
"""What a recipe adds to the chain of filters, and its options of x264."""
LARGE: dict[str, tuple[str, ...]] = {
    "large": ("libx264", "-bf", "3"),
    "large10": ("libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le"),
}
"""The encoders of the 4K files: H.264 of 8 bits, HEVC of 10."""
LOADED = ("av", "PIL.Image", "workers.footage.decode", "workers.footage.probe")
"""What every way has loaded before it is measured."""
TASK_US = 2_000_000
"""Length of the worker's tasks at 4K: what one leaves in memory counts for the next."""
WORKER_S = 300
AS_WORKERS = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""What a worker tells the C library as it starts."""


def build(
    clips: Path,
    target: Path,
    seconds: int,
    width: int,
    height: int,
    *,
    recipe: str = "soft",
    encoder: tuple[str, ...] = ("libx264", "-bf", "3"),
) -> None:
    """Write a measured file by the recipe above."""
    names = sorted(path for path in clips.iterdir() if path.suffix in (".mp4", ".webm"))
    chosen = [name for name, _ in zip(cycle(names), range(-(-seconds // 5)), strict=False)]
    inputs = [part for name in chosen for part in ("-t", "5", "-i", str(name))]
    shape = (
        f"fps=30,scale={width}:{height}:force_original_aspect_ratio=decrease,"
        f"pad={width}:{height}:(ow-iw)/2:(oh-ih)/2,setsar=1,format=yuv420p,"
        "tpad=stop=-1:stop_mode=clone,trim=duration=5"
    )
    graph = "".join(f"[{n}:v:0]{shape}[v{n}];" for n in range(len(chosen)))
    graph += "".join(f"[v{n}]" for n in range(len(chosen))) + f"concat=n={len(chosen)}:v=1:a=0"
    filters, options = RECIPES[recipe]
    graph += f"{filters}[o]"
    command = ["ffmpeg", "-v", "error", "-y", *inputs, "-filter_complex", graph, "-map", "[o]"]
    subprocess.run([*command, "-c:v", *encoder, *options, "-t", str(seconds), target], check=True)


def tutorial_loop(path: str) -> int:
    """Read every frame with OpenCV, shrink it to 0.6, encode it with Pillow."""
    import cv2
    from PIL import Image

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = 0
    while True:
        got, frame = capture.read()
        if not got:
            return frames
        small = cv2.resize(frame, None, fx=0.6, fy=0.6)
        picture = Image.fromarray(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
        picture.save(io.BytesIO(), "JPEG", quality=90)
        frames += 1


def opencv_grab(path: str) -> int:
    """Grab every frame with OpenCV, retrieve one a second."""
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    step = round(capture.get(cv2.CAP_PROP_FPS))
    frames = number = 0
    while capture.grab():
        if number % step == 0:
            _got, frame = capture.retrieve()
            cv2.imencode(".jpg", cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
            frames += 1
        number += 1
    return frames


def pyav_everything(path: str) -> int:
    """Decode every frame with PyAV, convert one a second."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames, bucket = 0, -1
        for frame in container.decode(stream):
            if frame.time is not None and int(frame.time) != bucket:
                bucket = int(frame.time)
                frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()
                frames += 1
    return frames


def ffmpeg_null(path: str) -> int:
    """The ffmpeg command's own decoding, with no output at all."""
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", path, "-f", "null", "-"]
    subprocess.run(command, check=True)
    return 0


def ours(mode: str) -> Callable[[str], int]:
    """Probe, plan and read all ranges, JPEG included."""

    def read(path: str) -> int:
        from storage.records import Fit, Gap, Sampling, SamplingMode
        from workers.footage.decode import read_range
        from workers.footage.picture import encode_jpeg
        from workers.footage.plan import plan
        from workers.footage.probe import probe

        rate = None if mode in ("keyframes", "every-frame") else Fraction(1)
        sampling = Sampling(SamplingMode(mode), rate)
        info, index = probe(path)
        frames = 0
        for task in plan(info, index, sampling):
            for sample in read_range(path, info, task, sampling, size=SIZE, fit=Fit.CROP):
                if isinstance(sample, Gap):
                    raise SystemExit(f"a gap: {sample}")
                encode_jpeg(sample.picture)
                frames += 1
        return frames

    return read


def one_task(path: str) -> int:
    """The fixed cost of a task: open the file, seek to its end and give one keyframe, 15 times."""
    from storage.records import Fit, Sampling
    from workers.footage.decode import read_range
    from workers.footage.plan import plan
    from workers.footage.probe import probe

    info, index = probe(path)
    task = plan(info, index, Sampling(), 5_000_000)[-1]
    task = replace(task, buckets=task.buckets[:1], pts=(task.seek_pts or 0,))
    spent = []
    for _ in range(15):
        start = time.process_time()
        samples = list(read_range(path, info, task, Sampling(), size=SIZE, fit=Fit.CROP))
        spent.append(time.process_time() - start)
        if len(samples) != 1:
            raise SystemExit(f"not one sample: {samples}")
    print(f"fixed cost of a task: {sorted(spent)[7] * 1000:.0f} ms (median of 15)", file=sys.stderr)
    return 1


def index(path: str) -> int:
    """Probe once: index by packets, or by the container's tables."""
    from workers.footage.probe import probe

    return len(probe(path)[1].pts)


WAYS: dict[str, Callable[[str], int]] = {
    "tutorial loop": tutorial_loop,
    "OpenCV grab/retrieve": opencv_grab,
    "PyAV, every frame": pyav_everything,
    "ffmpeg -f null": ffmpeg_null,
    "ours, first": ours("first"),
    "ours, prefer-keyframe": ours("prefer-keyframe"),
    "ours, keyframes": ours("keyframes"),
    "ours, every frame": ours("every-frame"),
    "ours, one task": one_task,
    "ours, index": index,
}


def run_one(way: str, path: str) -> None:
    """Run one way in this process and print its figures as JSON."""
    # Imports are no part of what is measured; OpenCV, which our ways do without, is memory.
    for module in LOADED if way.startswith("ours") else (*LOADED, "cv2"):
        import_module(module)

    def cpu_s() -> float:
        own, children = (
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    read, start, wall = bytes_read(), cpu_s(), time.monotonic()
    frames = WAYS[way](path)
    figures = {
        "cpu_s": cpu_s() - start,
        "wall_s": time.monotonic() - wall,
        "frames": frames,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "read_mb": (bytes_read() - read) / 1e6,
    }
    print(json.dumps(figures))


def bytes_read() -> int:
    """Bytes that this process asked of the operating system; 0 where it does not tell."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def repeated(source: Path, target: Path, times: int) -> None:
    """Write the packets of a file so often one after the other."""
    listing = target.with_suffix(".txt")
    listing.write_text(f"file '{source.resolve()}'\n" * times)
    command = ["ffmpeg", "-v", "error", "-y", "-f", "concat", "-safe", "0", "-i", str(listing)]
    subprocess.run([*command, "-c", "copy", str(target)], check=True)


def measure(way: str, path: Path, settings: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--way", way, str(path)]
    environment = os.environ | (settings or {})
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="What sampling costs, way by way.")
    parser.add_argument("path", type=Path, help="folder of clips (mp4, webm)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the measured file")
    parser.add_argument("--rounds", type=int, default=3, help="times that every way runs in turn")
    parser.add_argument("--keep", type=Path, help="folder to build the files in, or use them again")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_one(options.way, str(options.path))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for recipe in RECIPES:
            video = folder / f"{recipe}.mp4"
            if not video.exists():
                build(options.path, video, options.seconds, 1920, 1080, recipe=recipe)
            compare(recipe, video, options.rounds)
        measure("ours, one task", folder / "strict.mp4")
        for name, encoder in LARGE.items():
            large = folder / f"{name}.mp4"
            if not large.exists():
                build(options.path, large, 10, 3840, 2160, encoder=encoder)
        memory([folder / f"{name}.mp4" for name in LARGE])
        for suffix in ("mp4", "mkv", "ts"):
            hour = folder / f"hour.{suffix}"
            if not hour.exists():
                repeated(folder / "strict.mp4", hour, -(-3600 // options.seconds))
            row = measure("ours, index", hour)
            print(
                f"index of an hour, {suffix}: {row['wall_s']:.2f} s, {row['frames']:.0f} frames, "
                f"{row['read_mb']:.1f} of {hour.stat().st_size / 1e6:.1f} MB read"
            )


def memory(videos: Sequence[Path]) -> None:
    """Print the peaks of the bare reader, and of a worker: its pool's process and their parent."""
    from queue_servers import databases, postgresql_server, redis_server
    from queue_workers import slow_api

    from storage.records import Sampling, SamplingMode

    ways = {
        "ours, prefer-keyframe": Sampling(),
        "ours, first": Sampling(SamplingMode.FIRST),
        "ours, keyframes": Sampling(SamplingMode.KEYFRAMES, None),
        "ours, every frame": Sampling(SamplingMode.EVERY_FRAME, None),
    }
    print(f"{'peak MB at 3840x2160':32}{'reader':>8}{'worker':>8}{'parent':>8}")
    with redis_server() as (queue, _), postgresql_server() as (server, _), slow_api() as api:
        for video, (way, sampling) in product(videos, ways.items()):
            with databases(server)("postgresql") as engine:
                child, parent = worker_peaks(video, sampling, engine, queue, api)
            reader = measure(way, video, AS_WORKERS)["peak_mb"]
            print(f"{video.stem + ', ' + way:32}{reader:8.0f}{child:8.0f}{parent:8.0f}", flush=True)


def worker_peaks(
    video: Path, sampling: Sampling, engine: Engine, redis_url: str, api_url: str
) -> tuple[float, float]:
    """Peaks, in MB, of the process of a worker's pool that runs a job, and of its parent."""
    from queue_ledger import spec
    from queue_workers import MODEL, scheduler, worker
    from sqlalchemy import select

    from storage import ledger
    from storage.database import reading
    from storage.records import ArchiveFile
    from storage.schema import jobs

    def peak_mb(pid: int) -> float:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    stat = video.stat()
    file = ArchiveFile(str(video.resolve()), stat.st_size, stat.st_mtime_ns)
    asked = replace(spec(MODEL), sampling=sampling)
    with tempfile.TemporaryDirectory() as folder:
        services = engine, redis_url
        with (
            worker("worker", *services, api_url, Path(folder), 1) as pid,
            scheduler(*services, Path(folder), window=8),
        ):
            ledger.open_job(engine, asked, files=[file], task_us=TASK_US)
            deadline = time.monotonic() + WORKER_S
            state = ledger.JobState.RUNNING
            while state == ledger.JobState.RUNNING and time.monotonic() < deadline:
                time.sleep(0.2)
                with reading(engine) as connection:
                    state = connection.execute(select(jobs.c.state)).scalar_one()
            (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if state != ledger.JobState.CLOSED:
                raise SystemExit(f"the job is {state} after {WORKER_S} s")
            return peak_mb(int(child)), peak_mb(pid)


def keyframe_seconds(video: Path) -> int:
    """How many of a file's seconds hold a keyframe."""
    from storage.records import Sampling
    from workers.footage.probe import probe
    from workers.footage.sample import Grid

    info, index = probe(str(video))
    return len(set(Grid.of(info, Sampling()).buckets(index.pts[index.keyframe]).tolist()))


def compare(name: str, video: Path, rounds: int) -> None:
    """Print the table of one file: of each way the round that took least."""
    apart = "ours, every frame", "ours, one task", "ours, index"
    ways = [way for way in WAYS if way not in apart]
    taken = [{way: measure(way, video) for way in ways} for _ in range(rounds)]
    rows = {way: min((rows[way] for rows in taken), key=itemgetter("cpu_s")) for way in ways}
    slowest, everything = rows["tutorial loop"]["cpu_s"], rows["PyAV, every frame"]["cpu_s"]
    print(f"{name}: {keyframe_seconds(video)} seconds hold a keyframe")
    print(f"{name:24}{'CPU s':>8}{'frames':>8}{'peak MB':>9}{'x tutorial':>12}{'x PyAV':>8}")
    for way, row in rows.items():
        ratios = f"{slowest / row['cpu_s']:12.1f}{everything / row['cpu_s']:8.1f}"
        print(f"{way:24}{row['cpu_s']:8.2f}{row['frames']:8.0f}{row['peak_mb']:9.0f}{ratios}")


if __name__ == "__main__":
    main()
