"""From a decoded frame, or a person's example picture, to the square picture that the model reads.

The scaler goes from the coded frame straight to the target size in one pass, so a 4K frame is never
held as RGB. Rotation and fitting then work on the small picture.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from typing import cast

import av.error
import numpy as np
from av.buffer import Buffer
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageOps

from storage.records import Fit

Picture = NDArray[np.uint8]
"""Height x width x 3, red green blue."""

JPEG_QUALITY = 90
MAX_EXAMPLE_PIXELS = 100_000_000
"""Example pictures above this are refused before they are decoded."""

_LONGEST_SIDES = 16
"""A scaled picture's longer side is at most so many shorter ones: freak shapes cost no memory."""
_SCALER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
"""Bicubic as the model's own preprocessing does, with a colour for every pixel (else two share one)
by exact arithmetic (else by tables that darken by two levels)."""

_HD_HEIGHT = 720
_COLORSPACES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
"""ITU-T H.273 table 4 to the scaler's names."""
_MATRIX = struct.Struct("=ii4xii16x")
"""The four numbers of a display matrix that turn: x' = a x + c y, y' = b x + d y."""
_GLANCE = 16
"""Pixels of the sides of a picture that is made for its side data."""
_PQ, _HLG = 16, 18
"""ITU-T H.273 table 3: the transfer characteristics of high dynamic range."""


def upright_size(width: int, height: int, pixel_aspect: Fraction, rotation: int) -> tuple[int, int]:
    """Width and height of a coded picture with square pixels, turned upright."""
    shown = max(1, round(width * pixel_aspect))
    return (height, shown) if rotation in (90, 270) else (shown, height)


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """How the coded picture is turned upright: degrees clockwise (0, 90, 180 or 270), and whether
    it is then mirrored left to right. By the display matrix, as the nearest of those eight."""
    # Side data that were looked at make a frame part of a reference cycle, which keeps its
    # megabytes until the garbage collector comes by; a small copy has the same side data.
    with suppress(av.error.FFmpegError):
        # Of whatever matrix it is: the scaler refuses those that it does not know.
        matrix = Colorspace.ITU709
        frame = frame.reformat(_GLANCE, _GLANCE, "gray", src_colorspace=matrix, threads=1)
    side_data = cast(Mapping[Type, Buffer], frame.side_data)
    if Type.DISPLAYMATRIX not in side_data:
        return 0, False
    data = bytes(side_data[Type.DISPLAYMATRIX])
    if len(data) < _MATRIX.size:
        return 0, False
    a, b, c, d = _MATRIX.unpack_from(data)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, c = -a, -c
    if abs(b) + abs(c) > abs(a) + abs(d):
        return (90 if c < 0 else 270), mirrored
    return (180 if a < 0 else 0), mirrored


class Renderer:
    """Makes pictures of one video's frames; sizes and formats may change from frame to frame."""

    def __init__(
        self, size: int, fit: Fit, *, pixel_aspect: Fraction, interlaced: bool = False
    ) -> None:
        """`interlaced`: all frames are, whether they say so or not."""
        self.pixel_aspect = pixel_aspect
        """The width of a pixel by its height; it may be set from frame to frame."""
        self._size = size
        self._fit = fit
        self._interlaced = interlaced
        self._scaler = VideoReformatter()
        self._turn: float | None = None
        self._upright = (0, False)

    def _orientation(self, frame: VideoFrame) -> tuple[int, bool]:
        # Looking costs a pass over the whole picture.
        if frame.rotation != self._turn:
            self._turn, self._upright = frame.rotation, orientation(frame)
        return self._upright

    def picture(self, frame: VideoFrame) -> Picture:
        """The frame as a size x size picture: upright, square pixels, full-range RGB in sRGB.

        With the fit `tiles` only the shorter side is `size`, and `tiles` cuts the squares. Raises
        av.error.FFmpegError for a frame that the scaler refuses.
        """
        transfer, colorspace = frame.color_trc, colorspace_of(frame)
        limited_grey = _is_grey(frame) and frame.color_range == ColorRange.MPEG
        rotation, mirrored = self._orientation(frame)
        if frame.interlaced_frame or self._interlaced:
            frame = _deinterlaced(frame)
        shown = max(1, round(frame.width * self.pixel_aspect))
        width, height = _scaled_size(shown, frame.height, self._size, self._fit)
        high_range = transfer in (_PQ, _HLG)
        scaled = self._scaler.reformat(
            frame,
            width,
            height,
            "rgb48le" if high_range else "rgb24",
            src_colorspace=colorspace,
            dst_colorspace=Colorspace.DEFAULT,
            src_color_range=_color_range(frame),
            dst_color_range=ColorRange.JPEG,
            interpolation=_SCALER,
            threads=1,
        ).to_ndarray()
        picture = (
            tone_mapped(scaled.astype(np.uint16, copy=False), transfer)
            if high_range
            else scaled.astype(np.uint8, copy=False)
        )
        if limited_grey:
            picture = _FULL_RANGE[picture]
        picture = np.rot90(picture, -rotation // 90)
        if mirrored:
            picture = picture[:, ::-1]
        if self._fit is Fit.TILES:
            return np.ascontiguousarray(picture)
        return _fitted(picture, self._size)


def colorspace_of(frame: VideoFrame) -> Colorspace:
    """The frame's matrix by its tag; without one, that of high dynamic range where it has that, and
    else by its height as players guess it."""
    tagged = _COLORSPACES.get(frame.colorspace)
    if tagged is not None:
        return tagged
    if frame.color_trc in (_PQ, _HLG):
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601


def _color_range(frame: VideoFrame) -> ColorRange:
    if frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj"):
        return ColorRange.JPEG
    if frame.format.is_rgb or frame.format.has_palette:
        return ColorRange.JPEG
    # The scaler takes any grey for full range, and so is untagged grey meant.
    return ColorRange.JPEG if _is_grey(frame) else ColorRange.MPEG


def _is_grey(frame: VideoFrame) -> bool:
    return frame.format.name.startswith(("gray", "ya8", "ya16", "mono"))


_FULL_RANGE = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
"""Levels of limited range (16 to 235) to those of full range."""


def _scaled_size(width: int, height: int, size: int, fit: Fit) -> tuple[int, int]:
    """The size to which the scaler brings a picture before the square is cut out or padded."""
    if fit is Fit.SQUASH:
        return size, size
    short, long = min(width, height), max(width, height)
    if fit in (Fit.CROP, Fit.TILES):
        other = min(size * long // short, size * _LONGEST_SIDES)
        return (other, size) if width >= height else (size, other)
    other = max(1, size * short // long)
    return (size, other) if width >= height else (other, size)


def _fitted(picture: Picture, size: int) -> Picture:
    """Cut the centre square out of a larger picture, or pad a smaller one with black."""
    height, width = picture.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    if top >= 0 and left >= 0:
        return np.ascontiguousarray(picture[top : top + size, left : left + size])
    square = np.zeros((size, size, 3), np.uint8)
    square[-top or 0 : height - top, -left or 0 : width - left] = picture
    return square


def tiles(picture: Picture) -> tuple[Picture, ...]:
    """The squares of a picture over its longer side: at its beginning, its middle and its end.

    They overlap in a picture less than three times as long as wide, and are alike in a square.
    """
    height, width = picture.shape[:2]
    size, spare = min(height, width), abs(height - width)
    return tuple(
        picture[:, at : at + size] if width > height else picture[at : at + size]
        for at in (0, spare // 2, spare)
    )


def _deinterlaced(frame: VideoFrame) -> VideoFrame:
    """One field of the frame, the lines of the other interpolated from it.

    The graph sees this frame alone, so the result does not depend on where decoding began. (bwdif
    on a lone frame takes it for a still picture and leaves its combs.)
    """
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
    )
    # A layout that the filter does not take is converted on the way. Whatever its colours are, they
    # come out as they went in where both ends go by the same name, and here all do.
    named = graph.add("setparams", "range=pc:colorspace=bt709")
    graph.link_nodes(source, named, graph.add("yadif", "mode=send_frame"), graph.add("buffersink"))
    try:
        graph.configure()
        graph.vpush(frame)
        graph.vpush(None)
        woven = graph.vpull()
    except (av.error.FFmpegError, EOFError):
        return frame  # A pixel format that the filter does not know is shown as it is.
    # Without a tag the other layout might stand for another range.
    woven.colorspace, woven.color_range = frame.colorspace, _color_range(frame)
    return woven


_REFERENCE_WHITE = 203.0
"""Nits of diffuse white in high dynamic range (ITU-R BT.2408), which becomes white here."""
_PEAK = 1000.0
"""Nits that are still told apart: the peak of the usual mastering display and of nominal HLG."""
_KNEE = 0.5
"""Share of diffuse white up to which light keeps its value."""
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
"""ITU-R BT.2087, linear light."""


def tone_mapped(picture: NDArray[np.uint16], transfer: int) -> Picture:
    """A BT.2020 picture in PQ or HLG (16-bit RGB) as sRGB.

    Signal to nits by SMPTE ST 2084 or by ITU-R BT.2100's HLG with its system gamma of 1.2.
    Luminance up to half of diffuse white keeps its value, and what is brighter bends smoothly (a
    rational knee of matching slope) so that 1000 nits meet white; colour follows luminance.
    """
    signal = picture.astype(np.float32) / np.float32(65535)
    nits = _pq_nits(signal) if transfer == _PQ else _hlg_nits(signal)
    light = np.maximum(nits @ _BT2020_TO_BT709.T / _REFERENCE_WHITE, 0)
    luminance = light @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    peak = _PEAK / _REFERENCE_WHITE
    slope = (peak - _KNEE) / (1 - _KNEE)
    over = np.clip((luminance - _KNEE) / (peak - _KNEE), 0, 1)
    bent = _KNEE + (1 - _KNEE) * slope * over / (1 + (slope - 1) * over)
    mapped = np.where(luminance <= _KNEE, luminance, bent)
    light *= (mapped / np.maximum(luminance, 1e-6))[..., None]
    light = np.clip(light, 0, 1)
    srgb = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(np.round(srgb * 255), np.uint8)


def _pq_nits(signal: NDArray[np.float32]) -> NDArray[np.float32]:
    power = signal ** np.float32(32 / 2523)
    ratio = np.maximum(power - np.float32(107 / 128), 0) / (
        np.float32(2413 / 128) - np.float32(2392 / 128) * power
    )
    return np.asarray(10_000 * ratio ** np.float32(8192 / 1305), np.float32)


def _hlg_nits(signal: NDArray[np.float32]) -> NDArray[np.float32]:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return np.asarray(scene * _PEAK * np.maximum(luminance, 1e-6)[..., None] ** 0.2, np.float32)


def encode_jpeg(picture: Picture) -> bytes:
    """The picture as JPEG of quality 90."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def load_picture(data: bytes, size: int, fit: Fit) -> Picture:
    """An example picture file as a size x size picture, turned upright by its EXIF orientation;
    one square, its middle, for `tiles` too.

    ValueError, with one line, for what is no picture or has more than 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_EXAMPLE_FORMATS)
            if image.width * image.height > MAX_EXAMPLE_PIXELS:
                raise Image.DecompressionBombError
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"picture has more than {MAX_EXAMPLE_PIXELS} pixels; give a smaller one"
        ) from None
    except Exception as error:  # Decoders of hostile files raise anything.
        raise ValueError(
            f"no picture that can be read ({type(error).__name__}); give a JPEG, PNG or WebP file"
        ) from error
    scaled = upright.resize(
        _scaled_size(upright.width, upright.height, size, fit), Image.Resampling.BICUBIC
    )
    return _fitted(np.asarray(scaled), size)


_EXAMPLE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
