"""Planning an MP4 without reading its pictures: the same index, for a small share of the bytes."""

from __future__ import annotations

import os
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from footage_files import (
    CLIPS,
    HARD_FILES,
    MEDIA,
    VARIANTS,
    encode,
    frames,
    needs_media,
    needs_variants,
    variants,
    x264,
)

from workers.footage.index import Index, read_index
from workers.footage.probe import probe
from workers.footage.rejection import Rejected, RejectKind
from workers.footage.skim import SkimmedFile, media_extents
from workers.footage.source import Source

__all__ = ["variants"]

IO = Path("/proc/self/io")
SKIMMED = [name for name in HARD_FILES if name.endswith(".mp4") and name != "fragmented.mp4"]
DAMAGED = ["bad_corrupt_packets.mp4", "bad_garbage_middle.mp4", "bad_truncated_faststart.mp4"]


def scanned(path: Path, stream_index: int) -> Index:
    """The index by all bytes of all packets."""
    with Source(os.fspath(path), stream_index) as source:
        assert source.stream.time_base is not None
        return read_index(
            source.packets(lost=True),
            stream_index=stream_index,
            container=source.container,
            codec=source.codec,
            extradata=source.extradata,
            time_base=source.stream.time_base,
            frame_rate=Fraction(25),
            delay=lambda: 0,
            fields=lambda: False,
            limit=2**20,
            holds=source.holds,
            holes=source.holes(),
        )


def assert_same_index(path: Path) -> None:
    info, index = probe(os.fspath(path))
    full = scanned(path, info.stream_index)
    for field in fields(Index):
        mine, other = getattr(index, field.name), getattr(full, field.name)
        assert np.array_equal(mine, other), field.name


@pytest.mark.parametrize("name", SKIMMED)
def test_skimming_gives_the_index_of_the_whole_file(name: str, tmp_path: Path) -> None:
    """Made files: all fields of the index are those that reading every byte gives."""
    path = HARD_FILES[name](tmp_path / name)
    assert media_extents(os.fspath(path)) is not None
    assert_same_index(path)


@needs_media
@pytest.mark.parametrize("name", [name for name in CLIPS if name.endswith(".mp4")])
def test_skimming_real_clips_changes_nothing(name: str) -> None:
    """Real clips, several with sound: the same index, field by field."""
    assert media_extents(os.fspath(MEDIA / name)) is not None
    assert_same_index(MEDIA / name)


@needs_variants
@pytest.mark.parametrize("name", [n for n in VARIANTS + DAMAGED if n.endswith(".mp4")])
def test_skimming_hard_variants_changes_nothing(name: str, variants: Path) -> None:
    """Variants, damaged and truncated ones among them: the same index, field by field."""
    skimmed = media_extents(os.fspath(variants / name)) is not None
    assert skimmed == (name != "fragmented.mp4")
    assert_same_index(variants / name)


@pytest.mark.skipif(not IO.exists(), reason="needs /proc/self/io")
@pytest.mark.parametrize("faststart", [False, True])
def test_few_bytes_are_read(faststart: bool, tmp_path: Path) -> None:
    """Of a file of some megabytes, with its tables in front or at the end, less than a tenth is
    read; of the same packets in Matroska, all."""
    options = x264(extra="qp=1")
    whole = [picture.repeat(2, 0).repeat(2, 1) for picture in noisy(240)]
    mp4 = encode(
        tmp_path / "large.mp4",
        whole,
        options=options,
        container_options={"movflags": "+faststart"} if faststart else {},
    )
    assert mp4.stat().st_size > 5_000_000
    assert bytes_read(mp4) < mp4.stat().st_size / 10
    mkv = encode(tmp_path / "large.mkv", whole, options=options)
    assert bytes_read(mkv) >= mkv.stat().st_size
    assert np.array_equal(probe(os.fspath(mp4))[1].keyframe, probe(os.fspath(mkv))[1].keyframe)


def noisy(count: int) -> list[np.typing.NDArray[np.uint8]]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(count)]


def bytes_read(path: Path) -> int:
    """What probing a file asks of the operating system."""
    before = _asked()
    probe(os.fspath(path))
    return _asked() - before


def _asked() -> int:
    return int(IO.read_text().split()[1])


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


@pytest.mark.parametrize(
    ("content", "extents"),
    [
        (
            box(b"ftyp", b"isom") + box(b"mdat", b"123") + box(b"moov", box(b"mvhd", b"")),
            [(20, 23)],
        ),
        (box(b"moov", box(b"mvhd", b"")) + b"\0\0\0\0mdat12345", [(24, 2**61)]),
        (box(b"moov", box(b"mvhd", b"")) + b"\0\0\0\1mdat" + b"\xff" * 8, [(32, 2**64 + 15)]),
        (box(b"moov", box(b"mvhd", b"")) + b"\0\0\0\1mdat" + b"\0" * 7 + b"\x12ab", [(32, 34)]),
        (box(b"moov", box(b"mvhd", b"")), []),
        (box(b"moov", box(b"mvhd", b"") + box(b"mvex", b"")) + box(b"mdat", b"123"), None),
        (box(b"moov", box(b"mvhd", b"")) + box(b"moof", b"") + box(b"mdat", b"123"), None),
        (box(b"moov", box(b"mvhd", b"")) * 2 + box(b"mdat", b"123"), None),
        (box(b"ftyp", b"isom") + box(b"mdat", b"123"), None),
        (box(b"ftyp", b"isom") + b"\0\0\xff\xffmoov" + box(b"mvhd", b""), None),
        (box(b"ftyp", b"isom") + b"\0\0\0\2moov" + box(b"mvhd", b""), None),
        (box(b"ftyp", b"isom") + b"\0\0\0\1moov" + bytes(8), None),
        (box(b"free", b"") * 5000 + box(b"moov", box(b"mvhd", b"")), None),
        (b"RIFF" + bytes(40), None),
        (b"", None),
    ],
)
def test_media_data_are_found_where_tables_are_whole(
    content: bytes, extents: list[tuple[int, int]] | None, tmp_path: Path
) -> None:
    """Boxes of 32 and 64 bits, open ends and lies: extents for what has one whole `moov` box."""
    path = tmp_path / "boxes"
    path.write_bytes(content)
    assert media_extents(os.fspath(path)) == extents


def test_a_skimmed_file_gives_zeros_for_what_is_skipped(tmp_path: Path) -> None:
    """Every read is a piece of the file with its media data blanked, but for the kept extents."""
    data = bytes(range(1, 251))
    path = tmp_path / "data"
    path.write_bytes(data)
    expected = bytearray(data)
    for start, end in ((20, 60), (80, 100), (105, 200)):
        expected[start:end] = bytes(end - start)
    file = SkimmedFile(os.fspath(path))
    try:
        assert file.read(300) == data
        file.skip([(20, 100), (105, 200)], but=[(60, 80)])
        for start in range(0, 260, 7):
            for count in (0, 1, 13, 90, 300):
                assert file.seek(start) == file.tell() == start
                assert file.read(count) == expected[start : start + count]
        assert file.seek(-10, os.SEEK_END) == 240
        assert file.seek(4, os.SEEK_CUR) == 244
        with pytest.raises(ValueError, match="beginning"):
            file.seek(-1)
    finally:
        file.close()


def test_storage_that_fails_while_skimming_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the operating system in the middle of the packets: one line, of its own kind."""
    path = HARD_FILES["long_gop.mp4"](tmp_path / "video.mp4")

    def skip_and_fail(file: SkimmedFile, *_extents: object, **_but: object) -> None:
        file.close()

    monkeypatch.setattr(SkimmedFile, "skip", skip_and_fail)
    monkeypatch.setattr("workers.footage.source.BUFFER_BYTES", 4096)
    with pytest.raises(Rejected) as caught:
        probe(os.fspath(path))
    assert caught.value.kind == RejectKind.UNREADABLE
    assert str(caught.value).isprintable()


def test_kept_extents_beyond_the_end_are_no_error(tmp_path: Path) -> None:
    """A hostile index names extents that the file does not have: reads end where the file does."""
    path = encode(tmp_path / "video.mp4", frames(3), options=x264())
    size = path.stat().st_size
    file = SkimmedFile(os.fspath(path))
    try:
        file.skip([(50, size)], but=[(40, size + 100), (size + 50, size + 60), (9, 3)])
        file.seek(size - 4)
        assert len(file.read(100)) == 4
        assert file.read(100) == b""
        file.seek(size + 55)
        assert file.read(100) == b""
    finally:
        file.close()
