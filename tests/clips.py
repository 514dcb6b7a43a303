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
    path: Path, scenes: list[tuple[str, int]], *, fps: int = 10, keyframes_every: int = 10
) -> Path:
    """Write H.264 with B-frames in which each (colour, seconds) of `scenes` follows the last;
    a bright square moves through it, so that no two frames are alike."""
    with av.open(str(path), "w") as container:
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
