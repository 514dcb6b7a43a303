"""The running time of a video's frames: by timestamps that jump, or by counting if there are none.

Index and decoder feed these the same packets in the same order, and so agree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

_REORDERED = {"mpeg4": 0, "h264": 16, "hevc": 16}
"""Codecs with reordered frames, which AVI stores without presentation timestamps; and by how many
packets their decoders may come to delay frames more than the first. Of MPEG-4 it is never more:
packets without a frame say that there is no picture."""
_REMEMBERED = 64
"""Packets that are remembered behind the next frame's; no decoder holds back so many frames."""
_RUNNING_CLOCKS = frozenset(("mpegts", "mpeg", "flv"))
"""Containers that stamp packets by the recorder's clock. A leap of it is no picture that stands
for long, but another recording or damage; in other containers a frame lasts until the next."""
_FALL_S = Fraction(1, 10)
"""Seconds by which decoding timestamps may fall back without another recording's beginning."""
_LEAP_S, _LEAP_STEPS = 10, 16
"""What a running clock may step ahead, in seconds (the threshold of the ffmpeg command) or in steps
of the one before (no codec reorders over more frames), whichever is more."""
_ASTRAY = 16
"""Packets for which one damaged timestamp may lead a running clock astray: it has few between two
timestamps, whose times follow from it. What comes back later does so by chance."""


@dataclass(slots=True)
class _Stray:
    """A clock that leapt or fell back, and may have been led astray."""

    due: int
    """When it is back where it would be, in its own ticks."""
    shift: int
    packets: int = 0


class Unwrapper:
    """Turns timestamps that fall back (joined recordings, wrapped clocks), and those of a running
    clock that leap ahead, into one running time.

    Index and decoder feed it the same packets in the same order and so agree.
    """

    def __init__(self, container: str, time_base: Fraction) -> None:
        self.jumps = 0
        """Packets that did not follow the one before, or are shown at another time than decoded."""
        self.cuts = 0
        """Places where an edit list goes on in another part of the file."""
        self._runs = container in _RUNNING_CLOCKS
        self._fall = int(_FALL_S / time_base)
        self._leap = int(_LEAP_S / time_base) if self._runs else 2**63
        self._shift = 0
        self._dts: int | None = None
        self._step = 0
        self._next = 0
        self._stray: _Stray | None = None
        self._far = int(_LEAP_S / time_base)
        self._hidden = False

    @property
    def moved(self) -> bool:
        """Whether what was read last stands elsewhere than its own clock says."""
        return self._shift != 0

    def times(
        self, pts: int | None, dts: int | None, duration: int | None, *, hidden: bool = False
    ) -> tuple[int | None, int | None]:
        """A packet's presentation and decoding timestamps in running time; `hidden` where an edit
        list keeps it from being presented."""
        if dts is None:
            return (None if pts is None else pts + self._shift), None
        farthest = max(self._leap, _LEAP_STEPS * self._step)
        if self._dts is not None:
            step = dts - self._dts
            if step < 0 and (hidden or self._hidden):
                # Hidden packets, decoded after an edit or for the next, overlap what is presented,
                # whose times are right as they stand.
                self.cuts += 1
                self._dts = None
            elif (stray := self._stray) is not None and self._is_back(stray, dts, step):
                self._shift, self._stray = stray.shift, None
                self.jumps += 1
                self._dts = None
            elif step < -self._fall or step > farthest:
                self._note_stray()
                self._shift += self._next - dts
                self.jumps += 1
                self._dts = None
            elif step > self._longest_pause():
                self._note_stray()
            if step > 0:
                self._step = step
        self._hidden = hidden
        end = dts + (duration or 1)
        if self._dts is None:
            self._dts, self._next = dts, end
        else:
            self._dts, self._next = max(self._dts, dts), max(self._next, end)
        if self._runs and self._stray is not None:
            self._stray.due += duration or 1
            self._stray.packets += 1
            if self._stray.packets == _ASTRAY:
                self._stray = None
        if pts is not None and abs(pts - dts) > farthest:
            self.jumps += 1
            pts = dts
        return (None if pts is None else pts + self._shift), dts + self._shift

    def _longest_pause(self) -> int:
        """Steps above this may be those of a clock that strays."""
        if self._runs:
            return max(self._fall, 2 * self._step)
        return max(self._far, _LEAP_STEPS * self._step)

    def _note_stray(self) -> None:
        # Several damaged timestamps in a row lead away from the same clock.
        if not self._runs or self._stray is None or self._stray.shift == self._shift:
            self._stray = _Stray(self._next, self._shift)

    def _is_back(self, stray: _Stray, dts: int, step: int) -> bool:
        """Whether the clock goes on where it was before it strayed: the timestamp of one packet, or
        of one cluster of Matroska, was damaged. Clocks of recorders are exact where they are."""
        led_on = stray.shift == self._shift
        if self._runs:
            return (step < -self._fall or not led_on) and abs(dts - stray.due) <= self._fall
        if led_on:
            return step < -self._fall and dts >= stray.due - self._fall
        return abs(dts + stray.shift - self._next - self._shift) <= self._fall


def lacks_times(container: str, codec: str) -> bool:
    """True for files whose presentation timestamps FFmpeg makes up: of AVI no others lack them."""
    return container == "avi" and codec in _REORDERED


class Slots:
    """Times of the frames of a video without presentation timestamps, in the order of presentation
    and from the first one on, in ticks. `feed` and `time` are called as a decoder takes packets
    and gives frames.

    AVI has a slot for each tick and leaves those of dropped frames empty. The first frame stands
    at the slot of the packet that brings it out of the decoder, and each one after it at the next
    packet's: a decoder that later delays more frames shows none of them later. In other containers
    the frames follow each other.
    """

    def __init__(self, container: str, codec: str) -> None:
        self._slotted = container == "avi"
        self._packets: deque[int] = deque()
        self._number = self._next = self._due = 0
        self._delay: int | None = None
        self._first = 0
        self._steps: deque[int] = deque(maxlen=2)
        self._newest: int | None = None
        self._lost: deque[tuple[int, bool]] = deque()
        self._most_waiting = 1 + _REORDERED.get(codec, 0)
        self.misses = self._slotted and self._most_waiting > 1
        """Whether it is seen at keyframes how many frames have not come."""
        self._given: deque[int] = deque(maxlen=self._most_waiting)
        self._tells: bool | None = None
        self._doubted = False
        self._latest_lost = self._latest_key = self._at = -1
        self.late = False
        """Whether the latest frame was fed before a lost one, and when it is shown is not sure."""
        self.stray = False
        """Whether it should have come before a keyframe that came already: it has no time."""
        self.held = False
        """Whether it came after all packets. Where the file is cut off, when it is shown is not
        sure either: others might have come before it."""
        self.passed: list[tuple[int, bool]] = []
        """Times of frames that are lost between the latest two, and whether they were keyframes."""

    @property
    def step(self) -> int:
        """What frames last of which no packet tells: the shorter of the last two steps, for the
        other may be a pause."""
        return min(self._steps, default=1)

    @property
    def end(self) -> int:
        """Where the latest frame ends, if none follows earlier."""
        return self._at + self.step

    def feed(self, dts: int | None) -> None:
        """The decoder takes the packet of this decoding timestamp."""
        if not self._slotted or dts is None:
            return
        if self._newest is not None and dts > self._newest:
            self._steps.append(dts - self._newest)
        self._newest = dts
        self._packets.append(dts)
        # What would wait for longer is no frame: its packet gave none. Behind damage it is lost.
        waiting = self._most_waiting + len(self._lost)
        self._due = max(self._next, self._due, self._number + len(self._packets) - waiting)
        if not (self._lost or (self._doubted and self.misses)):
            self._next = self._due
        while self._number < self._next - _REMEMBERED:
            self._packets.popleft()
            self._number += 1

    def lose(self, dts: int | None, *, key: bool) -> None:
        """The frame of this decoding timestamp, perhaps a keyframe, will not come."""
        if self._slotted and dts is not None:
            self._lost.append((dts, key))
            self._packets.append(dts)
            self._doubted = True

    def doubt(self, dts: int | None) -> None:
        """The packet of this decoding timestamp is torn, and may give no frame: what was fed before
        it and comes later may be shown later, too."""
        if self.misses and dts is not None:
            self._latest_lost = max(self._latest_lost, dts)

    def time(self, fed: int | None = None, *, key: bool = False) -> int:
        """The time of the next frame that the decoder gives; `fed` is the decoding timestamp of its
        packet, `key` whether it is a keyframe. Frames that were fed before a lost one count as
        shown before it."""
        self.passed = []
        self.stray = fed is not None and fed < self._latest_key and self._latest_lost >= 0
        if self.stray:
            return self._at
        for _ in range(self._due - self._next):
            self._pass(key=False)
        # What does not decode as a whole may be given all the same.
        self._lost = deque(lost for lost in self._lost if lost[0] != fed)
        while self._lost and (fed is None or self._lost[0][0] < fed):
            self._latest_lost, lost_key = self._lost.popleft()
            self._pass(key=lost_key)
        latest_lost = self._lost[0][0] if self._lost else self._latest_lost
        self.late = self._delay is not None and fed is not None and fed < latest_lost
        if fed is not None:
            if key and self.misses and not self.late:
                self._find(fed)
                self._latest_key = fed
            self._given.append(fed)
        self.held = self._next >= self._number + len(self._packets)
        self._at = self._following()
        return self._at

    def _find(self, fed: int) -> None:
        """The place of a keyframe is known: what was fed before it is shown before it. Behind
        damage decoders swallow frames without a word, which will not come then."""
        place = bisect_left(self._packets, fed)
        if self._delay is None or place == len(self._packets):
            return
        leading = sum(given > fed for given in self._given)
        due = self._number + place + leading + self._delay
        if self._tells is None:
            # Not where a frame comes in several packets.
            self._tells = self._latest_lost >= 0 or due == self._next
        if self._tells:
            for _ in range(due - self._next):
                self._pass(key=False)
            self._next = due
            place = due - self._number
            if self._doubted and place < len(self._packets):
                # What came since was of no sure time.
                self._at = min(self._at, self._packets[place] - self._first - 1)
            self._doubted = bool(self._lost)

    def _pass(self, *, key: bool) -> None:
        """A frame is shown next that will not come."""
        if self._delay is None:
            self._next += 1
        else:
            self._at = self._following()
            self.passed.append((self._at, key))

    def _following(self) -> int:
        place = self._next - self._number
        if not self._packets or (self._delay is None and place >= len(self._packets)):
            return self.end
        if self._delay is None:
            self._first = self._lost[0][0] if self._lost else self._packets[-1]
            self._delay = self._number + bisect_left(self._packets, self._first)
            self._next = self._delay + 1
            return self._at + 1
        self._next += 1
        beyond = place - len(self._packets) + 1
        if beyond > 0:
            return max(self.end, self._packets[-1] - self._first + beyond * self.step)
        return max(self._at + 1, self._packets[place] - self._first)
