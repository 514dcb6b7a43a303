"""How far a run is, in numbers that a person can trust."""

from __future__ import annotations

import io
import sys

import pytest

from nightreel.progress import ProgressDisplay, Rates, Snapshot


def snapshot(samples: int, covered_s: float, *, planning: bool = False) -> Snapshot:
    return Snapshot(1, 4, 2, 8, samples, int(covered_s * 1e6), 400_000_000, planning)


def test_rates_are_those_of_the_last_half_minute() -> None:
    """A slow start does not linger in the figures, and a pause shows."""
    now = [0.0]
    rates = Rates(lambda: now[0])
    rates.add(snapshot(0, 0))
    for second in range(1, 101):
        now[0] = float(second)
        done = 0 if second <= 50 else 2 * (second - 50)
        rates.add(snapshot(done, done))
    frames, times_real = rates.per_second()
    assert frames == pytest.approx(2, rel=0.05)
    assert times_real == pytest.approx(2, rel=0.05)
    assert rates.eta_s() == pytest.approx(150, rel=0.05)
    for second in range(101, 141):
        now[0] = float(second)
        rates.add(snapshot(100, 100))
    assert rates.per_second() == (0, 0)
    assert rates.eta_s() is None


def test_away_from_a_terminal_lines_are_plain_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log there is a line now and then, without control characters."""
    talk = io.StringIO()
    monkeypatch.setattr(sys, "stderr", talk)
    clock = [0.0]
    with ProgressDisplay(lambda: clock[0]) as display:
        for second in range(60):
            clock[0] = float(second)
            display.show(snapshot(second, second))
    lines = talk.getvalue().splitlines()
    assert 3 <= len(lines) <= 8
    assert "1/4 videos, 2/8 tasks" in lines[-1]
    assert "1 frames/s, 1x real time" in lines[-1]
    assert "left" in lines[-1]
    assert "\x1b" not in talk.getvalue()


def test_while_planning_no_time_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as more videos may come, totals are marked and nothing is said of the end."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressDisplay() as display:
        display.show(snapshot(0, 0, planning=True))
        line = display.line(snapshot(10, 10, planning=True))
    assert "1/4+ videos" in line
    assert "left" not in line
