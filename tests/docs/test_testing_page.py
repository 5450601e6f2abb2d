"""docs/testing-of-pgtoolset.md names tests, commands and versions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

#: The same on every version.
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing-of-pgtoolset.md").read_text()


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_files() -> None:
    """Each file and folder of tests that the page names is there."""
    named = set(re.findall(r"\btests/[\w/.]+\w", PAGE))
    assert len(named) > 25
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_promises() -> None:
    """Each promise has a file of tests, and those that are called random use Hypothesis."""
    rows = rows_below("Which promise by which test")
    assert len(rows) > 15
    for promise, kind, where in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", where)
        assert files, promise
        if "random" in kind:
            assert any("\nfrom hypothesis" in (ROOT / name).read_text() for name in files), promise


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="the tests are not in the source tree")
def test_commands_and_matrix() -> None:
    """Each target of make exists, and the matrix is that of the workflow."""
    targets = set(re.findall(r"^(?:\w+=\w+ )?make ([\w-]+)", PAGE, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {name for name in targets if f"\n{name}:" in makefile} != set()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    jobs = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    columns = ("python", "postgres", "driver", "implementation", "versions")
    run = [sorted({str(job[column]) for job in jobs}) for column in columns]
    assert [sorted(values.split(", ")) for _, values in rows_below("The matrix")] == run
