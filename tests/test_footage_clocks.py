"""Clocks of recorders that stray, fall back and leave slots empty: where each frame stands."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from footage_files import encode, frames, x264

from storage.records import Fit, Gap, Sampling, SamplingMode
from workers.footage.clock import Unwrapper
from workers.footage.decode import read_range
from workers.footage.plan import plan
from workers.footage.probe import probe

Clock = list[int | None]


def running(container: str, clock: Clock) -> tuple[Clock, int]:
    """Decoding timestamps in running time, at a tick of 10 ms and ten ticks a frame; and jumps."""
    unwrapper = Unwrapper(container, Fraction(1, 100))
    return [unwrapper.times(dts, dts, 10)[1] for dts in clock], unwrapper.jumps


def test_a_joined_recording_whose_clock_strays_comes_back_to_itself() -> None:
    """What strays in the second of two recordings is back in the second one's time, and not in the
    first one's."""
    clock: Clock = [1000, 1010, 0, 10, 5010, 5020, 40, 50]
    times: Clock = [1000, 1010, 1020, 1030, 6030, 6040, 1060, 1070]
    assert running("matroska,webm", clock) == (times, 2)


def test_a_clock_that_is_back_may_fall_for_good() -> None:
    """A fall after a stray one that has ended begins another recording."""
    clock: Clock = [100, 110, 2110, 140, 150, 160, 125, 135]
    times: Clock = [100, 110, 2110, 140, 150, 160, 170, 180]
    assert running("matroska,webm", clock) == (times, 2)


def test_a_clock_is_back_before_a_frame_is_due() -> None:
    """Timestamps of two streams differ by a little: what stands a tick early is back all the
    same; what stands seconds later than its due is another recording."""
    late: Clock = [100, 110, 2110, 2120, 115, 130]
    assert running("matroska,webm", late) == (late, 1)
    early: Clock = [1000, 1010, 100, 110, 1500, 1510]
    assert running("matroska,webm", early) == ([1000, 1010, 1020, 1030, 2420, 2430], 1)


def test_pictures_that_stand_long_are_no_stray_clock() -> None:
    """A slideshow, and another one behind it whose clock begins in the middle of the first one's:
    they are shown one after the other."""
    clock: Clock = [0, 900, 2800, 4800, 2805]
    assert running("matroska,webm", clock) == ([0, 900, 2800, 4800, 4810], 1)


def test_a_tick_back_does_not_make_a_slow_clock_leap() -> None:
    """A frame every twenty seconds is the step of such a stream, whatever came in between."""
    clock: Clock = [0, 900, 899, 2800, 4800]
    assert running("mpegts", clock) == (clock, 0)


@pytest.mark.parametrize("wrong", [-5000, -500, -30, 30, 500, 5000])
def test_one_damaged_timestamp_of_a_running_clock_moves_nothing_else(wrong: int) -> None:
    """A recorder's clock that is back in time goes on as if it had not strayed, with however many
    packets whose times follow from the damaged timestamp, or with several that are damaged."""
    for damaged in ({3}, {3, 4, 5}, set(range(3, 18))):
        clock: Clock = [1000 + 10 * n + wrong * (n in damaged) for n in range(30)]
        whole = [time for n, time in enumerate(running("mpegts", clock)[0]) if n not in damaged]
        assert whole == [1000 + 10 * n for n in range(30) if n not in damaged]
    twice: Clock = [1000, 1010, 20, 4030, 1040, 1050]
    assert running("flv", twice)[0] == [1000, 1010, 1020, 1030, 1040, 1050]


def moved(stamp: bytes, later_ms: int) -> bytes:
    """A timestamp of MPEG-TS, so much later: 33 bits in three parts (ISO/IEC 13818-1, 2.4.3.6)."""
    bits = int.from_bytes(stamp)
    time = (bits >> 33 & 7) << 30 | (bits >> 17 & 0x7FFF) << 15 | bits >> 1 & 0x7FFF
    time += later_ms * 90
    parts = (time >> 30 & 7) << 33 | (time >> 15 & 0x7FFF) << 17 | (time & 0x7FFF) << 1
    return (bits & ~(7 << 33 | 0x7FFF << 17 | 0x7FFF << 1) | parts).to_bytes(5)


def misdate(path: Path, number: int, later_ms: int) -> None:
    """Change the timestamps of one packet of a Flash file or a transport stream."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".flv":
        at = 13
        for _tag in range(number):
            at += 11 + int.from_bytes(data[at + 1 : at + 4]) + 4
        milliseconds = int.from_bytes(data[at + 4 : at + 7]) + later_ms
        data[at + 4 : at + 7] = milliseconds.to_bytes(3)
    else:
        at = -1
        for _packet in range(number):
            at = data.index(b"\0\0\1\xe0", at + 1)
        for stamp in (9, 14)[: (data[at + 7] >> 6) - 1]:
            data[at + stamp : at + stamp + 5] = moved(data[at + stamp : at + stamp + 5], later_ms)
    path.write_bytes(data)


def shown(path: Path) -> dict[int, bytes]:
    """The pictures of all frames by when they begin, in microseconds."""
    sampling = Sampling(SamplingMode.EVERY_FRAME, None)
    info, index = probe(os.fspath(path))
    return {
        result.start_us: result.picture.tobytes()
        for task in plan(info, index, sampling)
        for result in read_range(os.fspath(path), info, task, sampling, size=32, fit=Fit.SQUASH)
        if not isinstance(result, Gap)
    }


@pytest.mark.parametrize("later_ms", [-1000, 4990])
@pytest.mark.parametrize("suffix", ["ts", "flv"])
def test_frames_stand_where_they_stood_but_for_the_damaged_timestamps_own(
    suffix: str, later_ms: int, tmp_path: Path
) -> None:
    """Of a file with one damaged timestamp all other frames are shown when they were; its own too
    where the clock fell back."""
    path = encode(tmp_path / f"clock.{suffix}", frames(240), options=x264())
    whole = shown(path)
    misdate(path, 46, later_ms)
    info, _index = probe(os.fspath(path))
    assert info.duration_us == 8_000_000
    other = shown(path).items() ^ whole.items()
    assert len({start_us for start_us, _picture in other}) == (2 if later_ms > 0 else 0)


def test_a_running_clock_that_strays_for_long_is_another_recording() -> None:
    """What meets the time of the recording before after more than sixteen packets does so by
    chance, and goes on by the last packet's end."""
    clock: Clock = [100, 110, *range(3000, 3170, 10), 285, 295]
    assert running("mpegts", clock) == ([*range(100, 290, 10), 290, 300], 2)


def test_short_recordings_in_a_row_run_on() -> None:
    """Clips of a few packets, each of which begins at the same time, come one after the other."""
    clock: Clock = [5 + 10 * n for _clip in range(4) for n in range(6)]
    assert running("mpegts", clock) == ([5 + 10 * n for n in range(24)], 3)


def test_a_pause_of_a_running_clock_is_no_stray_one() -> None:
    """Time in which nothing was recorded stays, and a recording that begins behind it begins at its
    end, be its clock only a little behind."""
    clock: Clock = [100, 110, 420, 430, 440]
    assert running("mpegts", clock) == (clock, 0)
    assert running("mpegts", [*clock, 300, 310]) == ([*clock, 450, 460], 1)
    uneven: Clock = [0, 4, 16, 17, 33, 34, 50, 51]
    assert running("mpegts", uneven) == (uneven, 0)


def test_packets_without_a_decoding_timestamp_run_on_with_the_others() -> None:
    """Behind a clock that fell back a presentation timestamp alone stands in running time too."""
    unwrapper = Unwrapper("matroska,webm", Fraction(1, 100))
    given = [(100, 100), (110, 110), (0, 0), (10, None), (None, None), (20, 20)]
    times = [unwrapper.times(pts, dts, 10)[0] for pts, dts in given]
    assert times == [100, 110, 120, 130, None, 140]


def test_pictures_that_are_shown_long_before_they_are_decoded_stand_at_that_time() -> None:
    """A damaged presentation timestamp, too early or too late, moves its own picture alone."""
    for damaged in (-5000, 5000):
        unwrapper = Unwrapper("mpegts", Fraction(1, 100))
        given = [(0, 0), (10, 10), (damaged, 20), (30, 30)]
        times = [unwrapper.times(pts, dts, 10)[0] for pts, dts in given]
        assert (times, unwrapper.jumps) == ([0, 10, 20, 30], 1)


def test_a_packet_that_ends_before_others_moves_no_recording() -> None:
    """A recording begins behind the end of all that came before it: a last packet of no duration
    does not bring it closer."""
    unwrapper = Unwrapper("mpegts", Fraction(1, 100))
    given = [(100, 10), (110, 60), (109, None), (0, 10)]
    times = [unwrapper.times(dts, dts, duration)[0] for dts, duration in given]
    assert times == [100, 110, 109, 170]
