"""Every cell of docs/comparison.md is what a program observes; `make comparison` runs this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgtoolset.testing import EmbeddedServer
from tests.comparison.observe import observed
from tests.comparison.page import CELLS, word_of
from tests.comparison.promises import PROMISES
from tests.comparison.stacks import STACKS, Stack

if not all(stack.installed() for stack in STACKS):
    pytest.skip("`make comparison` installs the peers", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


CASES = [
    pytest.param(title, stack, id=f"{promise.program.__name__}-{stack.package}")
    for title, promise in PROMISES.items()
    for stack in STACKS
]


@pytest.mark.parametrize(("title", "stack"), CASES)
async def test_cell(title: str, stack: type[Stack], server: EmbeddedServer) -> None:
    """A cell says what the program observes, or that the stack has no counterpart."""
    cell = CELLS[title][stack.heading]
    assert word_of(cell) is await observed(PROMISES[title], stack, server.url()), cell
