"""Tables as a terminal of some width shows them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rows import add_video, claimed, found, spec

from storage import database, ledger, results

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """A job of two videos, one of them longer than an hour, of which one range failed."""
    engine = database.connect(sqlite_url)
    job = ledger.open_job(engine, spec(), files=())
    for name, seconds in ("a-name-that-is-rather-long", 12), ("hours", 4000):
        add_video(engine, job.id, name, seconds, each=seconds // 2)
    ledger.finish_planning(engine, job.id)
    for task_id in ledger.feed(engine, 8):
        claim = claimed(engine, task_id)
        start = claim.frame_range.buckets[0]
        if start == 2000:
            why = "the storage did not answer for a minute: check its mount, then retry"
            ledger.give_back(engine, task_id, claim.fence, "read-error", why, 1, 0)
        else:
            assert results.commit(engine, task_id, claim.fence, found(claim, int(start > 0)))
    ledger.close_finished(engine)
    engine.dispose()
    return sqlite_url


def shown(width: int, url: str, *words: str) -> list[str]:
    """Lines of a command on a terminal of so many characters, without looks and blanks at
    their ends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    plain = {"NIGHTREEL_DATABASE_URL": url, "TZ": "UTC"}
    process = subprocess.Popen(
        [NIGHTREEL, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=kept | plain
    )
    os.close(theirs)
    out = b""
    while True:
        try:
            some = os.read(ours, 65536)
        except OSError:  # nobody writes any more
            break
        out += some
    os.close(ours)
    process.wait(60)
    text = re.sub(r"\x1b\[[\d;]*m", "", out.decode())
    return [line.rstrip() for line in text.splitlines()]


def test_the_scenes_of_a_video_fit_into_eighty_characters(database_url: str) -> None:
    """Each in a line of its own, the video named once above them."""
    name = "a-name-that-is-rather-long.mp4"
    lines = shown(80, database_url, "scenes", name)
    assert lines[0] == f"Video /archive/{name}"
    rows = [line.split() for line in lines[3:]]
    assert [row[:2] for row in rows] == [["0:00.000", "0:06.000"], ["0:06.000", "0:12.000"]]
    assert [row[4] for row in rows] == ["summer", "winter"]


@pytest.mark.parametrize("width", [30, 60, 80, 100, 200])
@pytest.mark.parametrize("words", ["scenes", "find winter", "failures", "summary", "coverage"])
def test_a_number_is_never_broken(database_url: str, words: str, width: int) -> None:
    """Times stand whole in a line that is no wider than the terminal, from 30 characters on."""
    lines = shown(width, database_url, *words.split())
    assert max(map(len, lines)) <= width
    whole = {
        "scenes": ["0:06.000", "0:12.000", "33:20.000"],
        "find winter": ["0:06.000", "0:12.000"],
        "failures": ["33:20.000", "1:06:40.000"],
        "summary": ["12.0 s", "1:06:40", "50 %"],
        "coverage": ["12.0 s", "1:06:40", "33:20"],
    }[words]
    for number in whole:
        assert any(re.search(rf"(^|\s){re.escape(number)}(\s|$)", line) for line in lines), number


def test_a_terminal_too_narrow_for_a_table_shows_field_by_field(database_url: str) -> None:
    """A line for each field that holds anything, an empty line after each row."""
    assert shown(50, database_url, "failures") == [
        "Videos in /archive/",
        "Video     hours.mp4",
        "What      range",
        "Start     33:20.000",
        "End       1:06:40.000",
        "Kind      read-error",
        "Error     the storage did not answer for a minute:",
        "          check its mount, then retry",
        "Tries     1",
        "Worker    worker",
        *[line for line in shown(50, database_url, "failures") if line.startswith("Given up")],
        "",
    ]
