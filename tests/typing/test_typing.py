"""The types refuse what is wrong: `accepted/` has what must be accepted, `rejected/` what must
not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = ROOT / "tests" / "typing" / "rejected" / "calls.py"


def run(*command: str) -> str:
    """The output of a checker that has found errors."""
    environment = dict(os.environ)
    if (ROOT / "src").exists():
        environment["MYPYPATH"] = str(ROOT / "src")
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def mypy(cache: Path) -> dict[int, str]:
    output = run("mypy", "--strict", "--cache-dir", str(cache), "--no-error-summary", str(CALLS))
    found = re.findall(r"^\S*calls\.py:(\d+): error: (.*)$", output, re.MULTILINE)
    return {int(line): message for line, message in found}


def pyright(cache: Path) -> dict[int, str]:
    output = run("pyright", "--pythonpath", sys.executable, "--outputjson", str(CALLS))
    found = json.loads(output)["generalDiagnostics"]
    return {
        each["range"]["start"]["line"] + 1: each["message"]
        for each in found
        if each["severity"] == "error"
    }


@pytest.mark.parametrize("check", [mypy, pyright])
def test_rejected(check: Callable[[Path], dict[int, str]], tmp_path: Path) -> None:
    """Every call that is marked is an error to both checkers, and nothing else in the file is."""
    lines = CALLS.read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# rejected")}
    found = check(tmp_path)
    accepted = [lines[number - 1].strip() for number in sorted(marked - set(found))]
    assert not accepted, "accepted"
    assert not {lines[number - 1].strip(): found[number] for number in set(found) - marked}
