"""What becomes of a range's planned frames while pictures come in: each is found, or another of its
bucket stands in for it, or it is given up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from av.video.frame import VideoFrame

from storage.records import FrameRange
from workers.footage.picture import Picture
from workers.footage.sample import Grid

_SETTLED_BEHIND = 24
"""Samples that wait behind a missing one at most; no codec reorders over more frames."""


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """What is kept of a frame."""

    pts: int | None
    picture: Picture | None
    """None where it was not asked for, or cannot be made."""


class Found:
    """The wanted frames of a range by their position in the plan; handed out in order, once."""

    def __init__(
        self,
        frame_range: FrameRange,
        grid: Grid,
        render: Callable[[VideoFrame, Fraction], Picture | None],
    ) -> None:
        self.samples: dict[int, Taken | None] = {}
        """What came and was not handed out yet; None stands for a sample that is lost."""
        self._wanted = frame_range.pts
        self._position = {pts: i for i, pts in reversed([*enumerate(frame_range.pts)])}
        self._of_bucket = {bucket: i for i, bucket in enumerate(frame_range.buckets)}
        self._grid = grid
        self._render = render
        self._next = 0
        self._stand_ins: dict[int, Taken | None] = {}

    def take(
        self, frame: VideoFrame, pixel_aspect: Fraction, *, out_of_order: bool = False
    ) -> Taken:
        """What `add` may need of a frame."""
        asked = self._role(frame.pts, out_of_order) is not None
        return Taken(frame.pts, self._render(frame, pixel_aspect) if asked else None)

    def add(self, taken: Taken, *, out_of_order: bool = False) -> None:
        """Use a frame if it is wanted, or if it may stand in for one of its bucket that should
        have come before it (`out_of_order`: before or after it)."""
        role = self._role(taken.pts, out_of_order)
        if role is not None and taken.picture is not None:
            places, position = role
            places[position] = taken

    def _role(
        self, pts: int | None, out_of_order: bool
    ) -> tuple[dict[int, Taken | None], int] | None:
        if pts is None:
            return None
        position = self._position.get(pts)
        if position is not None:
            # Of frames with one timestamp each takes the next place.
            while self._settled(position) and pts in self._wanted[position + 1 : position + 2]:
                position += 1
            return None if self._settled(position) else (self.samples, position)
        if self._grid.rate is None:
            return None  # Ordinal buckets hold one frame, for which no other can stand in.
        position = self._of_bucket.get(self._grid.bucket(pts))
        if (
            position is None
            or position < self._next
            or position in self.samples
            or position in self._stand_ins
            or not (out_of_order or pts > self._wanted[position])
        ):
            return None
        return self._stand_ins, position

    def _settled(self, position: int) -> bool:
        return position < self._next or self.samples.get(position) is not None

    def missing(self, until_pts: int) -> list[int]:
        """Positions up to a timestamp that neither came nor were given up."""
        end = bisect_right(self._wanted, until_pts)
        return [i for i in range(self._next, end) if i not in self.samples]

    def overdue(self) -> list[int]:
        """Positions whose frame did not come while those of enough later ones did."""
        if len(self.samples) <= _SETTLED_BEHIND:
            return []
        return self.missing(self._wanted[sorted(self.samples)[-_SETTLED_BEHIND - 1]])

    def give_up(self, lost: Iterable[int]) -> None:
        """Settle what will not come: by what stands in for it, else as lost."""
        for i in lost:
            if self.samples.get(i) is None:
                self.samples[i] = self._stand_ins.pop(i, None)

    def ready(self) -> Iterator[tuple[int, Taken | None]]:
        """Hand out, in order, what is settled up to the first that is not."""
        while self._next in self.samples:
            self._stand_ins.pop(self._next, None)
            yield self._next, self.samples.pop(self._next)
            self._next += 1
