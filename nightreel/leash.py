"""Run one command that cannot outlive the process that asked for it.

    python -m nightreel.leash GRACE_SECONDS COMMAND [ARGUMENT ...]

The parent holds the writing end of this process's standard input. When that pipe closes, because
the parent let go or because it was killed, the command's whole process group is told to end
(SIGTERM) and, after the grace, made to (SIGKILL). Pipes do this on every POSIX system and survive
a `kill -9` of the parent; a parent-death signal is Linux's alone and is lost on some execs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress


def main(arguments: list[str]) -> int:
    """Run `arguments[1:]` in a group of its own; return its exit code, or 128 + its signal."""
    grace_s = float(arguments[0])
    child = subprocess.Popen(arguments[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    ending = threading.Event()

    def signal_group(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def end() -> None:
        if ending.is_set():
            return
        ending.set()
        signal_group(signal.SIGTERM)
        killer = threading.Timer(grace_s, signal_group, (signal.SIGKILL,))
        killer.daemon = True
        killer.start()

    def wait_for_the_parent() -> None:
        while os.read(0, 1024):
            pass
        end()

    signal.signal(signal.SIGTERM, lambda *_: end())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_the_parent, daemon=True).start()
    code = child.wait()
    # What the command itself left behind in its group ends with it.
    signal_group(signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
