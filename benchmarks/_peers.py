"""Other libraries of the same purpose, each version in a folder and a process of its own.

Two versions of one package cannot live in one process. Each is installed beside the environment
when it is first asked for; a process finds it through its PYTHONPATH. Everything else that it
imports is the environment's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks._harness import TURN_LIMIT, Described

#: Git-ignored.
CACHE = Path(__file__).resolve().parent.parent / "build" / "peers"

#: By contestant, how the pages name it and what is installed.
PEERS = {
    "toolsets 3": ("fastapi-toolsets 3.1.1", "fastapi-toolsets==3.1.1"),
    "toolsets 6": ("fastapi-toolsets 6.0.2", "fastapi-toolsets==6.0.2"),
    "alchemy": ("advanced-alchemy 1.12.0", "advanced-alchemy==1.12.0"),
}

#: Those with functions of the same names as ours.
TOOLSETS = ("toolsets 3", "toolsets 6")

LABELS = {name: label for name, (label, _) in PEERS.items()}


class PeerUnavailable(Described):
    """A peer cannot be installed."""


@cache
def install(*requirements: str) -> Path:
    """Return the folder that holds exactly these.

    Raises:
        PeerUnavailable: pip has failed; the message is its last line.
    """
    folder = CACHE / "+".join(requirements).replace("==", "-")
    if folder.exists():
        return folder
    draft = folder.with_name(folder.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(draft), *requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TURN_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise PeerUnavailable(f"{', '.join(requirements)} cannot be installed: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        raise PeerUnavailable(f"{', '.join(requirements)} cannot be installed: {lines[-1][:200]}")
    draft.rename(folder)
    return folder


def folder_of(peer: str) -> Path:
    """Return the folder of a peer, installed where it is missing."""
    return install(PEERS[peer][1])


if __name__ == "__main__":
    for each in PEERS:
        try:
            print(folder_of(each))
        except PeerUnavailable as unavailable:
            print(unavailable)
