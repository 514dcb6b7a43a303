"""Files of which something is refused, or had all the same: too many packets, none, absurd sizes,
codecs without a decoder, zeros that a recorder wrote."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from footage_files import HEIGHT, WIDTH, encode, frames, replaced, x264

from storage.records import Fit, Gap, GapKind, Sampling, SamplingMode
from workers.footage.decode import DecodedSample, FootageError, read_range
from workers.footage.plan import plan
from workers.footage.probe import Rejected, RejectKind, probe

EVERY = Sampling(SamplingMode.EVERY_FRAME, None)


def refused(path: Path) -> Rejected:
    with pytest.raises(Rejected) as caught:
        probe(os.fspath(path))
    assert str(caught.value).isprintable()
    return caught.value


def read(path: Path, sampling: Sampling = EVERY) -> list[DecodedSample | Gap]:
    info, index = probe(os.fspath(path))
    return [
        result
        for task in plan(info, index, sampling)
        for result in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
    ]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_more_packets_than_a_plan_may_hold_are_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the table of an MP4, else once they were counted; as many as there may be are read."""
    path = encode(tmp_path / f"film.{suffix}", frames(60), options=x264())
    monkeypatch.setattr("workers.footage.probe.MAX_PACKETS", 60)
    assert probe(os.fspath(path))[0].frame_count == 60
    monkeypatch.setattr("workers.footage.probe.MAX_PACKETS", 59)
    rejected = refused(path)
    assert rejected.kind is RejectKind.TOO_LARGE
    assert "more than 59 packets; cut the file" in str(rejected)


def test_a_stream_without_a_packet_is_refused(tmp_path: Path) -> None:
    """Sound beside a video stream that was announced and never came."""
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        video = container.add_stream("libx264", rate=30)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.int16), format="s16", layout="mono"
        )
        silence.rate, silence.pts = 8000, 0
        container.mux(sound.encode(silence))
    rejected = refused(path)
    assert rejected.kind is RejectKind.NO_FRAMES
    assert "holds no frames; copy it again" in str(rejected)


def test_a_codec_without_a_decoder_is_refused(tmp_path: Path) -> None:
    """A name that nobody knows, in a container that does."""
    path = encode(tmp_path / "film.avi", frames(30), codec="mpeg4")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"?!?!"))
    rejected = refused(path)
    assert rejected.kind is RejectKind.UNKNOWN_CODEC
    assert "no decoder for its codec; convert it" in str(rejected)


def test_a_stream_that_is_gone_is_an_error_of_one_line(tmp_path: Path) -> None:
    """Between plan and work a file of two streams was replaced by one of one."""
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w", options={"default_mode": "passthrough"}) as container:
        streams = [container.add_stream("libx264", rate=30, options=x264()) for _ in range(2)]
        for larger, stream in enumerate(streams):
            stream.width, stream.height = WIDTH * (1 + larger), HEIGHT * (1 + larger)
            stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(frames(30)):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(stream.width, stream.height, "yuv420p")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    info, index = probe(os.fspath(path))
    assert info.stream_index == 1
    (task,) = plan(info, index, EVERY)
    encode(path, frames(30), options=x264())
    with pytest.raises(FootageError, match="stream 1 is gone; probe it again") as caught:
        list(read_range(os.fspath(path), info, task, EVERY, size=32, fit=Fit.SQUASH))
    assert not isinstance(caught.value, Rejected)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_video_of_which_nothing_decodes_is_a_gap_with_a_warning(
    suffix: str, tmp_path: Path
) -> None:
    """Its headers and packets are whole, and every picture is zeros."""
    path = encode(
        tmp_path / f"noise.{suffix}",
        frames(60),
        codec="mjpeg",
        pixel_format="yuvj420p",
        change=lambda _number, packet: replaced(packet, bytes(packet.size)),
    )
    info, _index = probe(os.fspath(path))
    assert "no picture decodes at the start of the stream" in info.warnings
    results = read(path, Sampling())
    assert [(one.start_us, one.end_us) for one in results] == [(0, 2_000_000)]
    assert isinstance(results[0], Gap)
    assert results[0].kind is GapKind.DAMAGED


@pytest.mark.parametrize("damaged", [80, 89])
def test_an_absurd_size_in_a_table_promises_nothing(damaged: int, tmp_path: Path) -> None:
    """One damaged entry of an MP4's table announces gigabytes: the file is not said to lack them,
    and all pictures before that one are had."""
    path = encode(
        tmp_path / "film.mp4",
        frames(90),
        options=x264(bframes=0),
        container_options={"movflags": "+faststart"},
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"stsz") + 16 + 4 * damaged
    data[at : at + 4] = (2**31 - 1).to_bytes(4, "big")
    path.write_bytes(data)
    info, _index = probe(os.fspath(path))
    assert not [warning for warning in info.warnings if "truncated" in warning]
    results = read(path)
    assert len(results) == info.frame_count == damaged
    assert all(isinstance(result, DecodedSample) for result in results)


ZEROS = 2**33
"""Offset in a reserved file of 16 GB at which a recorder wrote zeros."""


@pytest.mark.parametrize("ends_with", [b"", b"\xff"])
def test_zeros_that_were_written_are_read_to_their_end(
    ends_with: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the frames lie gigabytes of which megabytes were written: zeros are space, and one
    byte at their end may be another recording."""
    monkeypatch.setattr("workers.footage.source._READ_TIMEOUT_S", 0.3)
    path = encode(tmp_path / "space.mkv", frames(60), codec="mpeg4", options={"g": "30"})
    with path.open("r+b") as file:
        try:
            file.truncate(2 * ZEROS)
        except OSError:
            pytest.skip("the file system holds no sparse file of 16 GB")
        file.seek(ZEROS)
        file.write(bytes(5 * 2**20 // 2) + ends_with)
    if ends_with:
        assert refused(path).kind is RejectKind.UNREADABLE
    else:
        info, _index = probe(os.fspath(path))
        assert info.frame_count == 60
        assert any("MB are zeros, where reading ended" in warning for warning in info.warnings)
