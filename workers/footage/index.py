"""A video's index: what its packets say about its frames, read without decoding one."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from workers.footage.avi import LostChunks
from workers.footage.clock import Slots, Unwrapper, lacks_times
from workers.footage.holes import Hole, Holes, are_numbered, missing_times
from workers.footage.intra import HEAD_BYTES, contradicts_keyframe, is_hidden
from workers.footage.sample import Flags, Ints

if TYPE_CHECKING:
    from av.packet import Packet, PacketSideData
    from av.stream import Stream

_UNTIMED = -(2**63)
"""Stands for the timestamp of a packet that has none."""

KEYFRAMES_COMPARED = 512
"""Keyframes whose own headers are compared with their mark; an encoder does not change its kind."""
_MARKED_SHARE = 4
"""The part of the packets that may be marked as damaged where marks are not a muxer's habit."""
_HEADERS_INSIDE = frozenset(("mpegts", "mpeg"))
"""Containers whose pictures bring their headers along, and other things beside every packet."""


class TooManyPacketsError(Exception):
    """A stream has more packets than its index may hold."""


class _Headers:
    """What a container tells the decoder once, with the packet from which on it holds: headers of
    joined recordings, palettes. A decoder that begins after that packet does not know it."""

    def __init__(self, extradata: bytes) -> None:
        self.changes = 0
        """Times that another than the one before was told."""
        self._told = {"new_extradata": extradata}

    def tell(self, side: PacketSideData, *, first: bool) -> None:
        """Follow what comes with a packet. The first packet's is known to all tasks, for each of
        them decodes it; what live streams repeat now and then is no change."""
        if (kind := side.data_type) in ("new_extradata", "palette"):
            told = bytes(side)
            self.changes += not first and self._told.get(kind) != told
            self._told[kind] = told


class _Frames:
    """What packets tell of their frames, in decoding order: a few bytes each."""

    def __init__(self) -> None:
        self.pts, self.dts, self.durations = array("q"), array("q"), array("q")
        self.keys, self.lost = array("b"), array("b")

    def add(
        self, pts: int | None, dts: int | None, duration: int | None, *, key: bool, lost: bool
    ) -> None:
        self.pts.append(_UNTIMED if pts is None else pts)
        self.dts.append(_UNTIMED if dts is None else dts)
        self.durations.append(duration or 0)
        self.keys.append(key)
        self.lost.append(lost)

    def repeat(self, duration: int | None) -> None:
        """The latest frame stands for so much longer."""
        if self.durations:
            self.durations[-1] += duration or 0

    def missed(self, hole: Hole, *, slotted: bool) -> Iterator[tuple[int, Hole]]:
        """A hole comes next, to be filled when all is known; `slotted` frames stand at the times at
        which they are decoded. Before the first frame nothing is missing."""
        if not slotted:
            yield len(self.pts), hole
        for at in range(hole.begin, hole.begin + hole.missing) if slotted and self.pts else ():
            self.add(at, at, 1, key=at == hole.begin, lost=True)

    def delays(self) -> Ints:
        """How much later than decoded frames are shown, at least and at most; in ticks."""
        pts, dts = np.array(self.pts, np.int64), np.array(self.dts, np.int64)
        delays = (pts - dts)[(pts != _UNTIMED) & (dts != _UNTIMED)]
        return np.array((delays.min(initial=0), delays.max(initial=0)))


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The presented frames of one stream, in decoding order.

    18 bytes a frame: ten hours at sixty frames a second take 39 MB.
    """

    pts: Ints
    """Presentation timestamps in ticks of `time_base`, unwrapped; where `counted` what their order
    lets expect, from 0 on."""
    duration: Ints
    """Durations by the container; 0 where unknown."""
    keyframe: Flags
    lost: Flags
    """Frames of which the container tells and which are not there, as beyond the end of a file that
    is cut off; only those before its last one in time."""
    promised_pts: int
    """Where the last frame ends of which the container tells."""
    first_dts: int
    """Decoding timestamp of the first packet; 0 without one."""
    time_base: Fraction
    """Seconds a tick; where `counted`, seconds a frame or, in AVI, a slot for one."""
    counted: bool
    """The file has no presentation timestamps, so frames are counted as `Slots` does."""
    sequential_reason: str | None
    """Why ranges cannot be read independently; None where they can."""
    packets: int
    """Packets that the file holds, those of frames that are not presented included."""
    jumps: int
    """Times the clock fell back or leapt ahead."""
    moved: bool
    """The clock did not come back to itself after that: its end stands elsewhere than it says."""
    cuts: int
    """Places where an edit list goes on in another part of the file."""
    marked_damaged: int
    """Packets that the container itself marks as damaged."""
    others_end_us: int
    """Where the other streams' packets end, in microseconds of the container's clock."""

    @property
    def first_pts(self) -> int:
        """Timestamp of the first presented frame."""
        return int(self.pts.min())

    @property
    def end_pts(self) -> int:
        """End of the last presented frame."""
        return min(_end(self.pts, self.duration), self.promised_pts)

    def lasting(self, ticks: int) -> Index:
        """The same, with a last frame that stands for so much longer."""
        duration = self.duration.copy()
        duration[np.argmax(self.pts)] += ticks
        return replace(self, duration=duration, promised_pts=self.promised_pts + ticks)

    @property
    def frames(self) -> int:
        """Presented frames that the file holds."""
        return len(self.pts) - int(self.lost.sum())

    def cut_points(self) -> Ints:
        """Timestamps of the keyframes from which decoding may start, ascending.

        Such a keyframe is presented after everything that is decoded before it, so that a range
        that starts there misses no frame. Empty for a video that is read in one piece.
        """
        if self.sequential_reason is not None:
            return np.empty(0, np.int64)
        latest = np.maximum.accumulate(self.pts)
        clean = self.keyframe & ~self.lost
        clean[1:] &= latest[:-1] < self.pts[1:]
        return np.sort(self.pts[clean])


def read_index(
    packets: Iterable[Packet[Stream]],
    *,
    stream_index: int,
    container: str,
    codec: str,
    extradata: bytes,
    time_base: Fraction,
    frame_rate: Fraction,
    delay: Callable[[], int],
    fields: Callable[[], bool],
    limit: int,
    holds: Callable[[Packet[Stream]], bool],
    holes: Holes | LostChunks | None,
) -> Index:
    """Read the index of one stream off a file's packets, and say whether it can be split.

    `frame_rate` and `delay` serve only files without timestamps; `delay` is asked at the end for
    the packets that the decoder took before it gave a frame, and `fields` whether that may come in
    two. `holds` tells whether a packet is in the file, or only in its tables, and `holes` what is
    missing between them. TooManyPacketsError above `limit` packets.
    """
    frames = _Frames()
    unwrapper = Unwrapper(container, time_base)
    slotted = container == "avi"
    headers, told_beside = _Headers(extradata), container not in _HEADERS_INSIDE
    found: list[tuple[int, Hole]] = []
    seen = lacking = untimed = contradictions = compared = damaged = others_end_us = 0
    for packet in holes.covering(packets) if isinstance(holes, Holes) else packets:
        if packet.stream_index != stream_index:
            others_end_us = max(others_end_us, _end_us(packet))
            continue
        seen += 1
        if seen > limit:
            raise TooManyPacketsError
        lacking += (lost := not holds(packet))
        hidden, key = packet.is_discard, packet.is_keyframe
        shown, decoded = unwrapper.times(packet.pts, packet.dts, packet.duration, hidden=hidden)
        for side in packet.iter_sidedata() if told_beside else ():
            headers.tell(side, first=seen == 1)
        damaged += packet.is_corrupt
        if key and not lost and compared < KEYFRAMES_COMPARED:
            compared += 1
            head = bytes(memoryview(packet)[:HEAD_BYTES])
            contradictions += contradicts_keyframe(codec, extradata, head)
        hole = holes.before(packet, shown, decoded) if holes is not None else None
        if hole is not None:
            found.extend(frames.missed(hole, slotted=lacks_times(container, codec)))
        if hidden or (not lost and is_hidden(codec, memoryview(packet))):
            continue
        if packet.size == 0:
            frames.repeat(packet.duration)
            continue
        untimed += shown is None
        frames.add(shown, decoded, packet.duration, key=key, lost=lost)

    times, lengths = np.array(frames.pts, np.int64), np.array(frames.durations, np.int64)
    flags, absent = np.array(frames.keys, np.bool_), np.array(frames.lost, np.bool_)
    counted = lacks_times(container, codec) if slotted else untimed * 2 > len(times)
    if counted and not slotted and fields() and len(times) - untimed > 1:
        # Packets of fields cannot be counted as frames: those with a timestamp are what there is.
        counted = False
    if counted:
        frame_rate = _rate_between(times, time_base) or frame_rate
        times, step = _expected(frames.dts, container, codec, delay())
        lengths = np.maximum(lengths, step) if slotted else np.ones(len(times), np.int64)
        time_base = time_base if slotted else 1 / frame_rate
    habit = are_numbered(container) and _MARKED_SHARE * damaged > seen
    columns = _with_missing(
        () if habit else found, frames.delays(), (times, lengths, flags, absent)
    )
    promised_pts = _end(*columns[:2])
    kept = _sampled(columns[0], columns[3])
    times, lengths = columns[0][kept], columns[1][kept]
    flags, absent = columns[2][kept], columns[3][kept]
    reasons = _sequential_reasons(
        times,
        flags,
        counted=counted,
        untimed=untimed,
        changes=headers.changes,
        jumps=unwrapper.jumps,
        cuts=unwrapper.cuts,
        contradictions=contradictions,
    )
    return Index(
        pts=times,
        duration=lengths,
        keyframe=flags,
        lost=absent,
        promised_pts=promised_pts,
        first_dts=next((one for one in frames.dts if one != _UNTIMED), 0),
        time_base=time_base,
        counted=counted,
        sequential_reason=next(reasons, None),
        packets=seen - lacking,
        jumps=unwrapper.jumps,
        moved=unwrapper.moved,
        cuts=unwrapper.cuts,
        marked_damaged=damaged,
        others_end_us=others_end_us,
    )


def _rate_between(pts: Ints, time_base: Fraction) -> Fraction | None:
    """Frames a second of a stream of which only some packets have timestamps, as broadcasts' may;
    from what they hold FFmpeg would guess a rate as low as they are."""
    timed = np.flatnonzero(pts != _UNTIMED)
    if len(timed) < 2:
        return None
    first, last = int(timed[0]), int(timed[-1])
    seconds = int(pts[last] - pts[first]) * time_base
    return (last - first) / seconds if seconds > 0 else None


def _end_us(packet: Packet[Stream]) -> int:
    """Where a packet ends, in microseconds; 0 without a timestamp."""
    if packet.pts is None:
        return 0
    return int((packet.pts + (packet.duration or 0)) * packet.time_base * 1_000_000)


def _sampled(pts: Ints, lost: Flags) -> Flags:
    """Which packets' frames may be samples: those with a timestamp, and of the lost ones those
    before the last one that is there and at the time of no other."""
    timed: Flags = pts != _UNTIMED
    if lost.any():
        there = pts[timed & ~lost]
        timed &= pts <= there.max(initial=_UNTIMED)
        timed &= ~(lost & np.isin(pts, there))
    return timed


_Columns = tuple[Ints, Ints, Flags, Flags]
"""Of frames: their timestamps, their durations, whether they are keyframes, and lost."""


def _with_missing(found: Sequence[tuple[int, Hole]], delays: Ints, columns: _Columns) -> _Columns:
    """The same frames, and those of holes found before the frames of these numbers. The first of a
    hole stands for a keyframe, for nothing tells that none is missing."""
    if not found:
        return columns
    pts, duration, keyframe, lost = columns
    there = np.sort(pts[pts != _UNTIMED])
    missing = [missing_times(hole, there, delays) for _number, hole in found]
    count = [len(times) for times in missing]
    at = np.repeat([number for number, _hole in found], count)
    steps = np.repeat([hole.step for _number, hole in found], count)
    return (
        np.insert(pts, at, np.concatenate(missing)),
        np.insert(duration, at, steps),
        np.insert(keyframe, at, np.diff(at, prepend=-1) > 0),
        np.insert(lost, at, True),
    )


def _end(pts: Ints, duration: Ints) -> int:
    """Where the last frame ends; 0 without frames."""
    if not len(pts):
        return 0
    last = int(np.argmax(pts))
    return int(pts[last]) + (int(duration[last]) or _usual_duration(pts))


def _usual_duration(pts: Ints) -> int:
    return max(1, int(np.median(np.diff(np.sort(pts))))) if len(pts) > 1 else 1


def _expected(dts: array[int], container: str, codec: str, delay: int) -> tuple[Ints, int]:
    """When the frames of packets are shown of which a decoder takes so many before it gives one;
    and how long the last one is."""
    slots, times = Slots(container, codec), array("q")
    for number, one in enumerate(dts):
        slots.feed(None if one == _UNTIMED else one)
        if number >= delay:
            times.append(slots.time())
    times.extend(slots.time() for _ in range(len(times), len(dts)))
    return np.array(times, np.int64), slots.step


def _sequential_reasons(
    pts: Ints,
    keyframe: Flags,
    *,
    counted: bool,
    untimed: int,
    changes: int,
    jumps: int,
    cuts: int,
    contradictions: int,
) -> Iterator[str]:
    """Why the ranges of a video cannot be read independently of each other, the gravest first."""
    if counted:
        yield "the file has no presentation timestamps: frames are counted"
    if jumps:
        yield f"the clock jumps {jumps} times: recordings were joined, or timestamps are damaged"
    if changes:
        yield f"headers or palette of the stream change {changes} times"
    if cuts:
        yield "the edit list presents several parts of the file one after the other"
    if untimed:
        yield f"{untimed} frames have no presentation timestamp"
    if contradictions:
        yield "marked keyframes are not intra pictures (intra refresh or a lost keyframe table)"
    if len(np.unique(pts)) < len(pts):
        yield "presentation timestamps repeat"
    if keyframe.sum() < 2:
        yield "fewer than two keyframes"
    if (np.diff(pts[keyframe]) <= 0).any():
        yield "keyframes are not in the order of their timestamps"
