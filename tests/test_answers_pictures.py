"""Annotated videos and contact sheets: frames and times of the source, labels that can be read."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from clips import make_clip
from footage_files import delayed_later, encode, frames, replaced
from PIL import Image
from rows import SECOND

from nightreel.reports.annotate import annotate
from nightreel.reports.drawing import Artist, Told
from nightreel.reports.frames import Clock, decoded_packet
from nightreel.reports.lettering import Tag, boxed, font, tag_picture, wrapped
from nightreel.reports.sheet import contact_sheet
from storage.columns import SampleColumns
from storage.records import Gap, GapKind, Prediction, SampleResult, VideoInfo
from storage.scenes import UNKNOWN, labelled_scenes
from workers.footage.probe import probe
from workers.footage.source import Source

LABELS = ("red square", "green ünïcode меч", "x" * 300)
MEDIA = Path(__file__).parents[2] / "shared" / "media"


def told(info: VideoInfo, seconds: dict[int, int], *, notice: str | None = None) -> Told:
    """What a job says: each second of the video has this label; seconds that are left out are
    gaps."""
    found, gaps = [], []
    for at in range(-(-info.duration_us // SECOND)):
        start, end = at * SECOND, min((at + 1) * SECOND, info.duration_us)
        if at not in seconds:
            gaps.append(Gap(start, end, GapKind.DAMAGED))
            continue
        best = (Prediction(seconds[at], 0.3, 0.9), Prediction((seconds[at] + 1) % 3, 0.2, 0.08))
        found.append(SampleResult(at, start, start, end, best))
    samples = SampleColumns.of(found)
    scenes = labelled_scenes(samples, gaps, LABELS)
    return Told(samples, scenes, gaps, LABELS, info.duration_us, notice)


def every(label: int, info: VideoInfo) -> dict[int, int]:
    return dict.fromkeys(range(-(-info.duration_us // SECOND)), label)


def times(path: Path) -> list[float]:
    """Seconds of each presented frame from the first one, as a player decodes them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [float(f.pts * f.time_base) for f in container.decode(stream) if f.pts is not None]
    return [round(t - found[0], 4) for t in found]


def clocked(path: Path) -> list[Fraction]:
    """The times that a clock gives a video's frames."""
    info, _ = probe(str(path))
    with Source(str(path), info.stream_index) as source:
        clock = Clock(info)
        packets = itertools.chain(source.packets(), [None])
        return [timed.t for one in packets for timed in decoded_packet(source, clock, one)]


def sound(path: Path) -> tuple[int, float, float]:
    """Packets of sound, the first time and the last, from the first picture on."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        begin = float((video.start_time or 0) * video.time_base)
        found = [
            float(p.pts * p.time_base) - begin
            for p in container.demux(container.streams.audio[0])
            if p.pts is not None
        ]
    return len(found), min(found), max(found)


def make_variable(path: Path, *, audio: str | None = None) -> Path:
    """A clip whose frames stand 1 to 9 hundredths apart, with or without a tone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 162, 98, "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        video.options = {"bf": "2", "preset": "ultrafast"}
        tone = container.add_stream(audio, rate=48_000) if audio else None
        t = 0
        for at in range(120):
            frame = av.VideoFrame.from_ndarray(np.full((98, 162, 3), at * 2, np.uint8), "rgb24")
            frame.pts, frame.time_base = t, Fraction(1, 1000)
            container.mux(video.encode(frame))
            t += 10 * (1 + at * 7 % 9)
        container.mux(video.encode(None))
        if tone is not None:
            for at in range(0, t * 48, 1024):
                wave = np.sin(np.arange(at, at + 1024) / 20)
                if audio == "aac":
                    kind, wave = "fltp", wave.astype(np.float32)[None].repeat(2, 0)
                else:
                    kind, wave = "s16", (9999 * wave).astype(np.int16).repeat(2)[None]
                heard = av.AudioFrame.from_ndarray(wave, kind, "stereo")
                heard.sample_rate, heard.pts, heard.time_base = 48_000, at, Fraction(1, 48_000)
                container.mux(tone.encode(heard))
            container.mux(tone.encode(None))
    return path


def annotated(source: Path, out: Path, **how: object) -> tuple[VideoInfo, int]:
    info, _ = probe(str(source))
    count = annotate(str(source), info, told(info, every(0, info)), out, **how)  # type: ignore[arg-type]
    return info, count


def remuxed(source: Path, out: Path) -> Path:
    """The same pictures in another container; AVI holds MPEG-4, without timestamps."""
    codec = ["mpeg4", "-q:v", "2", "-bf", "2"] if out.suffix == ".avi" else ["copy"]
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", source, "-c:v", *codec, out], check=True)
    return out


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi"])
def test_every_frame_keeps_its_time(tmp_path: Path, ending: str) -> None:
    """As many frames at the same times, from every container, at a constant rate."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 2), ("blue", 2)])
    try:
        source = clip if ending == "mp4" else remuxed(clip, tmp_path / f"clip.{ending}")
    except FileNotFoundError:
        pytest.skip("ffmpeg is missing")
    _, count = annotated(source, tmp_path / "out.mp4")
    assert count == 40
    assert times(tmp_path / "out.mp4") == pytest.approx(times(clip), abs=2e-4)


@pytest.mark.parametrize(("audio", "copied"), [(None, True), ("aac", True), ("pcm_s16le", False)])
def test_a_variable_rate_and_sound_are_kept(
    tmp_path: Path, audio: str | None, copied: bool
) -> None:
    """Frames at uneven times stay there; sound is copied packet for packet, or encoded anew over
    the same time."""
    source = make_variable(tmp_path / "vfr.mkv", audio=audio)
    annotated(source, tmp_path / "out.mp4")
    assert times(tmp_path / "out.mp4") == times(source)
    if audio is not None:
        before, after = sound(source), sound(tmp_path / "out.mp4")
        assert after[1:] == pytest.approx(before[1:], abs=0.07)
        assert not copied or abs(after[0] - before[0]) <= 1


def test_a_range_and_a_scale(tmp_path: Path) -> None:
    """A part of the video begins at 0 and keeps its distances; sides are scaled and even."""
    source = make_variable(tmp_path / "vfr.mkv", audio="aac")
    out = tmp_path / "out.mp4"
    _, count = annotated(source, out, start_us=2 * SECOND, end_us=4 * SECOND, scale=Fraction(1, 2))
    whole = [t for t in times(source) if 2 <= t < 4]
    assert count == len(whole)
    assert times(out) == pytest.approx([t - whole[0] for t in whole], abs=2e-4)
    with av.open(str(out)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (80, 48)
    _, first, last = sound(out)
    assert -0.1 < first < 0.1
    assert 1.8 < last < 2.1


def test_a_turned_video_is_written_upright(tmp_path: Path) -> None:
    """A display matrix is applied: the output is upright by itself."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 1)])
    straight = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 96 << 16, 0, 1 << 30)
    data = clip.read_bytes()
    at = data.rindex(straight, 0, data.index(b"mdia"))
    (tmp_path / "turned.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    info, _ = annotated(tmp_path / "turned.mp4", tmp_path / "out.mp4")
    assert info.rotation == 90
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height, frame.rotation) == (96, 160, 0)


def with_sound(
    path: Path,
    codec: str,
    *,
    rate: int = 48_000,
    layout: str = "stereo",
    kind: str = "s16",
    seconds: int = 1,
    onset_s: float = 0,
    late_s: float = 0,
) -> Path:
    """A clip of ten frames a second with noise from `onset_s` on, silence before it; the pictures
    begin `late_s` after the sound."""
    noise = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        video.options = {"bf": "2", "g": "10", "preset": "ultrafast"}
        track = container.add_stream(codec, rate=rate, layout=layout)
        channels = track.codec_context.layout.nb_channels
        for second in range(seconds):
            for at in range(10 * second, 10 * second + 10):
                picture = np.full((96, 160, 3), at * 9 % 256, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = at + round(10 * late_s), Fraction(1, 10)
                container.mux(video.encode(frame))
            loud = (second + np.arange(rate) / rate >= onset_s)[:, np.newaxis]
            wave = loud * noise.uniform(-0.3, 0.3, (rate, channels))
            wave = wave.reshape(1, -1) if kind == "s16" else wave.T
            wave = (wave * 32767).astype(np.int16) if kind[:3] == "s16" else wave.astype(np.float32)
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), kind, layout)
            heard.sample_rate, heard.pts = rate, second * rate
            heard.time_base = Fraction(1, rate)
            container.mux(track.encode(heard))
        container.mux(video.encode(None))
        container.mux(track.encode(None))
    return path


def loud_ms(path: Path) -> set[int]:
    """The twentieths of a second, in milliseconds from the first picture, that are mostly loud."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        begin = float((video.start_time or 0) * video.time_base)
        energy = dict[int, list[float]]()
        for frame in container.decode(audio=0):
            wave = np.abs(frame.to_ndarray().astype(np.float64))
            if not frame.format.is_planar:
                wave = wave.reshape(-1, frame.layout.nb_channels).T
            wave = wave.max(0)
            t = (
                float(frame.pts * frame.time_base)
                - begin
                + np.arange(wave.size) / frame.sample_rate
            )
            for at in np.unique(t // 0.05):
                energy.setdefault(int(at) * 50, []).extend(wave[t // 0.05 == at])
    return {at for at, wave in energy.items() if np.median(wave) > 0.03}


@pytest.mark.parametrize(
    ("codec", "kind", "ending"),
    [("aac", "fltp", "mp4"), ("aac", "fltp", "mkv"), ("ac3", "fltp", "mov"), ("mp2", "s16", "m4v")],
)
def test_joined_recordings_keep_sound_with_their_pictures(
    tmp_path: Path, codec: str, kind: str, ending: str
) -> None:
    """Where a recorder's clock begins again, sound follows the pictures, copied or encoded anew:
    what is heard from the second second of each recording on is heard there in the output."""
    one = with_sound(tmp_path / "one.ts", codec, kind=kind, seconds=2, onset_s=1)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.read_bytes() * 3)
    out = tmp_path / f"out.{ending}"
    info, count = annotated(joined, out)
    assert (info.duration_us, count) == (6 * SECOND, 60)
    assert times(out) == pytest.approx([at / 10 for at in range(60)], abs=1e-3)
    heard = loud_ms(out)
    assert heard >= {at for at in range(0, 5900, 50) if 1050 <= at % 2000 < 1900}
    assert not heard & {at for at in range(6000) if 100 <= at % 2000 < 900}


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize(
    ("codec", "kind"),
    [("libopus", "s16"), ("ac3", "fltp"), ("aac", "fltp"), ("pcm_s16le", "s16")],
)
@pytest.mark.parametrize("offset_s", [0, 1.5])
def test_sound_before_the_first_picture_is_kept(
    tmp_path: Path, offset_s: float, codec: str, kind: str, ending: str
) -> None:
    """All of it is heard, as long before the pictures as in the source; pictures keep their
    distances."""
    source = with_sound(tmp_path / "clip.mkv", codec, kind=kind, seconds=2, late_s=offset_s)
    out = tmp_path / f"out.{ending}"
    annotated(source, out)
    assert times(out) == pytest.approx([at / 10 for at in range(20)], abs=1e-3)
    before, after = loud_ms(source), loud_ms(out)
    assert min(before) == pytest.approx(-1000 * offset_s, abs=60)
    assert abs(min(after) - min(before)) <= 50
    assert abs(max(after) - max(before)) <= 50
    annotated(source, out, end_us=SECOND)
    assert len(times(out)) == 10
    assert (min(loud_ms(out)), max(loud_ms(out))) == pytest.approx(
        (min(before), min(max(before), 1000)), abs=101
    )


@pytest.mark.parametrize("encoder", ["libopus", "ac3"])
def test_the_first_packet_of_sound_is_kept(tmp_path: Path, encoder: str) -> None:
    """It begins before the first picture, by the encoder's own delay, and sounds on behind it."""
    kind = "s16" if encoder == "libopus" else "fltp"
    source = with_sound(tmp_path / "clip.mkv", encoder, kind=kind)
    for ending in ("mp4", "mkv"):
        annotated(source, tmp_path / f"out.{ending}")
        assert sound(tmp_path / f"out.{ending}") == pytest.approx(sound(source), abs=2e-3)


def test_sound_by_another_clock_is_told_and_left_out(tmp_path: Path) -> None:
    """Hours of nothing are not written for a stream whose times cannot be true."""
    source = with_sound(tmp_path / "clip.mkv", "ac3", kind="fltp", seconds=2, late_s=5000)
    lost = list[str]()
    _, count = annotated(source, tmp_path / "out.mp4", left_out=lost.append)
    assert count == 20
    assert lost == ["sound from 5000 s on before the first picture"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration is not None
        assert container.duration < 3 * SECOND


def test_a_damaged_clip_is_annotated(tmp_path: Path) -> None:
    """Frames that a decoder gives after their time, behind damage, are written in their order."""
    noise = np.random.default_rng(1).integers(0, 255, (24, 40, 3), np.uint8)
    noise = noise.repeat(4, 0).repeat(4, 1)
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        video.options = {"bf": "3", "g": "30", "preset": "fast"}
        for at in range(90):
            picture = np.roll(noise, at * 3, 1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode(None))
    data = bytearray(clip.read_bytes())
    at = len(data) * 2 // 5
    data[at : at + 6000] = np.random.default_rng(6).bytes(6000)
    clip.write_bytes(data)
    decoded = clocked(clip)
    assert any(after <= before for before, after in itertools.pairwise(decoded))
    for ending in ("mp4", "mkv"):
        _, count = annotated(clip, tmp_path / f"out.{ending}")
        written = times(tmp_path / f"out.{ending}")
        assert count == len(decoded) == len(written)
        assert written == sorted(written)
        assert written[-1] == pytest.approx(float(decoded[-1] - decoded[0]), abs=1e-3)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_dropped_from_an_avi_leave_their_time(codec: str, tmp_path: Path) -> None:
    """An AVI without timestamps, in which a recorder dropped frames, is annotated at its pace."""
    slots = [*range(10), *range(10, 60, 5), *range(60, 70)]
    path = encode(
        tmp_path / "dropped.avi",
        frames(30),
        codec=codec,
        rate=10,
        options={"bf": "2"},
        pts=slots.__getitem__,
    )
    annotated(path, tmp_path / "out.mkv")
    assert times(tmp_path / "out.mkv") == pytest.approx([at / 10 for at in slots], abs=1e-3)


def test_an_avi_whose_decoder_begins_to_delay_keeps_its_pace(tmp_path: Path) -> None:
    """Frames of an AVI that the decoder holds back longer than the first ones stand no later."""
    path = delayed_later(tmp_path / "later.avi")
    assert clocked(path) == [Fraction(at, 30) for at in range(120)]


@pytest.mark.parametrize("bframes", [0, 2])
def test_pictures_that_are_not_coded_leave_their_time(bframes: int, tmp_path: Path) -> None:
    """MPEG-4 in AVI says by a packet of a few bytes that there is no picture: the frames after it
    stand at their slots."""

    def uncoded(number: int, packet: Packet) -> Packet:
        """Kind P, the picture's own time (seconds as ones and a zero, five bits between two
        markers), and the bit that says it is not coded."""
        if number < 20 or number % 10 != 2:
            return packet
        data = bytes(packet).partition(b"\x00\x00\x01\xb6")[2]
        bits = f"{int.from_bytes(data[:4]):032b}"
        time = bits[2 : bits.index("0", 2) + 8]
        empty = int(f"01{time}00".ljust(32, "1"), 2)
        return replaced(packet, b"\x00\x00\x01\xb6" + empty.to_bytes(4))

    path = tmp_path / "not_coded.avi"
    options = {"g": "100", "bf": str(bframes)}
    encode(path, frames(90), codec="mpeg4", options=options, change=uncoded)
    found = clocked(path)
    assert len(found) < 90
    assert found[-1] == Fraction(89, 30)


def test_the_last_frames_of_an_avi_are_steady(tmp_path: Path) -> None:
    """Frames that come out of the decoder at the end follow in the step of those before them."""
    path = tmp_path / "halved.avi"
    encode(path, frames(30), codec="mpeg4", options={"bf": "2"}, pts=lambda at: 2 * at)
    assert clocked(path) == [Fraction(2 * at, 30) for at in range(30)]


@pytest.mark.parametrize(
    ("encoder", "kind", "name"),
    [
        ("libopus", "s16", "opus"),
        ("flac", "s16", "flac"),
        ("libmp3lame", "s16p", "mp3"),
        ("eac3", "fltp", "eac3"),
    ],
)
def test_every_ending_takes_every_sound(tmp_path: Path, encoder: str, kind: str, name: str) -> None:
    """Sound is copied where players of such a file expect it, and is AAC elsewhere."""
    source = with_sound(tmp_path / "clip.mkv", encoder, kind=kind, layout="mono")
    for ending in ("mp4", "m4v", "mov", "mkv"):
        lost = list[str]()
        annotated(source, tmp_path / f"out.{ending}", left_out=lost.append)
        with av.open(str(tmp_path / f"out.{ending}")) as container:
            (track,) = container.streams.audio
            encoded = ending == "mov" and name in {"opus", "flac"}
            assert track.codec_context.codec.canonical_name == ("aac" if encoded else name)
            assert track.codec_context.layout.nb_channels == 1
        assert sound(tmp_path / f"out.{ending}")[2] > 0.85
        assert not lost


@pytest.mark.parametrize(
    ("codec", "rate", "layout", "after"),
    [
        ("pcm_s16le", 192_000, "stereo", (96_000, 2)),
        ("pcm_s16le", 6_000, "mono", (7_350, 1)),
        ("pcm_mulaw", 8_000, "mono", (8_000, 1)),
        ("pcm_s16le", 48_000, "7.1", (48_000, 8)),
        ("pcm_s16le", 48_000, "3.0", (48_000, 3)),
        ("pcm_s16le", 48_000, "hexadecagonal", None),
    ],
)
def test_encoded_sound_has_the_nearest_rate_and_all_channels(
    tmp_path: Path, codec: str, rate: int, layout: str, after: tuple[int, int] | None
) -> None:
    """A rate that AAC has not becomes the nearest; no channel is mixed away, and what has too many
    is named as left out."""
    ending = "mov" if codec == "pcm_mulaw" else "mkv"
    source = with_sound(tmp_path / f"clip.{ending}", codec, rate=rate, layout=layout)
    lost = list[str]()
    annotated(source, tmp_path / "out.mp4", left_out=lost.append)
    with av.open(str(tmp_path / "out.mp4")) as container:
        found = [
            (one.rate, one.codec_context.layout.nb_channels) for one in container.streams.audio
        ]
    assert found == ([] if after is None else [after])
    assert [one[:15] for one in lost] == (["stream 1 (audio"] if after is None else [])


@pytest.mark.parametrize("encoder", ["eac3", "aac", "mp2"])
def test_damaged_sound_is_passed_over(tmp_path: Path, encoder: str) -> None:
    """What does not decode is left out, and the rest of the sound is kept."""
    kind = "s16" if encoder == "mp2" else "fltp"
    source = with_sound(tmp_path / "clip.mkv", encoder, kind=kind, seconds=3)
    with av.open(str(source)) as container:
        heads = [bytes(one)[:200] for one in container.demux(audio=0) if one.size]
    data = source.read_bytes()
    for head in heads[20:30]:
        data = data.replace(head, b"\xff" * len(head))
    source.write_bytes(data)
    for ending in ("mp4", "mkv"):
        _, count = annotated(source, tmp_path / f"out.{ending}")
        packets, first, last = sound(tmp_path / f"out.{ending}")
        assert count == 30
        assert (first < 0.1, last > 2.8, packets > 60) == (True, True, True)


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    """What is no regular file is refused as output, and stays what it is."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 1)])
    pipe = tmp_path / "out.mp4"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="a device or a pipe"):
        annotated(clip, pipe)
    assert pipe.is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def with_subtitles(clip: Path, out: Path) -> Path:
    """The clip with two tones, a line of subtitles from 1 s to 3 s, two chapters, title, date."""
    words, chapters = out.with_suffix(".srt"), out.with_suffix(".txt")
    words.write_text("1\n00:00:01,000 --> 00:00:03,000\nfirst words\n")
    chapters.write_text(
        ";FFMETADATA1\ntitle=the title\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=2000\ntitle=one\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=2000\nEND=4000\ntitle=two\n"
    )
    tones = ["-f", "lavfi", "-i", "sine=d=4", "-f", "lavfi", "-i", "sine=f=900:d=4"]
    maps = [word for at in range(4) for word in ("-map", str(at))]
    subtitles = "mov_text" if out.suffix == ".mp4" else "subrip"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", "-i", clip, *tones, "-i", words, "-i", chapters, *maps,
         "-map_metadata", "4", "-c:v", "copy", "-c:a", "aac", "-c:s", subtitles,
         "-metadata:s:a:1", "language=deu", "-metadata", "creation_time=2024-07-01T10:00:00Z",
         out],
        check=True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [("mp4", "mp4", True), ("mkv", "mkv", True), ("mkv", "mp4", False), ("mp4", "mkv", False)],
)
def test_what_is_beside_the_pictures_is_kept(
    tmp_path: Path, before: str, after: str, kept: bool
) -> None:
    """Each stream of sound, subtitles that the output can hold (else they are named), chapters,
    title, date and languages; a part has its own part of them."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 2), ("blue", 2)])
    try:
        source = with_subtitles(clip, tmp_path / f"source.{before}")
    except FileNotFoundError:
        pytest.skip("ffmpeg is missing")
    out, lost = tmp_path / f"out.{after}", list[str]()
    annotated(source, out, start_us=2 * SECOND, left_out=lost.append)
    with av.open(str(out)) as container:
        assert [one.language for one in container.streams.audio] in (["und", "deu"], [None, "deu"])
        assert container.metadata["title"] == "the title"
        if before == "mp4":
            assert container.metadata["creation_time"].startswith("2024-07-01T10:00:00")
        (chapter,) = container.chapters()
        assert chapter["metadata"]["title"] == "two"
        lines = [
            (float(p.pts * p.time_base), float(p.duration * p.time_base))
            for stream in container.streams.subtitles
            for p in container.demux(stream)
            if b"first words" in bytes(p)
        ]
    assert lines == ([pytest.approx((0, 1), abs=0.05)] if kept else [])
    assert bool(lost) is not kept
    assert all("subtitle" in one for one in lost)


def test_nothing_is_left_of_a_failed_one(tmp_path: Path) -> None:
    """No half file, under no name; a wrong ending is refused before anything is read."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 1)])

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotated(clip, tmp_path / "out.mp4", progress=stop)
    with pytest.raises(ValueError, match="ends with"):
        annotated(clip, tmp_path / "out.gif")
    with pytest.raises(OSError, match="No such file"):
        annotated(clip, tmp_path / "gone" / "out.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("background", [0, 128, 255])
def test_text_is_readable_on_any_background(background: int) -> None:
    """Letters are near white and what is around them is darker than middle grey, on black, grey
    and white."""
    info = replace(probe_like(), width=640, height=360)
    artist = Artist(told(info, every(0, info)), 640, 360)
    picture = np.full((360, 640, 3), background, np.uint8)
    box = np.asarray(artist.draw(picture, 0).convert("L"))[12:32, 40:150]
    assert box.max() > 240
    assert np.median(box) < 128


def probe_like() -> VideoInfo:
    from rows import info

    return info(10)


def test_the_moment_has_its_own_label_and_gaps_say_so() -> None:
    """The tag follows the sample that answers for the moment; a gap is named with its reason."""
    info = probe_like()
    said = told(info, {0: 0, 1: 1, 2: 2})
    assert said.tag(1_500_000) == Tag(LABELS[1], "90%", said.tag(1_000_000).colour)
    assert said.tag(500_000).colour != said.tag(1_500_000).colour
    assert said.tag(7_000_000).name == "not analysed"
    assert said.tag(7_000_000).beside == "damaged"


def test_the_strip_shows_scenes_and_the_moment() -> None:
    """Scenes lie along the bottom in their colours, a white line at the moment, gaps dark."""
    info = probe_like()
    said = told(info, {**dict.fromkeys(range(4), 0), **dict.fromkeys(range(4, 8), 1)})
    drawn = np.asarray(Artist(said, 200, 100).draw(np.zeros((100, 200, 3), np.uint8), 2 * SECOND))
    row = drawn[97]
    assert tuple(row[20]) == (0, 0x72, 0xB2)
    assert tuple(row[120]) == (0xE6, 0x9F, 0x00)
    assert tuple(row[190]) == (0x30, 0x30, 0x30)
    assert tuple(row[40]) == (255, 255, 255)


def test_long_names_are_cut_and_keep_their_confidence() -> None:
    """A tag is never wider than it may be."""
    tag = tag_picture(Tag("x" * 300, "90%", "#000000"), 20, 200)
    assert tag.width <= 200
    assert font(20).getlength("Ünïcode меч Ελλάδα") > 100


def test_characters_that_the_font_lacks_are_known() -> None:
    """Each once, in order; nothing invisible."""
    assert boxed(["snow é меч", "施工 施", "🙂\u200d x\n"]) == "施工🙂"
    assert not boxed(LABELS)


@pytest.mark.parametrize("size", [(640, 360), (204, 360), (96, 54), (64, 36)])
def test_a_notice_is_on_every_picture_and_hides_no_scene(size: tuple[int, int]) -> None:
    """What must be said of a coarse engine stands under the label, in lines that fit; the strip of
    scenes is as it is without."""
    info = probe_like()
    blank = np.full((size[1], size[0], 3), 255, np.uint8)
    plain = np.asarray(Artist(told(info, every(0, info)), *size).draw(blank, 0))
    noted = told(info, every(0, info), notice="This engine is coarse: look before you rely. " * 5)
    changed = (np.asarray(Artist(noted, *size).draw(blank, 0)) != plain).any(axis=(1, 2))
    assert changed.any()
    assert changed.nonzero()[0].max() < max(size[1] // 2, size[1] - 6)
    assert not changed[-6:].any()


def test_small_print_is_wrapped_between_words() -> None:
    """Lines are no wider than they may be; what is too much ends with an ellipsis."""
    face = font(12)
    lines = wrapped("one two three four five six seven", face, 90, 3)
    assert len(lines) == 3
    assert all(face.getlength(line) <= 90 for line in lines)
    assert " ".join(lines).startswith("one two")
    assert wrapped("one two three four five six", face, 60, 2)[-1].endswith("…")
    assert wrapped("one", face, 90, 3) == ["one"]


@pytest.mark.parametrize("ending", ["mp4", "avi"])
def test_a_contact_sheet_shows_each_scene(tmp_path: Path, ending: str) -> None:
    """One picture a scene, in order, of the scene's own frame, whether the file can be entered in
    its middle or not."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 4), ("green", 4), ("blue", 4)])
    try:
        source = clip if ending == "mp4" else remuxed(clip, tmp_path / "clip.avi")
    except FileNotFoundError:
        pytest.skip("ffmpeg is missing")
    info, _ = probe(str(source))
    said = told(info, {at: at // 4 for at in range(12)})
    assert [label for label, _ in said.scenes] == [0, 1, 2]
    sheet = contact_sheet(str(source), info, said, "clip", most=60, columns=3)
    means = [
        np.asarray(sheet)[80:180, 40 + 332 * at : 240 + 332 * at].mean((0, 1)) for at in range(3)
    ]
    assert [int(mean.argmax()) for mean in means] == [0, 1, 2]
    fewer = contact_sheet(str(source), info, said, "clip", most=2)
    assert isinstance(fewer, Image.Image)


def test_an_unknown_scene_is_shown_by_its_middle(tmp_path: Path) -> None:
    """A scene that no label leads has a picture too."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 4)])
    info, _ = probe(str(clip))
    found = [
        SampleResult(
            at, at * SECOND, at * SECOND, (at + 1) * SECOND,
            (Prediction(0, 0.3, 0.34), Prediction(1, 0.3, 0.33), Prediction(2, 0.3, 0.33)),
        )
        for at in range(4)
    ]  # fmt: skip
    samples = SampleColumns.of(found)
    scenes = labelled_scenes(samples, [], LABELS)
    assert [(label, scene.label) for label, scene in scenes] == [(UNKNOWN, "unknown")]
    sheet = contact_sheet(
        str(clip), info, Told(samples, scenes, [], LABELS, 4 * SECOND), "c", most=9
    )
    assert np.asarray(sheet)[80:150, 40:240].mean((0, 1)).argmax() == 0


@pytest.mark.skipif(not MEDIA.exists(), reason="the real clips are not here")
@pytest.mark.parametrize("name", ["nasa_two_streams.mp4", "cycling_selfie.mp4", "flower.mp4"])
def test_real_clips_keep_frames_and_times(tmp_path: Path, name: str) -> None:
    """Two streams, an odd rate, B-frames: as many frames at the same times."""
    info, count = annotated(
        MEDIA / name, tmp_path / "out.mp4", scale=Fraction(1, 4), end_us=3 * SECOND
    )
    with av.open(str(MEDIA / name)) as container:
        stream = container.streams[info.stream_index]
        found = [float(f.pts * f.time_base) for f in container.decode(stream)]
    expected = [round(t - found[0], 4) for t in found if t - found[0] < 3]
    assert count == len(expected)
    assert times(tmp_path / "out.mp4") == pytest.approx(expected, abs=2e-4)
