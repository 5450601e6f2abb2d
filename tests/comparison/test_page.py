"""The tables of docs/comparison.md: every row has a program, every cell says what it may say."""

from __future__ import annotations

import pytest

from tests.comparison import observe  # noqa: F401 - the programs register themselves
from tests.comparison.page import CELLS, word_of
from tests.comparison.promises import PROMISES
from tests.comparison.stacks import STACKS

#: The same on every version.
pytestmark = pytest.mark.once


def test_every_row_has_a_program() -> None:
    """The rows of the tables are the programs, in any order, and nothing else."""
    assert set(CELLS) == set(PROMISES)
    for title, cells in CELLS.items():
        assert list(cells) == [stack.heading for stack in STACKS], title


def test_cells() -> None:
    """Each cell is `yes`, `no` or a dash, and a dash is where a program has no counterpart."""
    for title, cells in CELLS.items():
        about = {stack.heading for stack in PROMISES[title].stacks}
        for heading, cell in cells.items():
            assert (word_of(cell) is not None) == (heading in about), (title, heading, cell)
