"""Probing: what is refused and why, which stream is chosen, what people are told."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from footage_files import HARD_FILES, announcing, edited, encode, frames, scenery, x264
from PIL import Image

from storage.records import Fit, Sampling, SamplingMode
from workers.footage.clock import Unwrapper
from workers.footage.decode import DecodedSample, read_range
from workers.footage.plan import plan
from workers.footage.probe import Rejected, probe
from workers.footage.rejection import RejectKind, rejection
from workers.footage.source import Source
from workers.footage.trial import Landmarks


def refused(path: str | Path) -> Rejected:
    """The refusal of a file, whose text must be one line."""
    with pytest.raises(Rejected) as caught:
        probe(os.fspath(path))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) > 20
    return caught.value


def with_sound(path: Path, *, seconds: int, pictures: int, cover: bool = False) -> Path:
    """A file with sound, and with a video stream where it has pictures."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16_000)
        if pictures:
            video = container.add_stream("libx264", rate=30, options=x264())
            video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        if cover:
            still = container.add_stream("mjpeg", rate=1)
            still.width, still.height, still.pix_fmt = 640, 480, "yuvj420p"
            still.disposition = av.stream.Disposition.attached_pic
        for number in range(seconds * 10):
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1600), np.float32), format="fltp", layout="mono"
            )
            silence.rate, silence.pts = 16_000, number * 1600
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        if pictures:
            for number, picture in enumerate(frames(pictures)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 30)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if cover:
            frame = av.VideoFrame.from_ndarray(np.zeros((480, 640, 3), np.uint8), format="rgb24")
            container.mux(still.encode(frame.reformat(format="yuvj420p")))
            container.mux(still.encode(None))
    return path


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", RejectKind.EMPTY),
        (b"this is not a video\n", RejectKind.NOT_A_VIDEO),
        (b"\0" * 5000, RejectKind.NOT_A_VIDEO),
        (b"#EXTM3U\n#EXTINF:5,\nreal.ts\n#EXT-X-ENDLIST\n", RejectKind.FORBIDDEN_FORMAT),
        (b"\xef\xbb\xbf#EXTM3U\nreal.ts\n", RejectKind.FORBIDDEN_FORMAT),
        (b"ffconcat version 1.0\nfile real.ts\n", RejectKind.FORBIDDEN_FORMAT),
        (
            b'<?xml version="1.0"?>\n<MPD><BaseURL>real.ts</BaseURL></MPD>',
            RejectKind.FORBIDDEN_FORMAT,
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "txt"])
def test_what_is_no_video_is_refused_with_its_kind(
    content: bytes, kind: RejectKind, suffix: str, tmp_path: Path
) -> None:
    """Nothing, text, zeros and lists of other files, which stand beside them and would open."""
    HARD_FILES["open_gop.ts"](tmp_path / "real.ts")
    path = tmp_path / f"hostile.{suffix}"
    path.write_bytes(content)
    assert refused(path).kind == kind


@pytest.mark.parametrize("name", ["a.mp4", "a.srt", "a.sdp"])
def test_formats_that_hold_no_video_are_not_opened_at_all(name: str, tmp_path: Path) -> None:
    """A picture, a subtitle, an address to listen at: FFmpeg would open each, and may not."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    contents = {
        "a.mp4": picture.getvalue(),
        "a.srt": b"1\n00:00:00,000 --> 00:00:01,000\nHello\n\n",
        "a.sdp": b"\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    }
    path = tmp_path / name
    path.write_bytes(contents[name])
    assert refused(path).kind == RejectKind.FORBIDDEN_FORMAT


def test_a_playlist_is_refused_without_opening_what_it_names(tmp_path: Path) -> None:
    """A playlist that names a pipe, behind a head no simple look recognises, does not block."""
    os.mkfifo(tmp_path / "pipe.ts")
    for name in ("list.m3u8", "list.mp4"):
        path = tmp_path / name
        path.write_text("\n#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:5,\npipe.ts\n#EXT-X-ENDLIST\n")
        refused(path)


def test_paths_that_are_no_regular_files_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder and a pipe, which must not be waited for."""
    assert refused(tmp_path / "missing.mp4").kind == RejectKind.MISSING
    assert refused(tmp_path).kind == RejectKind.NOT_A_FILE
    os.mkfifo(tmp_path / "pipe.mp4")
    assert refused(tmp_path / "pipe.mp4").kind == RejectKind.NOT_A_FILE
    assert refused("/a\0b.mp4").kind == RejectKind.UNREADABLE


@pytest.mark.parametrize(
    "name", ["concat:a|b.mp4", "-", "http:x.mp4", "%03d.mp4", "pipe:0", "new\nline.mp4", "ü 影.mp4"]
)
def test_names_that_look_like_addresses_are_names_of_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is never read as a protocol, a pattern or an option, relative or absolute."""
    encode(tmp_path / "plain.mp4", frames(3), options=x264()).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert probe(name)[0].frame_count == 3
    assert probe(os.fspath(tmp_path / name))[0].frame_count == 3


def test_names_that_are_not_utf8_open(tmp_path: Path) -> None:
    """A Latin-1 name from an old disk opens, and its refusal is printable."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    encode(tmp_path / "plain.mp4", frames(3), options=x264())
    (tmp_path / "plain.mp4").rename(path)
    assert probe(path)[0].frame_count == 3
    Path(path).write_bytes(b"no video")
    assert "caf\\xe9" in str(refused(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    """No permission is told apart from damage."""
    path = encode(tmp_path / "closed.mp4", frames(3), options=x264())
    path.chmod(0)
    assert refused(path).kind == RejectKind.NO_PERMISSION


def test_every_error_of_the_system_becomes_a_refusal() -> None:
    """Errors of the system and of FFmpeg have a kind and one printable line."""
    errors = {
        PermissionError(13, "denied"): RejectKind.NO_PERMISSION,
        FileNotFoundError(2, "gone"): RejectKind.MISSING,
        OSError(5, "io"): RejectKind.UNREADABLE,
        ValueError("embedded null"): RejectKind.UNREADABLE,
        av.error.MemoryError(12, "no memory"): RejectKind.TOO_LARGE,
        av.error.InvalidDataError(1094995529, "bad"): RejectKind.NOT_A_VIDEO,
        av.error.ExitError(1414092869, "timeout"): RejectKind.UNREADABLE,
    }
    for error, kind in errors.items():
        assert rejection("/a\nb.mp4", error).kind == kind
        assert str(rejection("/a\nb.mp4", error)).isprintable()


def test_only_the_system_speaks_of_permissions() -> None:
    """What FFmpeg's demuxers mean by -1 is damage; other errors of the name are what they say."""
    for error, kind in {
        PermissionError(1, "not permitted"): RejectKind.NO_PERMISSION,
        av.error.PermissionError(13, "denied"): RejectKind.NO_PERMISSION,
        av.error.PermissionError(1, "not permitted"): RejectKind.NOT_A_VIDEO,
    }.items():
        assert rejection("/a.gxf", error).kind == kind


def test_a_demuxer_that_understands_the_end_not_refuses_no_file(tmp_path: Path) -> None:
    """A GXF of motion JPEG, at the end of which FFmpeg answers EPERM, gives all its frames."""
    pictures = [scenery(number, 720, 576) for number in range(10)]
    path = tmp_path / "tape.gxf"
    encode(path, pictures, codec="mjpeg", pixel_format="yuvj420p", rate=25)
    with av.open(str(path)) as container, pytest.raises(av.error.PermissionError):
        list(container.demux(video=0))
    assert probe(os.fspath(path))[0].frame_count == 10


def test_a_packet_of_absurd_size_ends_the_file_and_refuses_it_not(tmp_path: Path) -> None:
    """An IVF with one damaged frame header: the frames before it are had, the rest is lacking."""
    options = {"g": "30", "deadline": "realtime", "cpu-used": "8"}
    path = encode(tmp_path / "film.ivf", frames(90), codec="libvpx", options=options)
    data = bytearray(path.read_bytes())
    at = 32
    for _ in range(40):
        at += 12 + int.from_bytes(data[at : at + 4], "little")
    data[at : at + 4] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(data)
    info, index = probe(os.fspath(path))
    assert (info.frame_count, info.indexed_us // 10_000) == (40, 133)
    assert (info.duration_us, info.header_us) == (3_000_000, 3_000_000)
    assert any("1 damaged packets" in warning for warning in info.warnings)
    sampling = Sampling(SamplingMode.EVERY_FRAME, None)
    results = [
        result
        for task in plan(info, index, sampling)
        for result in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
    ]
    assert sum(isinstance(result, DecodedSample) for result in results) == 40
    assert results[-1].end_us == 3_000_000


def test_sound_and_covers_are_no_video(tmp_path: Path) -> None:
    """A file with sound only, or with sound and a cover picture, is refused."""
    path = with_sound(tmp_path / "sound.m4a", seconds=2, pictures=0)
    assert refused(path).kind == RejectKind.NO_VIDEO_STREAM
    path = with_sound(tmp_path / "cover.mp4", seconds=2, pictures=0, cover=True)
    assert refused(path).kind == RejectKind.NO_VIDEO_STREAM


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cover_is_never_chosen_over_the_video(suffix: str, tmp_path: Path) -> None:
    """The cover is larger than the video, and still the video is analysed."""
    path = with_sound(tmp_path / f"film.{suffix}", seconds=2, pictures=60, cover=suffix == "mp4")
    info, _index = probe(os.fspath(path))
    assert (info.codec, info.stream_reason) == ("h264", "only")


Stream = tuple[int, int, bool]
"""Width and height of a video stream, and whether it is marked as default."""


def with_streams(path: Path, streams: list[Stream]) -> Path:
    """A Matroska file with these video streams, of 30 frames each."""
    with av.open(str(path), "w", options={"default_mode": "passthrough"}) as container:
        added = []
        for width, height, default in streams:
            stream = container.add_stream("libx264", rate=30, options=x264())
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = av.stream.Disposition(1 if default else 0)
            added.append(stream)
        for number, picture in enumerate(frames(30)):
            for stream in added:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(stream.width, stream.height, "yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 30)
                container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("streams", "index", "reason"),
    [
        ([(320, 180, False), (160, 90, True)], 1, "default"),
        ([(160, 90, True), (320, 180, False)], 0, "default"),
        ([(160, 90, False), (320, 180, False)], 1, "largest"),
        ([(160, 90, True), (320, 180, True), (640, 360, False)], 1, "largest"),
        ([(320, 180, True), (320, 180, True)], 0, "largest"),
        ([(160, 90, False)], 0, "only"),
    ],
)
def test_the_default_stream_is_analysed_else_the_largest(
    streams: list[Stream], index: int, reason: str, tmp_path: Path
) -> None:
    """The one stream marked as default, however small; else the largest of those marked, or of
    all; of equals the first. The plan tells which and why."""
    info, _index = probe(os.fspath(with_streams(tmp_path / "streams.mkv", streams)))
    assert (info.stream_index, info.stream_reason) == (index, reason)
    assert (info.width, info.height) == streams[index][:2]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "ts", "asf"])
def test_sound_that_outlasts_the_picture_is_no_truncation(suffix: str, tmp_path: Path) -> None:
    """Five seconds of sound over two of picture: the video lasts two seconds, without a gap."""
    path = with_sound(tmp_path / f"long_sound.{suffix}", seconds=5, pictures=60)
    info, _index = probe(os.fspath(path))
    assert info.duration_us == info.indexed_us
    assert 1_990_000 <= info.duration_us <= 2_010_000


@pytest.mark.parametrize("percent", [55, 85])
@pytest.mark.parametrize("suffix", ["mkv", "flv", "mp4", "avi", "wmv"])
def test_a_cut_file_lasts_what_its_header_says(suffix: str, percent: int, tmp_path: Path) -> None:
    """Of a file that is cut the duration is the header's, and the warning says what is lacking."""
    options = {"movflags": "+faststart"} if suffix == "mp4" else {}
    codec = {"avi": "mpeg4", "wmv": "wmv2"}.get(suffix, "libx264")
    coding = {"avi": {"bf": "2"}, "wmv": {"g": "30"}}.get(suffix, x264())
    path = tmp_path / f"cut.{suffix}"
    encode(path, frames(240), codec=codec, options=coding, container_options=options)
    os.truncate(path, path.stat().st_size * percent // 100)
    info, _index = probe(os.fspath(path))
    assert 7_900_000 <= info.duration_us <= 8_100_000
    assert info.indexed_us < 7_500_000
    assert any("truncated" in warning for warning in info.warnings)


def test_a_cut_file_whose_clock_strayed_before_lasts_what_its_header_says(tmp_path: Path) -> None:
    """One damaged timestamp of a Matroska cluster does not hide that the end is missing."""
    limit = {"cluster_time_limit": "1000"}
    coding = x264(bframes=0)
    path = tmp_path / "cut.mkv"
    encode(path, frames(240), options=coding, container_options=limit)
    data = bytearray(path.read_bytes())
    starts = [found.start() for found in re.finditer(rb"\x1f\x43\xb6\x75", data)]
    assert len(starts) > 6
    at = data.index(b"\xe7\x82", starts[3], starts[4]) + 2
    data[at : at + 2] = (100).to_bytes(2)
    path.write_bytes(data[: starts[5]])
    info, index = probe(os.fspath(path))
    assert index.jumps == 2
    assert 7_900_000 <= info.duration_us <= 8_100_000
    assert info.indexed_us < 6_000_000
    assert any("truncated" in warning for warning in info.warnings)


@pytest.mark.parametrize(
    ("at", "field"), [(88, b"\3"), (64, bytes(8)), (64, b"\xff" * 8), (80, b"\xff" * 8)]
)
def test_a_header_of_asf_that_tells_no_duration_promises_none(
    at: int, field: bytes, tmp_path: Path
) -> None:
    """What was sent while it was recorded, and what is damaged, lasts as long as its pictures."""
    path = encode(tmp_path / "whole.wmv", frames(60), codec="wmv2")
    data = bytearray(path.read_bytes())
    begin = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + at
    data[begin : begin + len(field)] = field
    path.write_bytes(data)
    info, _index = probe(os.fspath(path))
    assert info.duration_us == info.indexed_us == 2_000_000
    assert not any("truncated" in warning for warning in info.warnings)


@pytest.mark.parametrize("slow", [1, 75])
def test_a_cut_mp4_lasts_what_its_tables_show(slow: int, tmp_path: Path) -> None:
    """To the frame: whatever its headers say of the duration, and if a frame lasts seconds."""
    path = tmp_path / "cut.mp4"
    encode(
        path,
        frames(60),
        options=x264(),
        pts=lambda number: number * slow,
        container_options={"movflags": "+faststart"},
    )
    whole, _index = probe(os.fspath(path))
    data = bytearray(path.read_bytes())
    for box, durations in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        at = data.index(box) + durations
        data[at : at + 4] = bytes(4)
    path.write_bytes(data[: len(data) * 97 // 100])
    info, index = probe(os.fspath(path))
    assert 0 < 60 - len(index.pts) < 6
    assert info.duration_us == whole.duration_us
    assert info.indexed_us < info.duration_us
    assert any("truncated" in warning for warning in info.warnings)


def test_enormous_pictures_are_refused(tmp_path: Path) -> None:
    """A few bytes that announce pictures of 100 megapixels are refused before one is decoded."""
    path = tmp_path / "huge.y4m"
    path.write_bytes(b"YUV4MPEG2 W10000 H10000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + b"\0" * 500)
    assert refused(path).kind == RejectKind.TOO_LARGE
    size = (30_000).to_bytes(2, "little")
    picture = b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0"
    path = tmp_path / "huge.gif"
    path.write_bytes(b"GIF89a" + size + size + b"\x80\0\0" + b"\0" * 6 + picture + b";")
    assert refused(path).kind in (RejectKind.TOO_LARGE, RejectKind.NO_FRAMES)


def test_enormous_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """Of a file above a tebibyte nothing is indexed, unless its tables stand apart from it."""
    for name in ("sparse.mkv", "sparse.mp4"):
        path = encode(tmp_path / name, frames(30), options=x264())
        try:
            os.truncate(path, 2**40 + 1)
        except OSError:
            pytest.skip("the file system holds no sparse file of a tebibyte")
    assert refused(tmp_path / "sparse.mkv").kind == RejectKind.TOO_LARGE
    assert probe(os.fspath(tmp_path / "sparse.mp4"))[0].frame_count == 30


def with_space(path: Path, codec: str) -> Path:
    """Ten seconds by a recorder that has reserved a file of 16 GB."""
    path = encode(path, frames(300), codec=codec, options={"g": "30"})
    try:
        os.truncate(path, 2**34)
    except OSError:
        pytest.skip("the file system holds no sparse file of 16 GB")
    return path


@pytest.mark.parametrize("name", ["space.avi", "space.mkv", "space.flv"])
def test_reserved_space_behind_the_frames_is_no_reason_to_refuse_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames before gigabytes of zeros, in which the search for more takes too long: all of them
    are had, without a gap, and a warning says what was not searched."""
    monkeypatch.setattr("workers.footage.source._READ_TIMEOUT_S", 0.3)
    path = with_space(tmp_path / name, "flv" if name.endswith("flv") else "mpeg4")
    info, index = probe(os.fspath(path))
    assert (info.frame_count, info.duration_us // 100_000) == (300, 100)
    assert any("MB are zeros, where reading ended" in warning for warning in info.warnings)
    for sampling in (Sampling(), Sampling(SamplingMode.EVERY_FRAME, None)):
        results = [
            result
            for task in plan(info, index, sampling)
            for result in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
        ]
        assert all(isinstance(result, DecodedSample) for result in results)
        assert len(results) == (10 if sampling.rate else 300)


@pytest.mark.parametrize("at", [-(2**32), 0, 2**32 + 12345, 2**33 - 1])
def test_a_search_that_takes_too_long_elsewhere_is_a_refusal(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where one byte of what follows is no zero: other frames may stand there."""
    monkeypatch.setattr("workers.footage.source._READ_TIMEOUT_S", 0.3)
    path = with_space(tmp_path / "holed.avi", "mpeg4")
    with path.open("r+b") as file:
        file.seek(2**33 + at)
        file.write(b"\xff")
    found = refused(path)
    assert found.kind == RejectKind.UNREADABLE
    assert "holds no video" in str(found)


PEAK_MB = """
import sys
from pathlib import Path
from workers.footage.probe import Rejected, probe
found = "a-video"
try:
    probe(sys.argv[1])
except Rejected as rejected:
    found = rejected.kind
# Of the program alone: what getrusage tells begins with the peak of whoever started it.
peak_kb = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(found, int(peak_kb) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("samples", "tracks", "kind"),
    [(80_000_000, 4, "too-large"), (30_000_000, 12, "no-frames"), (2**32 - 1, 1, "too-large")],
)
def test_tables_that_announce_what_is_not_there_take_no_memory(
    samples: int, tracks: int, kind: str, tmp_path: Path
) -> None:
    """A file of a few kilobytes that announces tables of up to 11 GB is refused within 2 GiB."""
    path = announcing(tmp_path / "announcing.mp4", samples, tracks)
    assert path.stat().st_size < 10_000
    command = [sys.executable, "-c", PEAK_MB, os.fspath(path)]
    found, peak_mb = subprocess.check_output(command, text=True).split()
    assert found == kind
    assert int(peak_mb) < 2300


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_an_enormous_cover_is_not_decoded(tmp_path: Path) -> None:
    """A picture beside the video that would take 144 MB, in a file of 100 KB, takes none."""
    cover = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(cover, "PNG")
    film, path = tmp_path / "film.mkv", tmp_path / "covered.mov"
    encode(film, frames(30), options=x264())
    with av.open(str(film)) as given, av.open(str(path), "w") as container:
        video = container.add_stream_from_template(given.streams.video[0])
        video.disposition = av.stream.Disposition.default
        still = container.add_stream("png", rate=1)
        still.width, still.height, still.pix_fmt = 160, 96, "gray"
        container.start_encoding()
        picture = Packet(cover.getvalue())
        picture.stream, picture.time_base, picture.pts, picture.dts = still, Fraction(1), 0, 0
        container.mux(picture)
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = video
                container.mux(packet)
    assert path.stat().st_size < 500_000
    command = [sys.executable, "-c", PEAK_MB, os.fspath(path)]
    found, peak_mb = subprocess.check_output(command, text=True).split()
    assert found == "a-video"
    assert int(peak_mb) < 130


def test_memory_that_runs_out_is_a_refusal_and_the_limit_ends_with_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for which the memory does not suffice is too large; the next one is probed as ever."""
    path = HARD_FILES["b_frames.mp4"](tmp_path / "film.mp4")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with monkeypatch.context() as scarce:
        scarce.setattr("workers.footage.probe.read_index", exhausting)
        assert refused(path).kind == RejectKind.TOO_LARGE
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert probe(os.fspath(path))[0].frame_count == 240


def exhausting(*_packets: object, **_facts: object) -> None:
    np.ones(2**34, np.uint8)


@pytest.mark.parametrize(("ticks_a_second", "count"), [(10_000_000, 1), (1_000_000_000, 50)])
def test_what_lasts_less_than_a_microsecond_lasts_one(
    ticks_a_second: int, count: int, tmp_path: Path
) -> None:
    """Pictures of 50 or 100 nanoseconds in all: a video of one range and one sample."""

    def momentary(_number: int, packet: Packet) -> Packet:
        packet.duration = 0
        return packet

    path = os.fspath(
        encode(
            tmp_path / "moment.mp4",
            frames(count),
            codec="mjpeg",
            pixel_format="yuvj420p",
            rate=ticks_a_second,
            container_options={"video_track_timescale": str(ticks_a_second)},
            change=momentary,
        )
    )
    info, index = probe(path)
    assert (info.duration_us, info.indexed_us, info.warnings) == (1, 1, ())
    (task,) = plan(info, index, Sampling())
    (sample,) = read_range(path, info, task, Sampling(), size=48, fit=Fit.CROP)
    assert (sample.start_us, sample.end_us) == (0, 1)


@pytest.mark.parametrize("years", [99, 101, 1_000_000])
def test_timestamps_more_than_a_century_apart_are_refused(years: int, tmp_path: Path) -> None:
    """No video lasts a hundred years; what lasts a little less is planned like any other."""
    path = encode(
        tmp_path / "far.nut",
        frames(2),
        codec="mjpeg",
        pixel_format="yuvj420p",
        rate=1,
        pts=lambda number: number * years * 31_556_952,
    )
    if years > 100:
        rejected = refused(path)
        assert rejected.kind == RejectKind.TOO_LARGE
        assert "more than a hundred years apart; convert it" in str(rejected)
        return
    info, index = probe(os.fspath(path))
    assert plan(info, index, Sampling())[-1].end_us == info.duration_us


def test_a_header_that_promises_centuries_is_not_believed(tmp_path: Path) -> None:
    """The packets tell how long a video is, and no gap of ages follows it."""
    path = encode(tmp_path / "film.flv", frames(60), options=x264())
    data, name = path.read_bytes(), b"duration\0"
    at = data.index(name) + len(name)
    path.write_bytes(data[:at] + struct.pack(">d", 1e12) + data[at + 8 :])
    info, _index = probe(os.fspath(path))
    assert (info.duration_us, info.header_us) == (2_000_000, None)


@pytest.mark.parametrize(
    ("matrix", "warned"),
    [("YCgCo", "YCgCo"), ("ICtCp", "ICtCp"), ("bt2020c", "constant luminance"), ("bt709", None)],
)
def test_colours_that_are_not_converted_are_warned_of(
    matrix: str, warned: str | None, tmp_path: Path
) -> None:
    """A matrix that the scaler does not know is named, with what to do about it."""
    path = encode(tmp_path / "film.mp4", frames(30), options=x264(extra=f"colormatrix={matrix}"))
    warnings = probe(os.fspath(path))[0].warnings
    assert len(warnings) == (warned is not None)
    assert all(str(warned) in one and "convert it to BT.709" in one for one in warnings)


def test_the_facts_are_recorded(tmp_path: Path) -> None:
    """Size, rate, counts and times come from the packets and the first picture."""
    path = HARD_FILES["b_frames.mp4"](tmp_path / "facts.mp4")
    info, index = probe(os.fspath(path))
    assert (info.width, info.height, info.rotation) == (160, 96, 0)
    assert (info.codec, info.pixel_format, info.bit_depth) == ("h264", "yuv420p", 8)
    assert (info.frame_rate, info.frame_count) == (30, 240)
    assert info.duration_us == info.indexed_us == info.header_us == 8_000_000
    assert (info.sequential_reason, info.interlaced, info.warnings) == (None, False, ())
    assert len(index.cut_points()) == 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one_keyframe.mp4", "fewer than two keyframes"),
        ("intra_refresh.mp4", "not intra"),
        ("changed_headers.flv", "headers or palette of the stream change 2 times"),
        ("changed_headers.mp4", "headers or palette of the stream change 2 times"),
        ("changed_palette.avi", "headers or palette of the stream change 89 times"),
        ("several_edits.mp4", "the edit list presents several parts of the file"),
    ],
)
def test_the_reason_for_reading_in_one_piece_is_told(
    name: str, reason: str, tmp_path: Path
) -> None:
    """Files that cannot be split say why."""
    info, index = probe(os.fspath(HARD_FILES[name](tmp_path / name)))
    assert info.sequential_reason is not None
    assert reason in info.sequential_reason
    assert len(index.cut_points()) == 0


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mkv", "libx264", x264()),
        ("avi", "mpeg2video", {"g": "30", "bf": "0"}),
        ("webm", "libvpx", {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
        ("avi", "msmpeg4v2", {"g": "30"}),
        ("avi", "msmpeg4", {"g": "30"}),
        ("avi", "wmv1", {"g": "30"}),
        ("avi", "wmv2", {"g": "30"}),
        ("avi", "h263", {"g": "30"}),
        ("avi", "h263p", {"g": "30"}),
        ("avi", "ffv1", {"g": "30"}),
        ("avi", "h261", {"g": "30"}),
        ("avi", "flv1", {"g": "30"}),
        ("mov", "svq1", {"g": "30"}),
        ("avi", "zmbv", {"g": "30"}),
    ],
)
def test_a_lost_keyframe_table_is_no_invitation_to_cut(
    suffix: str, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    """A file that marks all packets as keyframes is cut at true keyframes, or not at all."""

    def mark(_number: int, packet: av.Packet) -> av.Packet:
        packet.is_keyframe = True
        return packet

    formats = {"svq1": "yuv410p", "zmbv": "bgr0"}
    path = encode(
        tmp_path / f"marked.{suffix}",
        [scenery(number, 176, 144) for number in range(90)],
        codec=codec,
        pixel_format=formats.get(codec, "yuv420p"),
        options=options,
        change=mark,
    )
    info, index = probe(os.fspath(path))
    if info.sequential_reason is None:
        assert index.keyframe.sum() <= 4
    else:
        assert "not intra" in info.sequential_reason or "too many" in info.sequential_reason


@pytest.mark.parametrize(("cut", "goes_on"), [(0.6, 1), (0.5, 0.55), (0.5, 0.75)])
def test_an_index_that_leads_astray_is_not_followed(
    cut: float, goes_on: float, tmp_path: Path
) -> None:
    """An MXF whose end, and with it the index, is gone, or that lacks a part of its middle, is read
    in one piece: after a seek other pictures would come with the timestamps sought."""
    options = {"g": "12", "bf": "2", "qscale": "5"}
    path = tmp_path / "film.mxf"
    encode(path, frames(250), codec="mpeg2video", rate=25, options=options)
    info, index = probe(os.fspath(path))
    assert (info.sequential_reason, len(index.cut_points())) == (None, 21)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)] + data[int(len(data) * goes_on) :])
    info, index = probe(os.fspath(path))
    assert "seeking leads to other frames" in (info.sequential_reason or "")
    assert len(index.cut_points()) == 0


def test_seeks_that_fail_are_not_relied_on(tmp_path: Path) -> None:
    """A trial of seeking in a file that cannot be read any more finds nothing, and is no error."""
    path = HARD_FILES["open_gop.mkv"](tmp_path / "film.mkv")
    landmarks = Landmarks()
    with Source(os.fspath(path)) as source:
        passed = list(landmarks.passing(source.packets(), source.stream.index))
    assert len(passed) == 240
    assert landmarks.are_found(os.fspath(path), 0, lambda: None)
    os.truncate(path, path.stat().st_size // 3)
    assert not landmarks.are_found(os.fspath(path), 0, lambda: None)
    path.unlink()
    assert not landmarks.are_found(os.fspath(path), 0, lambda: None)


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format", "options"),
    [
        ("mkv", "libx264", "yuv420p", x264(gop=1)),
        ("mkv", "ffv1", "yuv420p", {"g": "1"}),
        ("mkv", "vc2", "yuv420p", {"strict": "-1", "b": "20000000"}),
        ("avi", "mjpeg", "yuvj420p", {}),
        ("avi", "wmv2", "yuv420p", {"g": "1"}),
        ("mov", "png", "rgb24", {}),
        ("mov", "cfhd", "yuv422p10le", {}),
    ],
)
def test_a_file_of_nothing_but_intra_pictures_is_cut(
    suffix: str, codec: str, pixel_format: str, options: dict[str, str], tmp_path: Path
) -> None:
    """What archives and cutting rooms have marks all frames as keyframes too, and rightly so."""
    path = tmp_path / f"intra.{suffix}"
    encode(path, frames(90), codec=codec, pixel_format=pixel_format, options=options)
    info, index = probe(os.fspath(path))
    assert (info.sequential_reason, len(index.cut_points())) == (None, 90)


def test_an_edit_list_hides_its_packets(tmp_path: Path) -> None:
    """Frames before the edit's start are no samples, and a warning counts what the file keeps of
    them: those from the keyframe before it on."""
    path = encode(
        tmp_path / "edited.mp4",
        frames(150),
        options=x264(bframes=0),
        pts=lambda number: number - 40,
        container_options={"avoid_negative_ts": "disabled"},
    )
    info, _index = probe(os.fspath(path))
    assert info.frame_count == 110
    assert any("10 packets are not presented" in warning for warning in info.warnings)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("several_edits.mp4", 1.3 + 1.1 + 2.2),
        ("overlapping_edits.mp4", 7.5),
        ("late_edit.mp4", 5),
        ("long_edit.mp4", 6),
    ],
)
def test_a_video_lasts_as_long_as_its_edits_show(name: str, seconds: float, tmp_path: Path) -> None:
    """Edits that jump, overlap, come late or promise more than the media has: the duration is that
    of what is shown, to two frames, and nothing is called truncated."""
    info, index = probe(os.fspath(HARD_FILES[name](tmp_path / name)))
    assert abs(info.duration_us - seconds * 1_000_000) < 70_000
    assert info.duration_us == info.indexed_us
    assert index.jumps == 0
    assert not any("truncated" in warning for warning in info.warnings)


@pytest.mark.parametrize(
    ("edits", "seconds"),
    [
        ([(2.5, None), (5, 2.21)], 5),
        ([(1, None), (30, 2)], 6),
        ([(2.5, 0.1), (5, 2.21)], 7.5),
    ],
)
def test_edits_of_a_cut_file_last_as_long_as_its_tables_show(
    edits: list[tuple[float, float | None]], seconds: float, tmp_path: Path
) -> None:
    """A file with edits of which the end is gone: truncated, and as long as its tables show it, to
    the frames by which decoding runs ahead."""
    whole = encode(
        tmp_path / "whole.mp4",
        frames(240),
        options=x264(),
        pts=lambda number: number + 30,
        container_options={"movflags": "+faststart"},
    )
    size = whole.stat().st_size
    path = edited(whole, *edits)
    assert path.stat().st_size == size, "the pictures must not have moved"
    os.truncate(path, size * 60 // 100)
    info, _index = probe(os.fspath(path))
    assert abs(info.duration_us - seconds * 1_000_000) < 200_000
    assert info.indexed_us < info.duration_us - 1_000_000
    assert any("truncated" in warning for warning in info.warnings)


def test_headers_that_are_repeated_are_no_change(tmp_path: Path) -> None:
    """A live stream that tells its headers again and again can be split."""
    path = HARD_FILES["repeated_headers.flv"](tmp_path / "repeated.flv")
    with av.open(str(path)) as container:
        told = [packet.has_sidedata("new_extradata") for packet in container.demux(video=0)]
    assert told.count(True) == 2, "the trap must be there"
    info, index = probe(os.fspath(path))
    assert info.sequential_reason is None
    assert len(index.cut_points()) == 9


def running(container: str, clock: list[int | None]) -> tuple[list[int | None], int]:
    """Decoding timestamps in running time, at a tick of 10 ms and ten ticks a frame; and jumps."""
    unwrapper = Unwrapper(container, Fraction(1, 100))
    times = [unwrapper.times(dts, dts, 10) for dts in clock]
    assert all(pts == dts for pts, dts in times)
    return [dts for _pts, dts in times], unwrapper.jumps


def test_a_running_clock_is_made_of_clocks_that_fall_back() -> None:
    """Each fall continues where the last packet ended; missing timestamps change nothing."""
    times, jumps = running("mp4", [100, 110, None, 120, 50, 60, 5, 15])
    assert times == [100, 110, None, 120, 130, 140, 150, 160]
    assert jumps == 2


def test_what_an_edit_hides_is_no_jump_of_the_clock() -> None:
    """Hidden packets after an edit and before the next overlap what is shown: times stay as they
    are, and the cut is counted, be it the hidden or the shown packet that falls back."""
    for hidden in ({2}, {3}, {2, 3}):
        unwrapper = Unwrapper("mp4", Fraction(1, 100))
        clock = [100, 110, 120, 60, 130]
        times = [unwrapper.times(t, t, 10, hidden=n in hidden)[1] for n, t in enumerate(clock)]
        assert (times, unwrapper.cuts, unwrapper.jumps) == (clock, 1, 0)


def test_a_timestamp_that_falls_back_a_little_is_no_other_recording() -> None:
    """A tick back, as muxers round, changes nothing; a slow drift is a fall in the end."""
    assert running("mpegts", [100, 110, 109, 130]) == ([100, 110, 109, 130], 0)
    assert running("mpegts", [100, 96, 92, 88, 84])[1] == 1


def test_a_clock_that_strayed_and_is_back_goes_on() -> None:
    """One damaged timestamp of a cluster moves what lies in it and nothing else, whether it is too
    late or too early; a recording that begins anew is none."""
    late: list[int | None] = [100, 110, 2110, 2120, 140, 150]
    assert running("matroska,webm", late) == (late, 1)
    early: list[int | None] = [1000, 1010, 100, 110, 1040, 1050]
    assert running("matroska,webm", early) == ([1000, 1010, 1020, 1030, 1040, 1050], 2)
    anew: list[int | None] = [100, 110, 2110, 2120, 0, 10]
    assert running("matroska,webm", anew) == ([100, 110, 2110, 2120, 2130, 2140], 1)


def test_a_clock_that_leaps_ahead_runs_on() -> None:
    """A leap of an hour, and a damaged timestamp between two others, where packets are stamped by
    a recorder's clock; what was slow all along, or lies in a table, is as it is told."""
    clock: list[int | None] = [100, 110, 360_000, 360_010]
    assert running("mpegts", clock) == ([100, 110, 120, 130], 1)
    assert running("flv", [100, 110, 4_000_000, 130, 140]) == ([100, 110, 120, 130, 140], 2)
    assert running("matroska,webm", clock) == (clock, 0)
    slow: list[int | None] = [0, 900, 2800, 4800]
    assert running("mpegts", slow) == (slow, 0)
    unwrapper = Unwrapper("mpegts", Fraction(1, 100))
    shown = [unwrapper.times(pts, dts, 10)[0] for pts, dts in ((20, 0), (9999, 10), (30, 20))]
    assert (shown, unwrapper.jumps) == ([20, 10, 30], 1)


def after_an_hour(number: int) -> int:
    """Timestamps of two recordings of three seconds, the second an hour later."""
    return number if number < 90 else number + 30 * 3600


@pytest.mark.parametrize("suffix", ["ts", "mpg", "flv"])
def test_a_pause_of_the_clock_is_not_analysed_time(suffix: str, tmp_path: Path) -> None:
    """Two recordings whose clock leaps an hour last six seconds: each second has its sample, and
    the plan says that they were joined."""
    codec = {"codec": "mpeg2video", "options": {"g": "15"}} if suffix == "mpg" else {}
    path = encode(
        tmp_path / f"joined.{suffix}",
        frames(180),
        pts=after_an_hour,
        **({"options": x264(bframes=0)} | codec),  # type: ignore[arg-type]
    )
    info, index = probe(os.fspath(path))
    assert 5_900_000 <= info.duration_us <= 6_200_000
    assert "the clock jumps" in (info.sequential_reason or "")
    told = [warning for warning in info.warnings if "header says" in warning]
    assert (len(told) == 1 and ", the packets 6." in told[0]) or suffix == "flv"
    sampling = Sampling()
    (task,) = plan(info, index, sampling)
    results = list(read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH))
    assert all(isinstance(result, DecodedSample) for result in results)
    assert len(results) in (6, 7)
    assert all(result.end_us - result.start_us <= 1_000_000 for result in results)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_slideshow_lasts_as_long_as_it_stands(suffix: str, tmp_path: Path) -> None:
    """A picture every 20 s is no jump of a clock, and can be split."""
    path = encode(
        tmp_path / f"slides.{suffix}",
        frames(8),
        rate=1,
        pts=lambda number: number * 20,
        options=x264(gop=2, bframes=0),
    )
    info, index = probe(os.fspath(path))
    assert (info.sequential_reason, index.jumps) == (None, 0)
    assert info.duration_us >= 140_000_000


@pytest.mark.parametrize("every_stream", [False, True])
def test_streams_that_appear_in_mid_file_are_passed_over(
    every_stream: bool, tmp_path: Path
) -> None:
    """An MPEG-TS in which 200 other streams begin near its end gives all its pictures."""
    path = encode(tmp_path / "late.ts", frames(60), rate=5, options=x264(gop=5, bframes=0))
    header_of_a_pes = b"\0\0\1\xc0\0\0\x80\0\0"
    with path.open("ab") as file:
        for pid in range(0x400, 0x4C8):
            header = b"\x47" + (0x4000 | pid).to_bytes(2, "big") + b"\x10"
            file.write((header + header_of_a_pes).ljust(188, b"\xff"))
    with Source(os.fspath(path)) as source:
        assert len(list(source.packets(every_stream=every_stream))) >= 60
    assert probe(os.fspath(path))[0].frame_count == 60
