"""Exit codes: what every command and service of nightreel tells the shell."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The number a process ends with; the name says what a script may conclude."""

    OK = 0
    """All that was asked is done."""
    UNEXPECTED = 1
    """A fault of the program."""
    USAGE = 2
    """The command line or a file it names is wrong; nothing was started."""
    INCOMPLETE = 3
    """Some video is partial, rejected, failed, or still to be analysed."""
    FLAGGED = 4
    """Asked for flags, and some are raised."""
    QUEUE = 10
    """The queue cannot be reached, or refuses."""
    DATABASE = 11
    """The database cannot be reached, or refuses."""
    API = 12
    """The classification API cannot be reached, or refuses."""
    INTERRUPTED = 130
    """Stopped by the user."""


MEANINGS = {
    ExitCode.OK: "all that was asked is done",
    ExitCode.UNEXPECTED: "unexpected fault of the program",
    ExitCode.USAGE: "wrong usage; nothing was started",
    ExitCode.INCOMPLETE: "something is partial, rejected, failed, or still to be analysed",
    ExitCode.FLAGGED: "flags are raised (`nightreel flags` alone)",
    ExitCode.QUEUE: "queue unreachable or refusing",
    ExitCode.DATABASE: "database unreachable or refusing",
    ExitCode.API: "API unreachable or refusing",
    ExitCode.INTERRUPTED: "interrupted",
}
"""One line a code, as help texts and the documentation show them."""
