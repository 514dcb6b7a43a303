"""The frames of a video without timestamps: they are numbered as they come, and stand where the
clock of their packets says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame

from storage.records import FrameRange, Sampling, SamplingMode, VideoInfo
from workers.footage.avi import LostChunks
from workers.footage.clock import Slots
from workers.footage.picture import Picture
from workers.footage.sample import scaled_one


class Feed:
    """Tells `Slots` what a decoder takes and what it does not get."""

    def __init__(self, slots: Slots, container: str, frame_ticks: int = 1) -> None:
        """`frame_ticks` is how long frames last, in ticks."""
        self._slots = slots
        self.misses = slots.misses
        """Whether it is seen at keyframes how many frames have not come."""
        self._slotted = container == "avi"
        self._lost = LostChunks()
        self._frame_ticks = frame_ticks
        self._order = -frame_ticks

    def read(self, packet: Packet[Stream]) -> None:
        """A packet was read. It gets a timestamp by the order of decoding, for damage is told by
        timestamps and the file has none: in AVI its slot."""
        dts, self._order = packet.dts, self._order + self._frame_ticks
        if not self._slotted:
            packet.pts = self._order
            return
        packet.pts = self._order = self._order if dts is None else max(self._order, dts)
        if (hole := self._lost.before(packet, packet.pts, dts)) is not None:
            for number in range(hole.missing):
                self._slots.lose(hole.begin + number, key=number == 0)

    def taken(self, packet: Packet[Stream], *, decodes: bool) -> None:
        """The decoder was given it, and may have said that it does not decode."""
        if packet.is_corrupt:
            self._slots.doubt(packet.dts)
        if decodes:
            self._slots.feed(packet.dts)
        else:
            self._slots.lose(packet.dts, key=packet.is_keyframe)


class Place(NamedTuple):
    """Where a frame of a video without timestamps stands."""

    bucket: int
    start_us: int
    """Where its bucket begins."""
    t_us: int


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """A frame of a video without timestamps, as it was given."""

    place: Place
    lost: list[Place]
    """Frames that are lost between the one before and this."""
    wanted: bool
    """Whether it may be a sample."""
    picture: Picture | None
    """None where it is not wanted or damaged."""

    def spoilt(self) -> Counted:
        """The same, damaged."""
        return replace(self, picture=None)


class Counter:
    """Numbers the frames of a video without timestamps as they are given."""

    def __init__(
        self,
        info: VideoInfo,
        frame_range: FrameRange,
        sampling: Sampling,
        slots: Slots,
        render: Callable[[VideoFrame, Fraction], Picture | None],
    ) -> None:
        self.answered = -1
        """The bucket of the latest sample."""
        self.is_last = frame_range.end_us >= info.duration_us
        self._info, self._range, self._sampling = info, frame_range, sampling
        self._slots, self._render = slots, render
        self._tick_us = 1_000_000 * info.time_base
        self._last = math.ceil(info.indexed_us / self._tick_us) - 1
        self._given = self._numbered = 0
        self._keyframe = -1
        self._is_cut = info.indexed_us < info.duration_us
        self._place = Place(-1, 0, 0)

    def covers(self, bucket: int) -> bool:
        """Whether a bucket is of the range."""
        last = bucket < self._range.bucket_end or self.is_last
        return bucket >= self._range.bucket_start and last

    def take(self, frame: VideoFrame, pixel_aspect: Fraction) -> Counted:
        """A frame is given; it is made a picture if its bucket has no sample yet."""
        key = self._given == 0 or frame.key_frame
        time = self._slots.time(frame.pts, key=key)
        if self._slots.stray:
            return Counted(self._place, [], wanted=False, picture=None)
        lost = [self._placed(one, key=key) for one, key in self._slots.passed]
        self._place = place = self._placed(time, key=key)
        eligible = key or self._sampling.mode is not SamplingMode.KEYFRAMES
        wanted = eligible and self.covers(place.bucket) and place.bucket != self.answered
        # Further ones are not in the index.
        wanted = wanted and self._given < self._info.frame_count
        self._given += 1
        unsure = self._slots.late or (self._slots.held and self._is_cut)
        whole = wanted and not unsure
        picture = self._render(frame, pixel_aspect) if whole else None
        return Counted(place, lost, wanted, picture)

    def _placed(self, time: int, *, key: bool) -> Place:
        """The place of the next frame."""
        number, self._numbered = self._numbered, self._numbered + 1
        self._keyframe += key
        time = min(time, self._last)
        t_us = scaled_one(time, self._tick_us)
        if (rate := self._sampling.rate) is not None:
            bucket = scaled_one(time, self._info.time_base * rate)
            return Place(bucket, scaled_one(bucket, 1_000_000 / rate), t_us)
        every = self._sampling.mode is SamplingMode.EVERY_FRAME
        return Place(number if every else self._keyframe, t_us, t_us)
