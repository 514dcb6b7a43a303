"""Feeds a decoder no more than the wanted frames need.

Packets are held back until one is wanted. At a keyframe that serves every wanted frame still to
come, what was held is dropped undecoded, so of most groups of pictures little or nothing is
decoded. Pictures that no other picture refers to are skipped unless wanted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from enum import Enum, auto
from fractions import Fraction
from typing import Generic, Literal, TypeVar

import av.error
from av.packet import Packet
from av.stream import Stream
from av.video.frame import PictureType, VideoFrame

from workers.footage.clock import Slots, Unwrapper
from workers.footage.counted import Feed
from workers.footage.damage import Damage
from workers.footage.source import Source

_HELD_BYTES = 32 * 2**20
"""Undecoded packets held at most; then they are decoded, so an endless group holds no memory."""
SEARCHED = frozenset(("mpegts", "mpeg"))
"""Containers without an index, in which seeking searches the file by decoding timestamps."""
_JUMP_S, _JUMP_SEARCHED_S = 10, 600
"""Seconds of video from which on seeking costs less than reading on, with an index and without."""
BACK_S = (0, 1, 4, 16, 64)
"""Seconds by which a seek aims early, one after the other while it lands too late."""
_BACK_SEARCHED, _BACK_RETRY = 1, 2
"""Where in `BACK_S` to begin: for searched containers, and for another try at lost frames."""
_REMEMBERED = 64
"""Changes of shape that are remembered; no decoder holds back so many frames."""
_BETWEEN = 16
"""Bidirectional frames at most that wait for the frame after them, of which they may be made."""

_Taken = TypeVar("_Taken")
"""What is kept of a frame."""


class _Ending(Enum):
    """Why reading on from one place ended."""

    DONE = auto()
    LATE = auto()
    """It began after the keyframe that the next wanted frame needs."""
    FAR = auto()
    """The next wanted frame is so far away that seeking costs less."""


class _Agenda:
    """The wanted timestamps whose packets have not been fed."""

    def __init__(self, wanted: Sequence[int], fed: set[int]) -> None:
        self._pending = deque(wanted)
        self._left = Counter(wanted)
        self._fed = fed

    @property
    def next(self) -> int | None:
        """The earliest; None when nothing is left."""
        return self._pending[0] if self._pending else None

    def wants(self, pts: int | None) -> bool:
        return pts in self._left

    def feed(self, pts: int) -> None:
        self._fed.add(pts)
        self._strike(pts)
        while self._pending and self._pending[0] not in self._left:
            self._pending.popleft()

    def forget_before(self, pts: int) -> None:
        """Give up what should have come by now."""
        while self._pending and (self._pending[0] < pts or self._pending[0] not in self._left):
            self._strike(self._pending.popleft())

    def _strike(self, pts: int) -> None:
        self._left[pts] -= 1
        if self._left[pts] <= 0:
            del self._left[pts]


class _Held:
    """Packets read and not decoded."""

    def __init__(self, *, fields: bool) -> None:
        self.size = 0
        """Bytes held."""
        self._fields = fields
        self._packets: list[Packet[Stream]] = []
        self._wanted = self._before = False

    def append(self, packet: Packet[Stream]) -> None:
        self._packets.append(packet)
        self.size += packet.size

    def take(self, wants: Callable[[int | None], bool]) -> Iterator[tuple[Packet[Stream], bool]]:
        """Give them, and whether their pictures are wanted, or the second field of one that is: one
        without a timestamp always is, and with `fields` the next."""
        packets, self._packets, self.size = self._packets, [], 0
        for packet in packets:
            if packet.pts is not None:
                wanted = wants(packet.pts)
                self._wanted = wanted or (self._fields and self._before)
                self._before = wanted
            yield packet, self._wanted

    def drop(self) -> None:
        self._packets, self.size = [], 0


class _Shapes:
    """The width of a pixel by its height, which a broadcast changes at keyframes. A frame does not
    tell its own, and the decoder that gives it may have read the next one's headers by then."""

    def __init__(self, first: Fraction) -> None:
        self._changes = deque([(-(2**63), first)], maxlen=_REMEMBERED)

    def keyframe(self, pts: int, shape: Fraction) -> None:
        """What is shown from this timestamp on has that shape."""
        if self.at(pts) != shape:
            self._changes.append((pts, shape))

    def at(self, pts: int | None) -> Fraction:
        """The shape of the picture of this timestamp."""
        if pts is None or len(self._changes) == 1:
            return self._changes[-1][1]
        begun = [change for change in self._changes if change[0] <= pts]
        return max(begun, default=self._changes[0])[1]


class Decoder(Generic[_Taken]):
    """Decodes parts of one open source, and gives what `take` makes of the frames and the shape of
    their pixels: a frame that waited itself would cost a picture's memory. `beat` is called for
    every packet."""

    def __init__(
        self,
        source: Source,
        beat: Callable[[], None],
        take: Callable[[VideoFrame, Fraction], _Taken],
        *,
        fields: bool = False,
        spoilt: Callable[[_Taken], _Taken] | None = None,
        landmark: int | None = None,
    ) -> None:
        """`fields`: the second field of a picture may be a packet of its own. `spoilt`: what is
        left of a frame that damage reaches, where it does not count as not decoded. `landmark`: the
        timestamp of a packet that the file should hold."""
        self.damaged = 0
        """Packets that did not decode, and frames marked as corrupt."""
        self.fed: set[int] = set()
        """Timestamps of the wanted frames whose packets were decoded."""
        self.latest_fed = -(2**63)
        """The highest of them."""
        self.recognised = False
        """Whether the landmark was read."""
        self.packets = 0
        """Packets that `everything` has read."""
        self.ended_whole = False
        """Whether the last of them decoded."""
        self._source = source
        self._beat = beat
        self._take = take
        self._fields = fields
        self._landmark = landmark
        self._spoilt = spoilt
        self._feed: Feed | None = None
        self._keyframes_to_come: deque[int] = deque(maxlen=_REMEMBERED)
        self._unwrapper: Unwrapper | None = None
        self._keyframes = False
        self._busy = False
        self._damage = Damage(source)
        self._between: deque[tuple[tuple[int | None, ...], _Taken]] = deque()
        self._shapes = _Shapes(source.sample_aspect_ratio)
        self._searched = source.container in SEARCHED
        self._least_back = _BACK_SEARCHED if self._searched else 0
        self._jump = self._ticks(_JUMP_SEARCHED_S if self._searched else _JUMP_S)

    def wanted(
        self, wanted: Sequence[int], seek_pts: int | None, *, splittable: bool, keyframes: bool
    ) -> Iterator[_Taken | None]:
        """Frames in the decoder's order, all wanted ones that decode among them; `wanted` ascends,
        and names keyframes alone with `keyframes`. Frames that damage reaches count as not decoded.

        None stands where the decoder was emptied: wanted frames in `fed` that have not come by then
        will not come. Without `splittable` all packets are decoded, from the first on, and
        timestamps that jump are unwrapped.
        """
        if not splittable:
            source = self._source
            time_base = source.stream.time_base or Fraction(1, 1_000_000)
            self._unwrapper = Unwrapper(source.container, time_base)
        agenda = _Agenda(wanted, self.fed)
        self._keyframes = keyframes and not splittable
        # A stream whose first packet alone carries what its decoder must know (the encoder's
        # version in an H.264 stream, for one) decodes to noise from anywhere else.
        whole = seek_pts is None or not self._primed_seek(seek_pts)
        back = self._least_back
        while agenda.next is not None:
            ending = yield from self._run(agenda, whole, splittable)
            yield from self._drained()
            if ending is _Ending.DONE or agenda.next is None:
                return
            back = self._least_back if ending is _Ending.FAR else back + 1
            whole = not self._seek(agenda.next, back)

    def _run(
        self, agenda: _Agenda, whole: bool, splittable: bool
    ) -> Generator[_Taken | None, None, _Ending]:
        """Read on from here. `whole`: from the file's first packet, which needs no keyframe."""
        anchored, last_key = whole, None
        held = _Held(fields=self._fields)
        ending: _Ending | None = None
        for packet in self._packets():
            pts = packet.pts
            if splittable and packet.is_keyframe and pts is not None:
                if last_key is not None:
                    # Frames shown before the last keyframe all stand before this one in the file.
                    agenda.forget_before(last_key)
                    if agenda.next is None:
                        return _Ending.DONE
                last_key = pts
                if agenda.next is not None and pts <= agenda.next:
                    yield from self._drained()
                    held.drop()
                    anchored = True
                elif not anchored:
                    return _Ending.LATE
            if not anchored:
                continue
            held.append(packet)
            hit = agenda.wants(pts) and self._may_be_wanted(packet)
            if hit or ending is not None or held.size > _HELD_BYTES:
                for waiting, wanted in held.take(agenda.wants):
                    yield from self._decoded(waiting, only_references=not wanted)
            if ending is not None and pts is not None:
                return ending
            if hit and pts is not None:
                agenda.feed(pts)
                self.latest_fed = max(self.latest_fed, pts)
                ending = self._after(pts, agenda.next, splittable)
                if ending is not None and splittable and not self._fields:
                    return ending  # Of others the second field may come yet.
        return ending or (_Ending.DONE if anchored else _Ending.LATE)

    def _after(self, pts: int, following: int | None, splittable: bool) -> _Ending | None:
        if following is None:
            return _Ending.DONE
        return _Ending.FAR if splittable and following - pts > self._jump else None

    def _may_be_wanted(self, packet: Packet[Stream]) -> bool:
        """Whether a packet with the timestamp of a wanted one is that: edits overlap, so a hidden
        one may have it, or one that is no keyframe."""
        if self._keyframes and not packet.is_keyframe:
            packet.pts = None
            return False
        return not packet.is_discard

    def unhurt(self, pts: int) -> bool:
        """Whether the packet of this timestamp was decoded, and nothing near it is damaged."""
        return pts in self.fed and not self._damage.reached(pts)

    def everything(self, slots: Slots, frame_s: Fraction) -> Iterator[_Taken]:
        """All frames from the first packet on, in the order of presentation. Where `take` is called
        for one, `slots` knows its time; `frame_s` is how long frames last, in seconds."""
        self._feed = Feed(slots, self._source.container, max(1, self._ticks(frame_s)))
        for packet in self._packets():
            self.packets += 1
            damaged = self.damaged
            frames = list(self._decoded(packet))
            self.ended_whole = self.damaged == damaged
            yield from frames
        for drained in self._drained():
            if drained is not None:
                yield drained

    def again(self, pts: int) -> Iterator[_Taken]:
        """All frames from a keyframe well before a timestamp on, with nothing held or skipped."""
        whole, back = not self._primed_seek(pts, _BACK_RETRY), _BACK_RETRY
        while True:
            anchored = whole
            for packet in self._packets():
                if not anchored and packet.is_keyframe and packet.pts is not None:
                    if packet.pts > pts:
                        break
                    anchored = True
                if anchored:
                    yield from self._decoded(packet)
            if anchored:
                break
            back += 1
            whole = not self._seek(pts, back)
        for taken in self._drained():
            if taken is not None:
                yield taken

    def _ticks(self, seconds: int | Fraction) -> int:
        return int(seconds / (self._source.stream.time_base or 1))

    def _packets(self) -> Iterator[Packet[Stream]]:
        for packet in self._source.packets(lost=True):
            self._beat()
            if self._unwrapper is not None:
                packet.pts, packet.dts = self._unwrapper.times(
                    packet.pts, packet.dts, packet.duration, hidden=packet.is_discard
                )
            self.recognised |= packet.pts is not None and packet.pts == self._landmark
            if self._feed is not None:
                self._feed.read(packet)
            self._damage.read(packet, 0 if self._unwrapper is None else self._unwrapper.jumps)
            # Theora and NUT repeat the picture before by a packet without bytes, which decoders
            # take for an error.
            if packet.size and self._source.holds(packet):
                yield packet

    def _primed_seek(self, pts: int, back: int = 0) -> bool:
        for packet in self._packets():
            for _ in self._decoded(packet):
                pass
            break
        return self._seek(pts, max(back, self._least_back))

    def _seek(self, pts: int, back: int) -> bool:
        """Aim before a timestamp; False where reading begins at the file's first packet instead."""
        self._busy = False
        self._between.clear()
        found = back < len(BACK_S) and self._source.seek(pts - self._ticks(BACK_S[back]))
        if not found:
            self._source.rewind()
        self._damage.sought()
        return found

    def _decoded(
        self, packet: Packet[Stream], *, only_references: bool = False
    ) -> Iterator[_Taken]:
        context, feed = self._source.stream.codec_context, self._feed
        # Of frames that are counted, those that an emptied decoder leaves out would be missed.
        if (feed is None or feed.misses) and self._damage.ends_before(packet):
            yield from self._emptied()
        skip: Literal["DEFAULT", "NONREF"] = (
            "NONREF" if only_references and self._busy else "DEFAULT"
        )
        context.skip_frame = skip
        self._busy = True
        self._damage.fed(packet)
        if feed is not None and packet.is_keyframe and packet.pts is not None:
            self._keyframes_to_come.append(packet.pts)
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError:
            self.damaged += 1
            self._damage.add(packet.pts)
            if feed is not None:
                feed.taken(packet, decodes=False)
        else:
            if feed is not None:
                feed.taken(packet, decodes=True)
            # Other containers tell the shape themselves, for the whole of a stream.
            if self._searched and packet.is_keyframe and packet.pts is not None:
                self._shapes.keyframe(packet.pts, self._source.decoded_aspect_ratio)
            yield from self._judged(frames)

    def _drained(self) -> Iterator[_Taken | None]:
        if not self._busy:
            return
        yield from self._emptied()
        self._busy = False
        self._damage.emptied()
        yield None

    def _emptied(self) -> Iterator[_Taken]:
        context = self._source.stream.codec_context
        try:
            yield from self._judged(context.decode(None))
        except av.error.FFmpegError:
            self.damaged += 1
        yield from self._settled()
        context.flush_buffers()

    def _taken(self, frame: VideoFrame) -> _Taken:
        return self._take(frame, self._shapes.at(frame.pts))

    def _judged(self, frames: list[VideoFrame]) -> Iterator[_Taken]:
        for frame in frames:
            if frame.is_corrupt:
                self.damaged += 1
                self._damage.add(frame.pts)
            waits = frame.pict_type == PictureType.B
            if not waits or len(self._between) == _BETWEEN:
                yield from self._settled()
            self._between.append((self._judged_by(frame.pts), self._taken(frame)))
            if not waits:
                yield from self._settled()

    def _judged_by(self, pts: int | None) -> tuple[int | None, ...]:
        """The timestamps of which none may be damaged. By the order of decoding a frame that is
        shown before a keyframe, but fed after it, refers to what came before that, too."""
        to_come = self._keyframes_to_come
        if pts in to_come:
            while to_come.popleft() != pts:
                pass
        return pts, *(key - 1 for key in to_come if pts is not None and key < pts)

    def _settled(self) -> Iterator[_Taken]:
        """What has waited and is not damaged."""
        for judged_by, taken in self._between:
            if not any(map(self._damage.reaches, judged_by)):
                yield taken
            elif self._spoilt is not None:
                yield self._spoilt(taken)
        self._between.clear()
