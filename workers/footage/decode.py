"""The samples of one frame range. Nothing that a file holds ends a range: what does not decode is
tried again, then another frame of its bucket stands in, and at last it is a gap with a reason."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import av.error
import numpy as np
from av.video.frame import VideoFrame

from storage.records import (
    Fit,
    FrameRange,
    Gap,
    GapKind,
    Sampling,
    SamplingMode,
    VideoInfo,
    shown_path,
)
from workers.footage.clock import Slots
from workers.footage.counted import Counted, Counter
from workers.footage.decoder import Decoder
from workers.footage.found import Found, Taken
from workers.footage.memory import bounded_memory
from workers.footage.picture import Picture, Renderer
from workers.footage.rejection import FootageError, Rejected
from workers.footage.sample import Grid, Slot, scaled_one
from workers.footage.source import Source
from workers.footage.watchdog import Stalled, watched

__all__ = ["DecodedSample", "FootageError", "read_range"]

STALL_S = 60.0
"""Seconds without any progress after which a range ends with a gap."""

MAX_MEMORY_BYTES = 3 * 2**30
"""Memory that decoding a range may take beyond what its process has. Two decoders of pictures of
8192 x 4320 at 10 bits fit, as where a damaged place is tried again, and the threads that send."""

_PIXEL_BYTES = 8
"""Of the largest pictures that decoders give: four components of 16 bits."""

_Loss = tuple[GapKind, str]
"""Why a gap is one."""
_TRUNCATED: _Loss = (GapKind.TRUNCATED, "the container promises more than the file holds")
_DAMAGED: _Loss = (GapKind.DAMAGED, "no frame of this time decodes undamaged")
_MISSING: _Loss = (GapKind.DAMAGED, "frames of this time are missing from the file")
_GONE: _Loss = (GapKind.READ_ERROR, "the file no longer holds the frames")


@dataclass(frozen=True, slots=True, eq=False)
class DecodedSample:
    """A sample as a picture, and the interval of the video that it answers for."""

    bucket: int
    pts: int | None
    """Timestamp of the frame; None where the video has none and frames are counted."""
    t_us: int
    start_us: int
    end_us: int
    picture: Picture
    """Size x size x 3, uint8 RGB; with the fit `tiles` longer on one side."""


def read_range(
    path: str,
    info: VideoInfo,
    frame_range: FrameRange,
    sampling: Sampling,
    *,
    size: int,
    fit: Fit,
    stall_s: float = STALL_S,
) -> Generator[DecodedSample | Gap]:
    """The samples of a range in order, and gaps for what does not decode.

    Their intervals tile [frame_range.start_us, frame_range.end_us) exactly. Decoding that makes no
    progress for `stall_s` seconds, or takes more than MAX_MEMORY_BYTES, ends with a gap. Raises
    FootageError, with one line of text, where the file vanished, changed or cannot be read. The
    file is closed, and the memory of the process no longer limited, when the iterator is exhausted,
    closed or fails.
    """
    reader = _Reader(path, info, frame_range, sampling, size, fit)
    reached_us = frame_range.start_us
    with bounded_memory(MAX_MEMORY_BYTES), closing(watched(reader.read, stall_s)) as results:
        try:
            for result in results:
                reached_us = result.end_us
                yield result
        except Stalled:
            detail = f"decoding made no progress for {stall_s:g} s"
            yield Gap(reached_us, frame_range.end_us, GapKind.STALLED, detail)


@dataclass
class _Reader:
    """Reads one range once."""

    path: str
    info: VideoInfo
    range: FrameRange
    sampling: Sampling
    size: int
    fit: Fit

    def __post_init__(self) -> None:
        self._grid = Grid.of(self.info, self.sampling)
        # What a truncated file lacks is in the plan and not in the file.
        self._end_us = max(self.range.start_us, min(self.range.end_us, self.info.indexed_us))
        self._waiting: DecodedSample | None = None

    def read(self, beat: Callable[[], None]) -> Iterator[DecodedSample | Gap]:
        reached_us = self.range.start_us
        with suppress(MemoryError):
            for result in self._read(beat):
                reached_us = result.end_us
                yield result
            return
        detail = "decoding it takes more memory than a file may"
        yield Gap(reached_us, self.range.end_us, GapKind.DAMAGED, detail)

    def _read(self, beat: Callable[[], None]) -> Iterator[DecodedSample | Gap]:
        with _opened(self.path, self.info, beat) as source:
            self._renderer = Renderer(
                self.size,
                self.fit,
                pixel_aspect=source.sample_aspect_ratio,
                interlaced=source.interlaced,
            )
            if self.range.buckets and not self.range.pts:
                yield from _joined(self._counted(source, beat))
            else:
                yield from _joined(self._timed(source, beat))
        if self._end_us < self.range.end_us:
            yield Gap(self._end_us, self.range.end_us, *_TRUNCATED)

    def _timed(self, source: Source, beat: Callable[[], None]) -> Iterator[DecodedSample | Gap]:
        """The samples that the plan names by their timestamps."""
        wanted, splittable = self.range.pts, self.info.sequential_reason is None
        if not wanted:
            yield Gap(self.range.start_us, self._end_us, GapKind.DAMAGED, "no frame to sample")
            return
        slots = self._grid.slots(self.range, self._end_us)
        found = Found(self.range, self._grid, self._render)
        landmark = self.range.seek_pts
        decoder = Decoder(
            source,
            _stepping(source, beat),
            found.take,
            fields=self.info.interlaced,
            landmark=self.info.first_pts if landmark is None else landmark,
        )
        keyframes = self.sampling.mode is SamplingMode.KEYFRAMES
        for taken in decoder.wanted(
            wanted, self.range.seek_pts, splittable=splittable, keyframes=keyframes
        ):
            if taken is None:
                lost = [i for i in found.missing(decoder.latest_fed) if wanted[i] in decoder.fed]
            else:
                found.add(taken)
                lost = found.overdue()
            again = [wanted[i] for i in lost if not self._may_be_none(i, decoder)]
            if again and splittable:
                self._retry(again, found, beat)
            found.give_up(lost)
            for i, sample in found.ready():
                loss = _DAMAGED if wanted[i] in decoder.fed else _unread(source)
                none = sample is None and self._may_be_none(i, decoder)
                yield from self._placed(sample, i, slots[i], loss, none=none)
        if not (decoder.fed or decoder.recognised or _unread(source) == _TRUNCATED):
            raise FootageError(
                f"{shown_path(os.fsencode(self.path))}: holds none of the frames it held when it "
                "was probed; the file changed, run or submit it again"
            )
        # What never came as a packet, where the others did.
        found.give_up(found.missing(wanted[-1]))
        for i, sample in found.ready():
            loss = _DAMAGED if wanted[i] in decoder.fed else _unread(source)
            yield from self._placed(sample, i, slots[i], loss)

    def _retry(self, lost: Sequence[int], found: Found, beat: Callable[[], None]) -> None:
        """Decode once more what did not come: from further back, and every picture."""
        with _opened(self.path, self.info, beat) as source:
            take = partial(found.take, out_of_order=True)
            decoder = Decoder(source, _stepping(source, beat), take)
            for taken in decoder.again(lost[0]):
                found.add(taken, out_of_order=True)
                if taken.pts is not None and taken.pts > lost[-1]:
                    return

    def _render(self, frame: VideoFrame, pixel_aspect: Fraction) -> Picture | None:
        self._renderer.pixel_aspect = pixel_aspect
        try:
            return self._renderer.picture(frame)
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError):
            return None

    def _placed(
        self,
        taken: Taken | None,
        position: int,
        slot: Slot,
        loss: _Loss,
        *,
        none: bool = False,
    ) -> Iterator[DecodedSample | Gap]:
        """What becomes of a planned sample. `none`: there is no such picture, so the one before it
        stands on."""
        result = self._answering(taken, position, slot, loss)
        before, self._waiting = self._waiting, None
        if before is not None and none and isinstance(result, Gap):
            result = replace(before, end_us=result.end_us)
        elif before is not None:
            yield before
        if isinstance(result, DecodedSample) and self._may_come_in_two(position, slot):
            self._waiting = result
            return
        yield result
        if slot.shown_us < slot.end_us:
            detail = "the stream holds no picture of this time"
            yield Gap(slot.shown_us, slot.end_us, GapKind.DAMAGED, detail)

    def _may_be_none(self, position: int, decoder: Decoder[Taken]) -> bool:
        """Whether no picture came of a packet since it was a second field."""
        pts, before = self.range.pts[position], self.range.pts[max(0, position - 1) : position]
        twin = self.info.interlaced or pts in before
        return self._grid.rate is None and twin and bool(before) and decoder.unhurt(pts)

    def _may_come_in_two(self, position: int, slot: Slot) -> bool:
        """Whether the next planned sample may be of the same picture: its second field."""
        pts, following = self.range.pts[position], self.range.pts[position + 1 : position + 2]
        twin = self.info.interlaced or pts in following
        return self._grid.rate is None and twin and bool(following) and slot.shown_us == slot.end_us

    def _answering(
        self, taken: Taken | None, position: int, slot: Slot, loss: _Loss
    ) -> DecodedSample | Gap:
        interval = slot.start_us, slot.shown_us
        if taken is None or taken.pts is None or taken.picture is None:
            return Gap(*interval, *loss)
        t_us = scaled_one(taken.pts - self.info.first_pts, self.info.time_base * 1_000_000)
        bucket = self.range.buckets[position]
        return DecodedSample(bucket, taken.pts, t_us, *interval, taken.picture)

    def _counted(self, source: Source, beat: Callable[[], None]) -> Iterator[DecodedSample | Gap]:
        """The samples of a video without timestamps: frames are numbered as they come."""
        slots = Slots(self.info.container, self.info.codec)
        count = Counter(self.info, self.range, self.sampling, slots, self._render)
        decoder = Decoder(source, _stepping(source, beat), count.take, spoilt=Counted.spoilt)
        waiting: DecodedSample | None = None
        # Where the first bucket begins that is lost, so far, since that sample.
        lost_us: int | None = None
        end_us, loss = self._end_us, _DAMAGED
        for frame in decoder.everything(slots, self.info.time_base):
            missed = [*frame.lost, frame.place] if frame.wanted else frame.lost
            for place in missed:
                if place.bucket == count.answered or not count.covers(place.bucket):
                    continue
                start_us = min(max(place.start_us, self.range.start_us), self._end_us)
                if place is not frame.place or frame.picture is None:
                    lost_us = start_us if lost_us is None else min(lost_us, start_us)
                    continue
                lost_us = None if lost_us is None else min(lost_us, start_us)
                yield from self._ended(waiting, start_us, lost_us)
                if waiting is None and lost_us is None:
                    start_us = self.range.start_us
                bucket, _start_us, t_us = place
                waiting = DecodedSample(bucket, None, t_us, start_us, start_us, frame.picture)
                count.answered, lost_us = bucket, None
            if frame.place.bucket >= self.range.bucket_end and not count.is_last:
                break
        else:
            end_us, loss = self._end_of_count(decoder, slots)
        if lost_us is not None:
            end_us = lost_us
        if waiting:
            end_us = max(end_us, waiting.start_us)
            yield replace(waiting, end_us=end_us)
        else:
            end_us = self.range.start_us
        if end_us < self._end_us:
            yield Gap(end_us, self._end_us, *loss)

    def _end_of_count(self, decoder: Decoder[Counted], slots: Slots) -> tuple[int, _Loss]:
        """Until when what was counted lasts, and why it may not be all."""
        gone = decoder.packets < self.info.frame_count
        # Containers count packets that hold no picture, so only damage makes a shortfall a loss,
        # and packets that are gone. In AVI the last frame stands at its slot, whatever was lost
        # before.
        shortened = decoder.damaged and not (self.info.container == "avi" and decoder.ended_whole)
        end_us = scaled_one(slots.end, 1_000_000 * self.info.time_base)
        short = gone or shortened
        return min(self._end_us, end_us) if short else self._end_us, _GONE if gone else _DAMAGED

    def _ended(
        self, waiting: DecodedSample | None, end_us: int, lost_us: int | None
    ) -> Iterator[DecodedSample | Gap]:
        """A sample that answers until the next one, or until frames are lost."""
        shown_us = end_us if lost_us is None else lost_us
        if waiting:
            yield replace(waiting, end_us=shown_us)
        elif lost_us is not None:
            shown_us = self.range.start_us
        if shown_us < end_us:
            yield Gap(shown_us, end_us, *_DAMAGED)


def _opened(path: str, info: VideoInfo, beat: Callable[[], None]) -> Source:
    """The stream that was probed. FootageError where it is not there any more."""
    try:
        source = Source(path, info.stream_index, beat=beat)
    except Rejected as rejected:
        raise FootageError(str(rejected)) from rejected
    if source.container != info.container or source.codec != info.codec:
        source.close()
        raise FootageError(
            f"{shown_path(os.fsencode(path))}: {source.codec} in {source.container} where "
            f"{info.codec} in {info.container} was probed; the file changed, run or submit it again"
        )
    return source


def _stepping(source: Source, beat: Callable[[], None]) -> Callable[[], None]:
    """`beat`, and MemoryError where no other picture fits. A decoder says then no more than that a
    packet does not decode, as if it were damaged."""

    def step() -> None:
        beat()
        context = source.stream.codec_context
        np.empty(context.width * context.height * _PIXEL_BYTES, np.uint8)

    return step


def _unread(source: Source) -> _Loss:
    """Why a planned frame never came as a packet."""
    if source.promised_size > source.size:
        return _TRUNCATED
    return _MISSING if source.lacks_frames else _GONE


def _joined(results: Iterable[DecodedSample | Gap]) -> Iterator[DecodedSample | Gap]:
    """The same, with gaps that touch and have one reason made one."""
    gap: Gap | None = None
    for result in results:
        if isinstance(result, Gap):
            joins = gap is not None and (gap.kind, gap.detail) == (result.kind, result.detail)
            if gap is not None and joins:
                gap = replace(gap, end_us=result.end_us)
                continue
        if gap is not None:
            yield gap
        gap = None
        if isinstance(result, Gap):
            gap = result
        else:
            yield result
    if gap is not None:
        yield gap
