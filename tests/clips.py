"""Real H.264 files of known content, made where a test needs them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 40, 200),
    "white": (230, 230, 230),
    "black": (15, 15, 15),
}


def make_clip(
    path: Path,
    scenes: list[tuple[str, int]],
    *,
    fps: int = 10,
    keyframes_every: int = 10,
    options: dict[str, str] | None = None,
) -> Path:
    """Write H.264 with B-frames in which each (colour, seconds) of `scenes` follows the last;
    a bright square moves through it, so that no two frames are alike. `options` are the
    container's."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.gop_size = keyframes_every
        stream.options = {"bf": "2", "preset": "ultrafast", "crf": "18", "sc_threshold": "0"}
        at = 0
        for colour, seconds in scenes:
            for _ in range(seconds * fps):
                picture = np.full((96, 160, 3), COLOURS[colour], np.uint8)
                x = at * 3 % 140
                picture[40:56, x : x + 16] = 128
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
                at += 1
        container.mux(stream.encode())
    return path


def make_sound(path: Path, seconds: int) -> Path:
    """Write an AAC track and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for at in range(seconds * 43):
            t = (np.arange(1024) + at * 1024) / 44100
            tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)[np.newaxis]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate = 44100
            frame.pts = at * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
