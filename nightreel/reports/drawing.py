"""What is drawn on the pictures of a video: the label of the moment, a strip of its scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from nightreel.reports.colours import colour_of
from nightreel.reports.lettering import Tag, note_picture, tag_picture
from storage.columns import NONE, SampleColumns
from storage.records import Gap, Scene
from workers.footage.picture import Picture

STRIP_SHARE = 0.035
"""Height of the strip of scenes, of the picture's."""
TEXT_SHARE = 0.045
"""Height of the label's letters, of the picture's shorter side."""
SMALLEST_TEXT_PX = 11
NOTE_SHARE = 0.2
"""Height that a notice may take, of the picture's."""
SMALLEST_NOTE_PX = 9
_GAP_COLOUR = "#303030"


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a job says of one video."""

    samples: SampleColumns
    scenes: Sequence[tuple[int, Scene]]
    """Each with the position of its label."""
    gaps: Sequence[Gap]
    labels: Sequence[str]
    duration_us: int
    notice: str | None = None
    """What every viewer must be told (a coarse engine)."""

    def tag(self, t_us: int) -> Tag:
        """The label and confidence of the sample that answers for this moment, or the reason why
        none does."""
        at = int(np.searchsorted(self.samples.start_us, t_us, side="right")) - 1
        if at >= 0 and t_us < self.samples.end_us[at]:
            label = int(self.samples.label[at, 0])
            if label != NONE:
                confidence = float(self.samples.confidence[at, 0])
                return Tag(self.labels[label], f"{confidence:.0%}", colour_of(label))
        gap = next((gap for gap in self.gaps if gap.start_us <= t_us < gap.end_us), None)
        return Tag("not analysed", str(gap.kind) if gap else "", _GAP_COLOUR)


class Artist:
    """Draws on the pictures of one video, which are all of one size."""

    def __init__(self, told: Told, width: int, height: int) -> None:
        self._told = told
        self._size = width, height
        self._strip = self._drawn_strip()
        self._text_px = max(SMALLEST_TEXT_PX, round(min(width, height) * TEXT_SHARE))

    def _drawn_strip(self) -> Image.Image:
        width, height = self._size
        strip = Image.new("RGB", (width, max(6, round(height * STRIP_SHARE))), _GAP_COLOUR)
        draw = ImageDraw.Draw(strip)
        for label, scene in self._told.scenes:
            left, right = self._column(scene.start_us), self._column(scene.end_us)
            draw.rectangle((left, 1, max(left, right - 1), strip.height), fill=colour_of(label))
            if left:
                draw.line((left, 1, left, strip.height), fill="#000000")
        draw.line((0, 0, width, 0), fill="#ffffff")
        return strip

    def _column(self, t_us: int) -> int:
        return round(t_us / max(self._told.duration_us, 1) * self._size[0])

    def draw(self, picture: Picture, t_us: int) -> Image.Image:
        """The picture with the label of the moment above and the scenes below, on which a white
        line marks the moment."""
        drawn = Image.fromarray(picture)
        width, height = self._size
        top = height - self._strip.height
        margin = self._text_px // 2
        tag = tag_picture(self._told.tag(t_us), self._text_px, width - 2 * margin)
        drawn.paste(tag, (margin, margin), tag)
        if self._told.notice:
            # Under the label, which it is about; below lie the scenes, and subtitles.
            small_px = max(SMALLEST_NOTE_PX, round(self._text_px * 0.5))
            room = width - 2 * margin, round(height * NOTE_SHARE)
            note = note_picture(self._told.notice, small_px, *room)
            drawn.paste(note, (margin, margin + tag.height + margin // 2), note)
        drawn.paste(self._strip, (0, top))
        at = min(self._column(t_us), width - 1)
        pen = ImageDraw.Draw(drawn)
        pen.rectangle((at - 2, top, at + 2, height), fill="#000000")
        pen.rectangle((at - 1, top, at + 1, height), fill="#ffffff")
        return drawn
