"""Other libraries of the same purpose, each version in a folder of its own.

Two versions of one package cannot live in one environment, so each is installed beside the
environment when it is first asked for, and a server finds it through its PYTHONPATH. Everything
else it imports is the environment's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Git-ignored, as every folder whose name starts with `.venv`.
CACHE = Path(__file__).resolve().parent.parent / ".venv-peers"

FASTAPI_TOOLSETS = ("3.1.1", "6.0.2")


def install(*requirements: str) -> Path | None:
    """The folder that holds exactly these; `None`, with a line that says why, where they cannot be
    installed."""
    folder = CACHE / "+".join(requirements).replace("==", "-")
    if folder.exists():
        return folder
    draft = folder.with_name(folder.name + ".new")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    done = subprocess.run(
        [*command, "--target", str(draft), *requirements], capture_output=True, text=True
    )
    if done.returncode != 0:
        print(
            f"{', '.join(requirements)}: left out, because pip failed: {done.stderr.strip()[-300:]}"
        )
        return None
    draft.rename(folder)
    return folder
