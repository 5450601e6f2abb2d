"""What type checkers accept and refuse of the public functions, and of the protocols likewise.

`accepted/` is checked with the source by `make lint`. `calls.py` has one list of calls, which are
made on the functions, as the file stands, and through the protocols, as this module rewrites it.
`rejected/` has what has no protocol.
"""

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
CALLS = ROOT / "tests" / "typing" / "calls.py"
REJECTED = ROOT / "tests" / "typing" / "rejected"

#: For the second form. pyright ignores directories whose name begins with a dot.
GENERATED = ROOT / "build" / "typing"

#: The lines of calls.py that say on what the calls are made, and those of its second form.
FUNCTIONS = """\
import pgtoolset as api
from pgtoolset import LockMode, LockWait, M2MChange, RowChange, RowLockMode
from pgtoolset import RowWatcher as Watcher
"""
PROTOCOLS = """\
from typing import Protocol
from pgtoolset import LockMode, LockWait, M2MChange, RowChange, RowLockMode, protocols
from pgtoolset.protocols import Watcher

class Api(
    protocols.TableLocker,
    protocols.AdvisoryLocker,
    protocols.RowLocker,
    protocols.LockObserver,
    protocols.ChangeWaiter,
    protocols.AssociationWriter,
    Protocol,
): ...

api: Api
"""

#: A line that every checker must refuse, or, where one cannot, those that are named.
REFUSED = re.compile(r"# refused(?: by (?P<checkers>[a-z, ]+))?$")

#: Error messages by file and line.
Found = dict[Path, dict[int, str]]


def run(*command: str) -> str:
    """Return the output of a checker that has found errors."""
    environment = dict(os.environ)
    if (ROOT / "src").exists():
        environment["MYPYPATH"] = str(ROOT / "src")
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def parsed(output: str, pattern: str) -> Found:
    found: Found = {}
    for path, line, message in re.findall(pattern, output, re.MULTILINE):
        found.setdefault((ROOT / path).resolve(), {})[int(line)] = message
    return found


def mypy(files: list[Path]) -> Found:
    # Its cache is that of `make lint`, which has checked the packages that are imported here.
    output = run("mypy", "--strict", "--no-error-summary", *map(str, files))
    return parsed(output, r"^(.*?):(\d+): error: (.*)$")


def pyright(files: list[Path]) -> Found:
    output = run("pyright", "--pythonpath", sys.executable, "--outputjson", *map(str, files))
    found: Found = {}
    for each in json.loads(output)["generalDiagnostics"]:
        if each["severity"] == "error":
            line = each["range"]["start"]["line"] + 1
            found.setdefault(Path(each["file"]).resolve(), {})[line] = each["message"]
    return found


def ty(files: list[Path]) -> Found:
    options = ["--python", sys.prefix, "--output-format", "concise", "--no-progress"]
    output = run("ty", "check", *options, *map(str, files))
    return parsed(output, r"^(.*?):(\d+):\d+: (error.*)$")


def is_refused(line: str, checker: str) -> bool:
    """Return whether the line is marked as one that the checker must refuse."""
    marked = REFUSED.search(line)
    if marked is None:
        return False
    return marked["checkers"] is None or checker in marked["checkers"].split(", ")


CHECKERS: list[Callable[[list[Path]], Found]] = [mypy, pyright, ty]


@pytest.mark.parametrize("check", CHECKERS)
def test_calls(check: Callable[[list[Path]], Found]) -> None:
    """A marked call is an error on the function and through the protocol; another is neither."""
    directory = GENERATED / check.__name__
    directory.mkdir(parents=True, exist_ok=True)
    source = CALLS.read_text()
    assert source.count(FUNCTIONS) == 1
    through_protocols = directory / "through_protocols.py"
    through_protocols.write_text(source.replace(FUNCTIONS, PROTOCOLS))
    files = [CALLS, through_protocols, *sorted(REJECTED.glob("*.py"))]
    found = check(files)
    wrong: list[str] = []
    for file in files:
        errors = found.get(file.resolve(), {})
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if is_refused(line, check.__name__) != (number in errors):
                verdict = errors.get(number, "accepted")
                wrong.append(f"{file.name}:{number}: {line.strip()}: {verdict}")
    assert not wrong, "\n".join(wrong)
