"""A child on a leash ends with its parent, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-m", "nightreel.leash", "0.5", sys.executable, sys.argv[1], sys.argv[2]],
    stdin=subprocess.PIPE, start_new_session=True)
time.sleep(60)
"""
FAMILY = """
import os, signal, subprocess, sys, time
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{{os.getpid()}} {{grandchild.pid}}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 40.0) -> bool:
    """Poll until `condition()` holds; False if it does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stubborn", [False, True], ids=["obedient", "ignores SIGTERM"])
def test_a_killed_parent_leaves_no_process(tmp_path: Path, stubborn: bool) -> None:
    """After `kill -9` of the parent, the command and what it started are gone."""
    script, pids_file = tmp_path / "family.py", tmp_path / "pids"
    script.write_text(FAMILY.format(stubborn=stubborn))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, script, pids_file])
    assert wait_until(pids_file.exists)
    pids = [int(pid) for pid in pids_file.read_text().split()]
    assert all(alive(pid) for pid in pids)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_the_exit_code_is_the_commands() -> None:
    """The leash ends with the code of its command, or 128 + the signal that ended it."""
    leash = [sys.executable, "-m", "nightreel.leash", "1", sys.executable, "-c"]
    codes = []
    for program in ("raise SystemExit(7)", "import os; os.kill(os.getpid(), 9)"):
        with subprocess.Popen([*leash, program], stdin=subprocess.PIPE) as child:
            codes.append(child.wait())
    assert codes == [7, 128 + signal.SIGKILL]


def test_what_a_command_leaves_behind_ends_with_the_parent(tmp_path: Path) -> None:
    """Letting go ends what a command started and would have left running."""
    pid_file = tmp_path / "pid"
    program = (
        "import signal, subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', "
        "'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)']); "
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    leash = [sys.executable, "-m", "nightreel.leash", "1", sys.executable, "-c", program]
    with subprocess.Popen(leash, stdin=subprocess.PIPE) as process:
        assert wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()))
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    pid = int(pid_file.read_text())
    assert wait_until(lambda: not alive(pid))
