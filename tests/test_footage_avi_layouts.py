"""AVI as recorders lay it out: whole ones are had as they are, and of damaged ones what is left."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from test_footage_avi import film, read, slots

LAYOUTS = (
    "common",
    "from the beginning",
    "records",
    "aligned",
    "zeros",
    "words",
    "odd",
    "db",
    "own",
)
"""Offsets in the index counted from the beginning of the file; pictures in lists with their sound;
chunks at multiples of 512 bytes by JUNK, or by bare zeros; at those of 4 bytes by zeros; chunks of
odd sizes that are not filled up; pictures named `00db`; chunks that only their recorder knows."""


class Laid(NamedTuple):
    """A file, and where in it the chunks of pictures lie."""

    data: bytes
    begins: list[int]


def with_sound(path: Path) -> Path:
    """Beside each picture of an AVI, as much sound as it lasts."""
    out = path.with_name(f"sound-{path.name}")
    with av.open(str(path)) as container, av.open(str(out), "w") as target:
        source = container.streams.video[0]
        video = target.add_stream_from_template(source)
        sound = target.add_stream("pcm_s16le", rate=6000, layout="mono")
        noise = np.random.default_rng(3)
        for number, packet in enumerate(container.demux(source)):
            if packet.dts is None:
                continue
            packet.stream = video
            target.mux(packet)
            samples = noise.integers(-9000, 9000, (1, 200), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.rate, frame.pts = 6000, number * 200
            for coded in sound.encode(frame):
                target.mux(coded)
    return out


def chunks_within(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks that a plain AVI holds."""
    at = data.index(b"movi") + 4
    while data[at : at + 4] != b"idx1":
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def laid_out(path: Path, layout: str, *, indexed: bool) -> Laid:
    """The same pictures and sound in another layout, with an index or without."""
    data = path.read_bytes()
    head = data[: data.index(b"movi") - 8]
    keys = {}
    with av.open(str(path)) as container:
        for number, entry in enumerate(container.streams.video[0].index_entries):
            keys[number] = entry.is_keyframe
    base = len(head) + 8
    out, entries, begins, record = bytearray(b"movi"), b"", [], 0
    for told, content in chunks_within(data):
        picture = told == b"00dc"
        name = b"00db" if picture and layout == "db" else told
        if picture and layout == "records":
            if record:
                out[record + 4 : record + 8] = struct.pack("<I", len(out) - record - 8)
            record = len(out)
            out += b"LIST----rec "
        if layout == "aligned":
            out += b"JUNK" + struct.pack("<I", rest := -(base + len(out) + 8) % 512) + bytes(rest)
        if layout in ("zeros", "words"):
            out += bytes(-(base + len(out)) % (512 if layout == "zeros" else 4))
        if layout == "own" and picture and len(begins) % 7 == 3:
            out += b"gps0" + struct.pack("<I", 6) + b"52 N 4"
        offset = len(out) + (base if layout == "from the beginning" else 0)
        flags = 16 * (keys[len(begins)] if picture else True)
        entries += struct.pack("<4sIII", name, flags, offset, len(content))
        begins += [base + len(out)] * picture
        out += name + struct.pack("<I", len(content)) + content
        out += bytes(len(content) % 2 * (layout != "odd"))
    if record:
        out[record + 4 : record + 8] = struct.pack("<I", len(out) - record - 8)
    movie = b"LIST" + struct.pack("<I", len(out)) + out
    index = b"idx1" + struct.pack("<I", len(entries)) + entries
    rest = head[8:] + movie + (index if indexed else b"")
    return Laid(b"RIFF" + struct.pack("<I", len(rest)) + rest, begins)


@pytest.mark.parametrize("coding", ["mpeg4 with b-frames", "h264", "mjpeg"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
def test_whole_files_of_all_layouts_are_had(
    indexed: bool, layout: str, coding: str, tmp_path: Path
) -> None:
    """Every picture at its time, none damaged and none missing."""
    path = with_sound(film(tmp_path / "film.avi", coding))
    true = read(path)[1]
    assert len(true) == 120
    path.write_bytes(laid_out(path, layout, indexed=indexed).data)
    _info, samples, gaps = read(path)
    assert samples == true
    assert not gaps


@pytest.mark.parametrize("coding", ["mpeg4", "mpeg4 with b-frames", "h264", "mjpeg"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ["zeros", "cut out"])
def test_damaged_files_of_all_layouts_stand_right(
    change: str, layout: str, coding: str, tmp_path: Path
) -> None:
    """What is left stands where it stood, and what is torn or missing is a gap."""
    path = with_sound(film(tmp_path / "film.avi", coding))
    true = read(path)[1]
    data, begins = laid_out(path, layout, indexed=True)
    begin, end = ((begins[number] + begins[number + 1]) // 2 for number in (47, 52))
    path.write_bytes(data[:begin] + bytes((end - begin) * (change == "zeros")) + data[end:])
    _info, samples, gaps = read(path)
    assert not [slot for slot, picture in samples.items() if picture != true[slot]]
    # Up to the next keyframe, and what was shown before the torn one but waited for it.
    assert samples.keys() >= {*range(43), *range(54 if coding == "mjpeg" else 61, 120)}
    gone = {slot for gap in gaps for slot in range(*slots(gap))}
    assert gone == true.keys() - samples.keys() >= {*range(48, 52)}
