"""Clocks of recorders that stray, fall back and leave slots empty: where each frame stands."""

from __future__ import annotations

from fractions import Fraction

from workers.footage.clock import Unwrapper

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


def test_a_clock_of_broadcasts_does_not_come_back() -> None:
    """A recorder's clock that leaps and falls goes on by the last packet's end, though it may meet
    an earlier time by chance."""
    clock: Clock = [100, 110, 3000, 3010, 135, 145]
    assert running("mpegts", clock) == ([100, 110, 120, 130, 140, 150], 2)


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
