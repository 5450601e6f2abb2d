"""The conftest.py of docs/migrating-from-get-db.md, before and after, in a project of a user."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import make_url

from pgtoolset import create_database, drop_database
from tests.plugin.projects import Project

PAGE = (Path(__file__).parents[2] / "docs" / "migrating-from-get-db.md").read_text()
FILES = dict(re.findall(r"^```(?:py|ini)\n# ([^\n]+)\n(.*?)^```$", PAGE, re.M | re.S))

pytestmark = pytest.mark.asyncpg(reason="the snippets of the documentation")


def test_after(project: Project) -> None:
    """With the plugin, a commit of the code under test is gone after the test, in two workers."""
    assert {"pytest.ini", "after: conftest.py", "test_items.py"} <= FILES.keys()
    (project.path / "pytest.ini").write_text(FILES["pytest.ini"])
    project.write(conftest=FILES["after: conftest.py"], test_items=FILES["test_items.py"])
    outcome = project.run("-n", "2")
    assert outcome.counts == {"passed": 2}, outcome.output


async def test_before(project: Project, server_url: str) -> None:
    """With the fixture that rolls back, the second test finds what the first one has committed."""
    name = "pgtoolset_before"
    await drop_database(name, server_url=server_url, missing_ok=True, force=True)
    await create_database(name, server_url=server_url)
    try:
        project.write(
            conftest=FILES["before: conftest.py"],
            test_items=FILES["test_items.py"],
        )
        url = make_url(server_url).set(database=name).render_as_string(hide_password=False)
        outcome = project.run(TEST_DATABASE_URL=url)
        assert outcome.counts == {"failed": 1, "passed": 1}, outcome.output
    finally:
        await drop_database(name, server_url=server_url, force=True)
