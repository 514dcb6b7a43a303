"""Text on pictures that can be read on any background, in a font that is shipped."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SHADE = (0, 0, 0, 176)
_WHITE = (255, 255, 255, 255)


@functools.lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans (Latin, Greek, Cyrillic and more), which matplotlib ships, at this size in
    pixels."""
    return ImageFont.truetype(str(_font_file()), size)


def boxed(texts: Iterable[str]) -> str:
    """The characters of these texts that the font does not have, each once: boxes are drawn for
    them."""
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415 - an extra, and slow to load

    there = FT2Font(str(_font_file())).get_charmap()
    characters = dict.fromkeys(one for text in texts for one in text)
    return "".join(one for one in characters if ord(one) not in there and one.isprintable())


def _font_file() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the font comes with matplotlib: pip install 'nightreel[reports]'")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


@dataclass(frozen=True, slots=True)
class Tag:
    """A label as it is shown: its name, what is said beside it, its colour."""

    name: str
    beside: str
    colour: str


@functools.lru_cache(maxsize=256)
def tag_picture(tag: Tag, text_px: int, width_px: int) -> Image.Image:
    """The tag as RGBA: white on a dark shade with a chip of its colour, at most `width_px` wide; a
    name that is too long is cut."""
    face = font(text_px)
    pad, chip = text_px // 2, round(text_px * 0.7)
    room = width_px - 3 * pad - chip
    text = fitted(f"{tag.name}  {tag.beside}".rstrip(), tag.beside, face, room)
    width = min(width_px, round(3 * pad + chip + face.getlength(text)))
    height = round(text_px * 1.7)
    picture = Image.new("RGBA", (max(width, 1), height))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), radius=text_px // 3, fill=_SHADE)
    top = (height - chip) // 2
    draw.rectangle((pad, top, pad + chip - 1, top + chip - 1), fill=tag.colour, outline=_WHITE)
    draw.text((2 * pad + chip, height / 2), text, font=face, fill=_WHITE, anchor="lm")
    return picture


@functools.lru_cache(maxsize=16)
def note_picture(text: str, text_px: int, width_px: int, height_px: int) -> Image.Image:
    """Small print as RGBA: the text in as many lines as it needs, on a dark shade, at most
    `width_px` wide; what does not fit into `height_px` is cut. At least one line is drawn."""
    face = font(text_px)
    pad, step = text_px // 2, round(text_px * 1.25)
    lines = wrapped(text, face, width_px - 2 * pad, max(1, (height_px - pad) // step))
    width = min(width_px, 2 * pad + round(max(map(face.getlength, lines))))
    picture = Image.new("RGBA", (max(width, 1), pad + step * len(lines)))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((0, 0, width - 1, picture.height - 1), text_px // 3, fill=_SHADE)
    for at, line in enumerate(lines):
        middle = pad / 2 + step * (at + 0.5)
        draw.text((pad, middle), line, font=face, fill=_WHITE, anchor="lm")
    return picture


def wrapped(text: str, face: ImageFont.FreeTypeFont, room: float, most: int) -> list[str]:
    """The text in up to `most` lines of `room` pixels, broken between words; a last line that is
    too long ends with an ellipsis."""
    lines, words = [""], text.split()
    for at, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or face.getlength(longer) <= room:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[at:]])
            break
    return [fitted(line, "", face, room) for line in lines]


def fitted(text: str, ending: str, face: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, or as much of it as fits into `room` pixels with an ellipsis before its ending."""
    if face.getlength(text) <= room:
        return text
    for length in range(len(text) - len(ending), 0, -1):
        cut = f"{text[:length].rstrip()}… {ending}".rstrip()
        if face.getlength(cut) <= room:
            return cut
    return ""
