"""The example application's own tests, as its developers run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .plugin_support import Project

TESTS = Path(__file__).parent.parent / "examples" / "shop" / "tests"


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one", "two"])
def test_shop(server_url: str, options: tuple[str, ...]) -> None:
    """They pass, in one process and in two, with ten lines of configuration."""
    assert len((TESTS / "pytest.ini").read_text().splitlines()) <= 10
    outcome = Project(TESTS, server_url).run(*options)
    assert outcome.counts == {"passed": 5}, outcome.output
