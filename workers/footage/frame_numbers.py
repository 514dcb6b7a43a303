"""Pictures of an H.264 stream that are missing, by the numbers of those that are there.

Every picture that others may refer to has the number after the last such one before it, so where a
number is passed over, a reference is missing (ITU-T H.264 7.4.3, frame_num). Decoders make one up
and say nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from workers.footage.units import units

_SLICE, _PARTITION_A, _IDR_SLICE, _SEQUENCE, _PICTURE = 1, 2, 5, 7, 8
_HEADER_BYTES, _SLICE_HEADER_BYTES = 2**10, 32
"""Bytes of a unit in which what is read of it stands: scaling lists are long."""
_WITH_CHROMA_FORMAT = frozenset((44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244))
"""Profiles whose sequence headers tell more of their colours (7.3.2.1.1)."""
_CHROMA_444 = 3
_MOST_SEQUENCES, _MOST_HEADERS, _MOST_NUMBER_BITS = 32, 256, 16
_MOST_ZEROS = 32
"""Leading zeros of the longest Exp-Golomb code."""
_MOST_PICTURES = 8
"""Beginnings of pictures or fields in one packet; no packet has so many."""
_STEADY = 3
"""Packets in a row whose numbers are right, before one that is not is believed: servers of
conferences drop temporal layers, and not all of them say so."""
_AFTER_RESET = 1
"""The numbers up to this one may follow a picture that resets them with all its references, by
memory_management_control_operation 5."""


class FrameNumbers:
    """Follows the numbers of pictures fed one after the other, from a keyframe on."""

    def __init__(self) -> None:
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_of: dict[int, int] = {}
        self.restart()

    def learn(self, extradata: bytes) -> None:
        """Take over the headers of a configuration record, or those between start codes."""
        if extradata[:1] != b"\1":
            for begin, end in units(extradata, 0):
                self._learn(extradata[begin:end])
            return
        at = 5
        for mask in (0x1F, 0xFF):
            count = int.from_bytes(extradata[at : at + 1]) & mask
            at += 1
            for _ in range(count):
                end = at + 2 + int.from_bytes(extradata[at : at + 2])
                self._learn(extradata[at + 2 : end])
                at = end

    def restart(self) -> None:
        """What comes next does not follow on what came before."""
        self._reference: int | None = None
        """The number of the last picture that others may refer to."""
        self._latest = 0
        self._latest_referred = True
        self._shared = False
        self._steady = 0

    def pass_over(self, data: bytes, length_size: int, *, keyframe: bool) -> bool:
        """Whether a reference picture is missing before this packet: not before a keyframe, nor
        where anything is not understood."""
        if keyframe:
            self.restart()
        missing = False
        pictures = 0
        for begin, end in units(data, length_size):
            kind = data[begin] & 0x1F
            if kind in (_SEQUENCE, _PICTURE):
                self._learn(data[begin : min(end, begin + _HEADER_BYTES)])
            elif kind in (_SLICE, _PARTITION_A, _IDR_SLICE):
                # The first macroblock is 0 where a picture or field begins.
                if pictures and not data[begin + 1 : begin + 2] >= b"\x80":
                    continue
                pictures += 1
                number = self._number(data[begin + 1 : begin + _SLICE_HEADER_BYTES])
                if number is None or pictures > _MOST_PICTURES:
                    self.restart()
                    return False
                if kind == _IDR_SLICE:
                    self.restart()
                referred = data[begin] >> 5 & 3 != 0
                missing |= self._follow(*number, referred=referred, anew=pictures == 1)
        return missing

    def _follow(self, number: int, modulus: int, *, referred: bool, anew: bool) -> bool:
        missing = False
        if self._reference is None:
            self._reference = number
        elif number == (self._reference + 1) % modulus:
            self._steady += anew
            if referred:
                # Some encoders may count every picture: of this one that is known now.
                self._shared |= not self._latest_referred and number == self._latest
                self._reference = number
        elif number != self._reference:
            counts_all = not self._latest_referred and not self._shared
            counted = counts_all and number == (self._latest + 1) % modulus
            missing = self._steady >= _STEADY and number > _AFTER_RESET and not counted
            self._steady = 0
            self._reference = number if referred else (number - 1) % modulus
        self._latest, self._latest_referred = number, referred
        return missing

    def _number(self, header: bytes) -> tuple[int, int] | None:
        """The frame number by a slice's header, and their modulus."""
        bits = _Bits(header)
        try:
            bits.unsigned()
            bits.unsigned()
            sequence = self._sequences[self._sequence_of[bits.unsigned()]]
            bits.read(2 if sequence.separate_planes else 0)
            number = bits.read(sequence.number_bits)
        except (KeyError, _NoHeader):
            return None
        return None if sequence.gaps_allowed else (number, 1 << sequence.number_bits)

    def _learn(self, unit: bytes) -> None:
        kind = unit[0] & 0x1F if unit else 0
        # Of a damaged one decoders take nothing, and go on with the one before.
        with suppress(_NoHeader):
            if kind == _SEQUENCE:
                self._sequences |= [_sequence(unit[1:])]
            elif kind == _PICTURE:
                bits = _Bits(unit[1:_SLICE_HEADER_BYTES])
                identity, sequence = bits.unsigned(below=_MOST_HEADERS), bits.unsigned()
                if sequence in self._sequences:
                    self._sequence_of[identity] = sequence


class _Sequence(NamedTuple):
    """What of a sequence's header tells how numbers are read."""

    number_bits: int
    gaps_allowed: bool
    separate_planes: bool


def _sequence(header: bytes) -> tuple[int, _Sequence]:
    """The number of a sequence parameter set, and what it says (7.3.2.1.1)."""
    bits = _Bits(header)
    profile = bits.read(8)
    bits.read(16)
    identity = bits.unsigned(below=_MOST_SEQUENCES)
    separate_planes = False
    if profile in _WITH_CHROMA_FORMAT:
        chroma_format = bits.unsigned()
        if chroma_format == _CHROMA_444:
            separate_planes = bits.read(1) == 1
        bits.unsigned()
        bits.unsigned()
        bits.read(1)
        if bits.read(1):
            for number in range(12 if chroma_format == _CHROMA_444 else 8):
                if bits.read(1):
                    _pass_scaling_list(bits, 16 if number < 6 else 64)
    number_bits = 4 + bits.unsigned(below=_MOST_NUMBER_BITS - 3)
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.read(1)
        bits.signed()
        bits.signed()
        for _ in range(bits.unsigned(below=256)):
            bits.signed()
    bits.unsigned()
    return identity, _Sequence(number_bits, bits.read(1) == 1, separate_planes)


def _pass_scaling_list(bits: _Bits, size: int) -> None:
    """Read over a list of weights, which ends where the next one would be 0 (7.3.2.1.1.1)."""
    weight = 8
    for _ in range(size):
        weight = (weight + bits.signed()) % 256
        if weight == 0:
            return


class _NoHeader(Exception):
    """A header ends too early, or holds what none may."""


class _Bits:
    """The bits of a unit, without the bytes that keep start codes out of it."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")
        self._bits = int.from_bytes(data)
        self._left = len(data) * 8

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise _NoHeader
        return self._bits >> self._left & (1 << count) - 1

    def unsigned(self, below: int = 2**32) -> int:
        """An unsigned Exp-Golomb number (9.1)."""
        zeros = self._left - (self._bits & (1 << self._left) - 1).bit_length()
        if zeros >= min(_MOST_ZEROS, self._left):
            raise _NoHeader
        self._left -= zeros
        number = self.read(zeros + 1) - 1
        if number >= below:
            raise _NoHeader
        return number

    def signed(self) -> int:
        """A signed one (9.1.1)."""
        number = self.unsigned()
        return (number + 1) // 2 if number % 2 else -(number // 2)
