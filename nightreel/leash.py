"""Run one command that cannot outlive the process that asked for it.

    python -m nightreel.leash GRACE_SECONDS COMMAND [ARGUMENT ...]

The parent holds the writing end of this process's standard input. When that pipe closes, because
the parent let go or because it was killed, the whole process group, which this process leads and
the command is in, is told to end (SIGTERM) and, after the grace, made to (SIGKILL). Pipes do this
on every POSIX system and survive a `kill -9` of the parent; a parent-death signal is Linux's alone
and is lost on some execs. Should this process itself be killed, the parent ends the group, whose
number is this process's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(arguments: list[str]) -> int:
    """Run `arguments[1:]`; return its exit code, or 128 + the signal that ended it."""
    grace_s = float(arguments[0])
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    ending = threading.Event()

    def end() -> None:
        if ending.is_set():
            return
        ending.set()
        os.killpg(0, signal.SIGTERM)
        threading.Timer(grace_s, os.killpg, (0, signal.SIGKILL)).start()

    signal.signal(signal.SIGTERM, lambda *_: end())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(arguments[1:], stdin=subprocess.DEVNULL)

    def wait_for_the_parent() -> None:
        while os.read(0, 1024):
            pass
        end()

    threading.Thread(target=wait_for_the_parent, daemon=True).start()
    code = child.wait()
    if ending.is_set():
        # What the command started and left behind ends with it, and so does this process.
        os.killpg(0, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
