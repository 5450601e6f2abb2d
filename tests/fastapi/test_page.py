"""docs/errors.md is complete and true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pgtoolset import errors
from pgtoolset._postgres.sqlstates import RETRYABLE
from pgtoolset.fastapi import _problems
from pgtoolset.fastapi._problems import find_problem

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", PAGE, re.MULTILINE))
KINDS = re.findall(r"^\| (\d+) \| (.*) \| `([a-z-]+)` \|$", PAGE, re.MULTILINE)


def test_every_error_is_on_the_page() -> None:
    """Each public error has a row, in order, with the root first."""
    root, *others = ROWS
    assert root == "PgToolsetError"
    assert others == sorted(set(errors.__all__) - {root})


@pytest.mark.parametrize("name", errors.__all__)
def test_status_of_each_error(name: str) -> None:
    """The status on the page is that of the handlers."""
    class_ = getattr(errors, name)
    error: Any = class_.__new__(class_)  # each takes arguments of its own
    found = find_problem(error)
    assert ROWS[name] == str(500 if found is None else found.problem.status)


def test_every_problem_is_on_the_page() -> None:
    """Each problem has a row with its status, and with the SQLSTATEs and classes that it is for."""
    problems = {
        each.name: each for each in vars(_problems).values() if isinstance(each, _problems.Problem)
    }
    assert {name for _, _, name in KINDS} == set(problems)
    for status, _, name in KINDS:
        assert int(status) == problems[name].status
    texts = {name: text for _, text, name in KINDS}
    for sqlstate, problem in _problems._BY_SQLSTATE.items():
        assert sqlstate in texts[problem.name]
    for class_, problem in _problems.BY_CLASS:
        assert class_.__name__ in texts[problem.name]
    assert set(RETRYABLE) <= set(_problems._BY_SQLSTATE)
