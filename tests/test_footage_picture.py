"""Pictures: upright, square, in the right colours, and example pictures from hostile bytes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from footage_files import Picture, encode, frames, patch, replaced, x264
from PIL import Image

from nightreel.reports.frames import Upright
from storage.records import Fit, Sampling, SamplingMode, VideoInfo
from workers.footage.decode import DecodedSample, read_range
from workers.footage.picture import Renderer, encode_jpeg, load_picture, tiles, tone_mapped
from workers.footage.plan import plan
from workers.footage.probe import probe

SIZE = 48


def first_picture(path: Path, fit: Fit = Fit.SQUASH) -> tuple[VideoInfo, Picture]:
    info, index = probe(os.fspath(path))
    task = plan(info, index, Sampling())[0]
    for sample in read_range(os.fspath(path), info, task, Sampling(), size=SIZE, fit=fit):
        assert isinstance(sample, DecodedSample)
        return info, sample.picture
    raise AssertionError("no sample")


def marked_corner() -> Picture:
    """Grey, with red in the upper left quarter."""
    picture = patch((90, 90, 90), 160, 96)
    picture[:48, :80] = (230, 20, 20)
    return picture


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_orientation_metadata_turns_the_picture_upright(
    clockwise: int, mirrored: bool, tmp_path: Path
) -> None:
    """The marked corner lands where a player shows it, in all eight orientations, and the size is
    that of the upright picture."""
    path = encode(
        tmp_path / "turned.mp4",
        [marked_corner()] * 3,
        options=x264(),
        configure=lambda stream: stream.set_display_rotation(-clockwise, hflip=mirrored),
    )
    info, picture = first_picture(path)
    assert info.rotation == clockwise
    assert (info.width, info.height) == ((96, 160) if clockwise in (90, 270) else (160, 96))
    assert any("mirrored" in warning for warning in info.warnings) == mirrored
    quarters = picture.reshape(2, SIZE // 2, 2, SIZE // 2, 3).mean(axis=(1, 3))
    redness = quarters[..., 0] - quarters[..., 1]
    upright = np.rot90(np.array([[1, 0], [0, 0]]), -clockwise // 90)
    expected = upright[:, ::-1] if mirrored else upright
    assert np.unravel_index(redness.argmax(), (2, 2)) == np.unravel_index(expected.argmax(), (2, 2))
    assert redness.max() > 150


def test_a_matrix_that_only_mirrors_upside_down_is_applied(tmp_path: Path) -> None:
    """Upside down is half a turn, mirrored."""
    path = encode(
        tmp_path / "flipped.mp4",
        [marked_corner()] * 3,
        options=x264(),
        configure=lambda stream: stream.set_display_rotation(0, vflip=True),
    )
    info, picture = first_picture(path)
    assert info.rotation == 180
    assert picture[-4, 4, 0] > 200
    assert picture[4, 4, 0] < 120


def test_an_orientation_that_changes_within_a_stream_is_followed(tmp_path: Path) -> None:
    """Pictures that say so themselves are turned a quarter anticlockwise, those before and after
    them are not."""
    # ITU-T H.264 D.1.27: a display orientation (47) that flips nothing, turns by 0x4000 of 0x10000
    # and holds for its own picture.
    message = bytes((0, 0, 0, 1, 0x06, 0x2F, 0x03, 0x08, 0x00, 0x14, 0x80))

    def change(number: int, packet: Packet) -> Packet:
        return replaced(packet, message + bytes(packet)) if 30 <= number < 60 else packet

    path = encode(
        tmp_path / "turning.mp4",
        [marked_corner()] * 90,
        options=x264(bframes=0),
        change=change,
    )
    info, index = probe(os.fspath(path))
    assert info.rotation == 0
    every_frame = Sampling(SamplingMode.EVERY_FRAME, None)
    (task,) = plan(info, index, every_frame)
    reds = []
    for sample in read_range(os.fspath(path), info, task, every_frame, size=SIZE, fit=Fit.SQUASH):
        assert isinstance(sample, DecodedSample)
        quarters = sample.picture.reshape(2, SIZE // 2, 2, SIZE // 2, 3).mean(axis=(1, 3))
        reds.append(int((quarters[..., 0] - quarters[..., 1]).argmax()))
    upper_left, lower_left = 0, 2
    assert reds == [upper_left] * 30 + [lower_left] * 30 + [upper_left] * 30


@pytest.mark.parametrize("fit", [Fit.CROP, Fit.PAD, Fit.SQUASH])
def test_pixels_that_are_not_square_are_stretched(fit: Fit, tmp_path: Path) -> None:
    """A 96x96 picture of pixels 2 by 1 is shown 192 wide: each fit treats it as that shape."""
    picture = patch((40, 40, 40), 96, 96)
    picture[:, 24:72] = (220, 220, 220)
    path = encode(tmp_path / "wide.mp4", [picture] * 2, options=x264(extra="sar=2/1"))
    info, shown = first_picture(path, fit)
    assert (info.width, info.height) == (192, 96)
    middle = shown[SIZE // 2, :, 0]
    bright = {Fit.CROP: SIZE, Fit.PAD: SIZE // 2, Fit.SQUASH: SIZE // 2}[fit]
    assert abs(int((middle > 130).sum()) - bright) <= 2
    bars = int((shown[:, SIZE // 2, 0] < 10).sum())
    assert bars == (SIZE // 2 if fit is Fit.PAD else 0)


def joined(path: Path, codec: str, options: dict[str, str], shapes: list[Fraction]) -> Path:
    """Two seconds of a grey picture with a red square in each of these shapes of pixels, one after
    the other in one stream."""
    picture = patch((90, 90, 90))
    picture[24:72, 56:104] = (230, 20, 20)
    with av.open(str(path), "w") as whole:
        stream = None
        for number, shape in enumerate(shapes):

            def configure(stream: av.VideoStream, shape: Fraction = shape) -> None:
                stream.codec_context.sample_aspect_ratio = shape

            part = encode(
                path.with_name(f"part{number}.ts"),
                [picture] * 60,
                codec=codec,
                options=options,
                configure=configure,
            )
            with av.open(str(part)) as container:
                stream = stream or whole.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.pts is not None and packet.dts is not None:
                        packet.stream = stream
                        packet.pts += number * 180_000
                        packet.dts += number * 180_000
                        whole.mux(packet)
    return path


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("ts", "mpeg2video", {"g": "12", "bf": "2", "b": "2M"}),
        ("mpg", "mpeg2video", {"g": "12", "bf": "2", "b": "2M"}),
        ("ts", "libx264", x264(gop=15)),
    ],
)
def test_pixels_that_change_their_shape_are_followed(
    suffix: str, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    """A broadcast that goes from 4:3 to 16:9 and back: each picture has its own shape, whatever
    order the tasks run in, and those beside the change too."""
    wide, narrow = Fraction(4, 3), Fraction(1)
    path = joined(tmp_path / f"film.{suffix}", codec, options, [narrow, wide, narrow])
    info, index = probe(os.fspath(path))
    assert info.sequential_reason is None
    every_frame = Sampling(SamplingMode.EVERY_FRAME, None)
    tasks = plan(info, index, every_frame, 1_000_000)
    assert len(tasks) > 2
    for sampling, cuts in ((every_frame, tasks), (Sampling(), plan(info, index, Sampling()))):
        for task in reversed(cuts):
            for sample in read_range(os.fspath(path), info, task, sampling, size=96, fit=Fit.PAD):
                assert isinstance(sample, DecodedSample)
                red = (sample.picture[..., 0].astype(int) - sample.picture[..., 1]) > 70
                across, down = red.any(0).sum(), red.any(1).sum()
                true = 4 / 3 if 2_000_000 <= sample.t_us + 1000 < 4_000_000 else 1
                assert abs(across / down - true) < 0.12, sample.t_us


@pytest.mark.parametrize("colour", [(200, 30, 40), (20, 160, 60), (30, 60, 190), (128, 128, 128)])
@pytest.mark.parametrize(
    ("matrix", "colorspace"), [("bt709", Colorspace.ITU709), ("smpte170m", Colorspace.ITU601)]
)
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_are_right_within_two_levels(
    colour: tuple[int, int, int],
    matrix: str,
    colorspace: Colorspace,
    full_range: bool,
    tmp_path: Path,
) -> None:
    """BT.601 and BT.709, limited and full range, come back as the colour that went in."""
    extra = f"colormatrix={matrix}:fullrange={'on' if full_range else 'off'}:qp=4"

    def convert(picture: Picture) -> VideoFrame:
        frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv444p",
            dst_colorspace=colorspace,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
        )
        frame.color_range = ColorRange.JPEG if full_range else ColorRange.MPEG
        return frame

    path = encode(
        tmp_path / "patch.mp4",
        [patch(colour)] * 2,
        pixel_format="yuv444p",
        options=x264(extra=extra),
        convert=convert,
    )
    _info, picture = first_picture(path)
    assert np.abs(picture.astype(int) - colour).max() <= 2


@pytest.mark.parametrize(
    ("pixel_format", "codec", "suffix", "full_range"),
    [
        ("yuyv422", "rawvideo", "avi", False),
        ("uyvy422", "rawvideo", "mov", False),
        ("yuv422p10le", "v210", "mov", False),
        ("yuv420p", "ffv1", "mkv", True),
        ("bgr24", "rawvideo", "avi", None),
        ("bgr0", "ffv1", "mkv", None),
        ("gray", "ffv1", "mkv", None),
        ("gray", "ffv1", "mkv", False),
        ("gray10le", "ffv1", "mkv", False),
        ("gray10le", "ffv1", "mkv", True),
    ],
)
def test_every_layout_of_pixels_has_its_range(
    pixel_format: str, codec: str, suffix: str, full_range: bool | None, tmp_path: Path
) -> None:
    """Packed, planar, red green blue and grey, tagged as limited or full range or not (None): the
    colour that went in, or its grey."""
    colour = (200, 30, 40)
    grey = pixel_format.startswith("gray")
    ranges = {None: ColorRange.UNSPECIFIED, False: ColorRange.MPEG, True: ColorRange.JPEG}

    def convert(picture: Picture) -> VideoFrame:
        if grey:
            luma = np.uint16(82)  # By BT.601.
            depth = 4 if pixel_format == "gray10le" else 1
            level = round(16 + luma * 219 / 255) if full_range is False else luma
            plane = np.full(picture.shape[:2], level * depth, np.uint8 if depth == 1 else np.uint16)
            frame = VideoFrame.from_ndarray(plane, format=pixel_format)
        else:
            frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format,
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.JPEG if full_range is not False else ColorRange.MPEG,
            )
        frame.color_range = ranges[full_range]
        return frame

    def configure(stream: av.VideoStream) -> None:
        stream.codec_context.color_range = ranges[full_range]

    path = encode(
        tmp_path / f"patch.{suffix}",
        [patch(colour)] * 2,
        codec=codec,
        pixel_format=pixel_format,
        convert=convert,
        configure=configure,
    )
    info, picture = first_picture(path)
    assert info.pixel_format == pixel_format
    expected = (82, 82, 82) if grey else colour
    assert np.abs(picture.astype(int) - expected).max() <= 3


def rendered(frame: VideoFrame, size: int = SIZE) -> Picture:
    return Renderer(size, Fit.SQUASH, pixel_aspect=Fraction(1)).picture(frame)


def yuv(picture: Picture, pixel_format: str, colorspace: Colorspace) -> VideoFrame:
    """The picture in limited range, by that matrix, with no tag that would say so."""
    frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format=pixel_format, dst_colorspace=colorspace, dst_color_range=ColorRange.MPEG
    )
    frame.colorspace = _UNTAGGED
    return frame


_UNTAGGED = 2
"""ITU-T H.273 table 4: an unspecified matrix."""


def test_untagged_high_definition_is_bt709() -> None:
    """From 720 lines on a picture without a tag is taken for BT.709, below for BT.601."""
    colour = (200, 30, 40)
    for height, colorspace in ((720, Colorspace.ITU709), (718, Colorspace.ITU601)):
        picture = rendered(yuv(patch(colour, 1280, height), "yuv444p", colorspace))
        assert np.abs(picture.astype(int) - colour).max() <= 2


def test_scaling_takes_in_every_pixel() -> None:
    """Lines finer than the picture become their mean; picking pixels would show black and white."""
    lined = patch((20, 20, 20), 480, 480)
    lined[:, ::2] = lined[::2] = (220, 220, 220)
    picture = rendered(yuv(lined, "yuv444p", Colorspace.ITU601)).astype(int)
    assert np.abs(picture - 170).max() <= 25


def test_every_pixel_has_a_colour_of_its_own() -> None:
    """Red and blue columns of one output pixel each stay red and blue."""
    columns = patch((200, 30, 40), 4 * SIZE, 96)
    for left in range(0, 4 * SIZE, 8):
        columns[:, left : left + 4] = (30, 60, 190)
    picture = rendered(yuv(columns, "yuv444p", Colorspace.ITU601)).astype(int)
    blueness = picture[:, 4:-4, 2] - picture[:, 4:-4, 0]
    assert (blueness[:, ::2] > 80).all()
    assert (blueness[:, 1::2] < -80).all()


def test_grey_levels_are_exact() -> None:
    """Every level of luma becomes its grey, rounded: none is darkened on the way."""
    for luma in range(16, 236, 3):
        planes = np.full((96 * 3 // 2, 160), 128, np.uint8)
        planes[:96] = luma
        picture = rendered(VideoFrame.from_ndarray(planes, format="yuv420p"))
        assert np.abs(picture - (luma - 16) * 255 / 219).max() < 1


def test_untagged_small_video_is_bt601(tmp_path: Path) -> None:
    """Without a colour matrix a picture below 720 lines is taken for BT.601, as players do."""
    path = encode(tmp_path / "plain.mp4", [patch((200, 30, 40))] * 2, options=x264())
    _info, picture = first_picture(path)
    assert np.abs(picture.astype(int) - (200, 30, 40)).max() <= 4


@pytest.mark.parametrize(
    ("transfer", "name", "signal", "level"),
    [
        ("smpte2084", "smpte2084", 0.5807, 226),  # 203 nits, diffuse white
        ("smpte2084", "smpte2084", 0.7518, 255),  # 1000 nits
        ("smpte2084", "smpte2084", 0.0, 0),
        ("arib-std-b67", "arib-std-b67", 0.75, 226),  # HLG's diffuse white
        ("bt709", "bt709", 0.5, 128),
    ],
)
def test_high_dynamic_range_is_tone_mapped(
    transfer: str, name: str, signal: float, level: int, tmp_path: Path
) -> None:
    """A 10-bit PQ or HLG grey becomes the sRGB grey of the documented curve; BT.709 stays."""
    luma = round(64 + 876 * signal)

    def convert(_picture: Picture) -> VideoFrame:
        planes = np.full((96 * 3 // 2, 160), 512, np.uint16)
        planes[:96] = luma
        return VideoFrame.from_ndarray(planes, format="yuv420p10le")

    colours = f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    path = encode(
        tmp_path / "high.mp4",
        [patch((0, 0, 0))] * 12,  # With two frames x265 makes up a timestamp now and then.
        codec="libx265",
        pixel_format="yuv420p10le",
        options={
            "preset": "ultrafast",
            "crf": "4",
            "x265-params": f"{colours}:log-level=none:pools=1:frame-threads=1",
        },
        convert=convert,
    )
    info, picture = first_picture(path)
    assert (info.bit_depth, info.transfer) == (10, name)
    assert np.abs(picture.astype(int) - level).max() <= 4


@pytest.mark.parametrize("transfer", [16, 18])
@pytest.mark.parametrize("height", [96, 720])
@pytest.mark.parametrize("interlaced", [False, True])
def test_untagged_high_dynamic_range_is_bt2020(
    transfer: int, height: int, interlaced: bool
) -> None:
    """PQ and HLG without a matrix are shown as with BT.2020's, however high; one that is tagged
    stays."""
    shown = {}
    for matrix in (_UNTAGGED, 9, 1):
        picture = patch((130, 90, 100), 160, height)
        frame = yuv(picture, "yuv444p10le", Colorspace.BT2020)
        frame.colorspace, frame.color_trc, frame.pts = matrix, transfer, 0
        for renderer in (
            Renderer(SIZE, Fit.SQUASH, pixel_aspect=Fraction(1), interlaced=interlaced),
            Upright(SIZE, SIZE),
        ):
            shown[matrix, type(renderer)] = renderer.picture(frame)
    for kind in (Renderer, Upright):
        assert np.array_equal(shown[_UNTAGGED, kind], shown[9, kind])
        assert not np.array_equal(shown[_UNTAGGED, kind], shown[1, kind])


def test_tone_mapping_keeps_the_order_of_brightness() -> None:
    """More signal is never darker, and all levels stay in range."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    picture = np.repeat(ramp[None, :, None], 3, axis=2)
    for transfer in (16, 18):
        mapped = tone_mapped(picture, transfer)[0, :, 0].astype(int)
        assert (np.diff(mapped) >= 0).all()
        assert (mapped[0], mapped[-1]) == (0, 255)


def test_interlaced_frames_are_deinterlaced(tmp_path: Path) -> None:
    """Two fields of different moments are not mixed: one of them is shown."""
    combed = patch((16, 16, 16))
    combed[::2] = (235, 235, 235)

    def configure(stream: av.VideoStream) -> None:
        stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct
        stream.codec_context.flags |= av.codec.context.Flags.interlaced_me

    path = encode(
        tmp_path / "fields.mpg",
        [combed] * 10,
        codec="mpeg2video",
        rate=25,
        options={"g": "5", "qmin": "1", "qmax": "2", "b": "20M"},
        configure=configure,
    )
    info, picture = first_picture(path)
    assert info.interlaced
    assert abs(picture.mean() - 128) > 60


_LAYOUTS = {
    "yuv420p": ("u1", 8, ("y", "u", "v")),
    "nv12": ("u1", 8, ("y", "uv")),
    "uyvy422": ("u1", 8, ("uyvy",)),
    "yuva444p10le": ("<u2", 10, ("y", "u", "v", "a")),
    "yuv422p10be": (">u2", 10, ("y", "u", "v")),
    "gray": ("u1", 8, ("y",)),
    "gray10le": ("<u2", 10, ("y",)),
}
"""Layouts of pixels: type of a level, bits, and which levels follow one another in each plane."""


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("full_range", [False, True, None])
@pytest.mark.parametrize(
    ("matrix", "red", "blue"),
    [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (9, 0.2627, 0.0593), (2, 0.299, 0.114)],
)
def test_interlaced_pictures_keep_their_colours(
    layout: str, full_range: bool | None, matrix: int, red: float, blue: float
) -> None:
    """By ITU-T H.273, equations 38 to 40, with a tag or without, in layouts that the filter of
    fields takes and in those that are converted for it."""
    colour = (200, 30, 40)
    kind, bits, planes = _LAYOUTS[layout]
    grey = layout.startswith("gray")
    luma = (red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]) / 255
    chroma = (colour[2] / 255 - luma) / (2 - 2 * blue), (colour[0] / 255 - luma) / (2 - 2 * red)
    full = full_range or (full_range is None and grey)
    top, scale = 2**bits - 1, 2 ** (bits - 8)
    low, high, spread = (0, top, top) if full else (16 * scale, 235 * scale, 224 * scale)
    levels = {"y": low + luma * (high - low), "a": top}
    levels |= {name: 128 * scale + part * spread for name, part in zip("uv", chroma, strict=True)}
    frame = VideoFrame(160, 96, layout)
    for plane, names in zip(frame.planes, planes, strict=True):
        row = np.array([round(levels[name]) for name in names], kind).tobytes()
        plane.update(row * (plane.buffer_size // len(row)))
    frame.colorspace, frame.pts = matrix, 0
    tags = {None: ColorRange.UNSPECIFIED, False: ColorRange.MPEG, True: ColorRange.JPEG}
    frame.color_range = tags[full_range]
    renderer = Renderer(SIZE, Fit.SQUASH, pixel_aspect=Fraction(1), interlaced=True)
    expected = (luma * 255,) * 3 if grey else colour
    assert np.abs(renderer.picture(frame).astype(int) - expected).max() <= 3


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
@pytest.mark.parametrize("codec", ["huffyuv", "ffvhuff"])
@pytest.mark.parametrize("order", ["tt", "bb", "progressive", "0"])
def test_the_container_tells_of_fields_where_the_codec_cannot(
    codec: str, order: str, tmp_path: Path
) -> None:
    """A codec without a word for fields: deinterlaced where the container says so, never where it
    says progressive, or nothing."""
    combed = patch((16, 16, 16))
    combed[::2] = (235, 235, 235)
    path, raw = tmp_path / "fields.mkv", tmp_path / "fields.yuv"
    frame = VideoFrame.from_ndarray(combed, format="rgb24").reformat(format="yuv422p")
    raw.write_bytes(b"".join(bytes(plane) for plane in frame.planes))
    source = [
        "-f",
        "rawvideo",
        "-video_size",
        "160x96",
        "-pix_fmt",
        "yuv422p",
        "-i",
        os.fspath(raw),
    ]
    made = ["-c:v", codec, "-field_order", order, os.fspath(path)]
    subprocess.run(["ffmpeg", "-v", "error", *source, *made], check=True, stdin=subprocess.DEVNULL)
    info, picture = first_picture(path)
    assert info.interlaced == (order in ("tt", "bb"))
    assert (abs(picture.mean() - 128) > 60) == info.interlaced


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_see_all_of_a_wide_or_high_picture(turned: bool, tmp_path: Path) -> None:
    """Three squares: the first shows the left mark, the last the right one, the middle neither."""
    picture = patch((60, 60, 60), 288, 96)
    picture[:, :40], picture[:, -40:] = (230, 20, 20), (20, 20, 230)
    path = encode(
        tmp_path / "wide.mp4",
        [picture] * 2,
        options=x264(),
        configure=lambda stream: stream.set_display_rotation(-90 if turned else 0),
    )
    _info, whole = first_picture(path, Fit.TILES)
    assert whole.shape == ((3 * SIZE, SIZE, 3) if turned else (SIZE, 3 * SIZE, 3))
    squares = tiles(whole)
    assert [square.shape for square in squares] == [(SIZE, SIZE, 3)] * 3
    assert [int(square[..., 0].max() > 180) for square in squares] == [1, 0, 0]
    assert [int(square[..., 2].max() > 180) for square in squares] == [0, 0, 1]


def test_tiles_of_a_square_are_alike() -> None:
    """A picture as long as wide gives itself three times; an odd length gives three squares."""
    square = frames(1)[0][:, :96]
    assert all(np.array_equal(tile, square) for tile in tiles(square))
    assert [tile.shape for tile in tiles(frames(1)[0][:, :99])] == [(96, 96, 3)] * 3


def png(picture: Picture, **save: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", **save)
    return stream.getvalue()


def test_example_pictures_fit_like_frames() -> None:
    """Crop cuts the sides, pad adds black, squash distorts; all give the asked size."""
    picture = patch((250, 250, 250), 300, 100)
    for fit, dark in ((Fit.CROP, 0), (Fit.SQUASH, 0), (Fit.PAD, 32)):
        loaded = load_picture(png(picture), SIZE, fit)
        assert loaded.shape == (SIZE, SIZE, 3)
        assert int((loaded[:, SIZE // 2, 0] == 0).sum()) == dark


def test_example_pictures_are_turned_by_their_exif() -> None:
    """An EXIF orientation of 6 turns the marked corner to the upper right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_picture(png(marked_corner(), exif=exif), SIZE, Fit.SQUASH)
    assert loaded[4, -4, 0] > 200
    assert loaded[4, 4, 0] < 120


@pytest.mark.parametrize("data", [b"", b"no picture", png(frames(1)[0])[:200]])
def test_bytes_that_are_no_picture_are_refused_in_one_line(data: bytes) -> None:
    """Empty, foreign and cut files give a ValueError of one line."""
    with pytest.raises(ValueError, match="no picture") as caught:
        load_picture(data, SIZE, Fit.CROP)
    assert "\n" not in str(caught.value)


def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    """A small file of 20000 x 20000 pixels costs no memory."""
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    with pytest.raises(ValueError, match="pixels"):
        load_picture(stream.getvalue(), SIZE, Fit.CROP)


def test_jpeg_keeps_the_colours() -> None:
    """Encoding and decoding a smooth picture changes it by a few levels and no channel order."""
    picture = patch((200, 30, 40), SIZE, SIZE)
    image = Image.open(io.BytesIO(encode_jpeg(picture)))
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - picture).max() <= 4
    # Of quality 90 by the standard's tables: (100 - 90) * 2 percent of 16 and of 17, rounded.
    assert [table[0] for table in image.quantization.values()] == [3, 3]  # type: ignore[attr-defined]


def test_freak_shapes_become_squares() -> None:
    """A picture of 4000 x 2 pixels becomes a square like any other."""
    loaded = load_picture(png(patch((9, 99, 199), 4000, 2)), SIZE, Fit.CROP)
    assert loaded.shape == (SIZE, SIZE, 3)
    assert Fraction(int(loaded[0, 0, 2]), 199) == 1


FREAKS = """
import io
from fractions import Fraction
from pathlib import Path
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image
from storage.records import Fit
from workers.footage.picture import Renderer, load_picture

for size in ((1, 16_000), (16_000, 1)):
    grey = np.full(size, 99, np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    for fit in Fit:
        renderer = Renderer(48, fit, pixel_aspect=Fraction(1))
        shown = renderer.picture(VideoFrame.from_ndarray(grey, "gray"))
        assert load_picture(file.getvalue(), 48, fit).shape == (48, 48, 3)
        assert sorted(shown.shape) == [3, 48, 16 * 48 if fit is Fit.TILES else 48]
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_freak_shapes_cost_no_memory() -> None:
    """A frame or example picture of 16,000 pixels by one is scaled to sixteen squares at most: in
    proportion it would take half a gigabyte."""
    peak_kb = subprocess.check_output([sys.executable, "-c", FREAKS], text=True)
    assert int(peak_kb) < 200_000
