"""End everything that a run has started, and delete its files, when the run ends in any way.

    python keeper.py DIRECTORY

The run holds the other end of standard input and never writes: the keeper waits until it closes.
Every program of the run has DIRECTORY in its command line (a name that no other run has), or is a
child of one that has. This file runs as a script, isolated from the environment, so it imports only
the standard library.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress


def main(directory: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(4096):
        pass
    end_all(directory)


def end_all(directory: str, patience: float = 15.0) -> None:
    """Kill the programs of a run, and delete its directory."""
    deadline = time.monotonic() + patience
    while (left := programs_of(directory)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)


def programs_of(directory: str) -> list[int]:
    """Return the processes that name a directory in their command line, and all below them."""
    children = _children()
    own = [pid for pid in _all_processes() if _names(pid, directory) and pid != os.getpid()]
    return [pid for each in own for pid in family(each, children)]


def family(pid: int, children: dict[int, list[int]] | None = None) -> list[int]:
    """Return a process and all its descendants."""
    if children is None:
        children = _children()
    found = [pid]
    for each in found:  # it grows while it is read
        found += children.get(each, [])
    return found


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _names(pid: int, directory: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().decode(errors="replace")
    except OSError:
        return False
    return directory in arguments and "keeper.py" not in arguments


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for pid in _all_processes():
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has ended since
        if state != "Z":
            children.setdefault(int(parent), []).append(pid)
    return children


if __name__ == "__main__":
    main(sys.argv[1])
