"""The example application's own tests, as its developers run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.projects import Project, Warm

TESTS = Path(__file__).parents[2] / "examples" / "shop" / "tests"


@pytest.mark.asyncpg(reason="the snippets of the documentation")
def test_shop(server_url: str, warm: Warm) -> None:
    """The tests of the example application pass in two workers, with ten lines of configuration."""
    assert len((TESTS / "pytest.ini").read_text().splitlines()) <= 10
    outcome = Project(TESTS, server_url, warm).run("-n", "2")
    assert outcome.counts == {"passed": 6}, outcome.output
