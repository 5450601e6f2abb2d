"""The projects that the documentation shows, run as it says."""

from __future__ import annotations

import re
from pathlib import Path

from tests.plugin.projects import Project
from tests.plugin.test_loops import QUIET


def documented_files() -> dict[str, str]:
    docs = Path(__file__).parents[2] / "docs"
    page = "".join((docs / name).read_text() for name in ("testing.md", "embedded-server.md"))
    return dict(re.findall(r"^```(?:py|ini)\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def test_documented_parts(project: Project) -> None:
    """The conftest.py of docs/embedded-server.md gives an application the parts of the URL."""
    project.server_url = None
    project.write(
        conftest=documented_files()["conftest-parts.py"],
        test_parts="""
            import os
            import asyncpg

            async def test_parts(pg_database_url):
                connection = await asyncpg.connect(
                    host=os.environ["POSTGRES_HOST"],
                    port=int(os.environ["POSTGRES_PORT"]),
                    user=os.environ["POSTGRES_USER"],
                    password=os.environ["POSTGRES_PASSWORD"],
                    database=os.environ["POSTGRES_DB"],
                )
                assert not await connection.fetch("SELECT FROM item")
                await connection.close()
        """,
    )
    assert project.run("--pg-tcp").counts == {"passed": 1}


def test_documented_project(project: Project) -> None:
    """The project that docs/testing.md shows passes."""
    files = documented_files()
    assert {"pytest.ini", "myapp.py", "conftest.py", "test_myapp.py"} <= files.keys()
    for name, content in files.items():
        if "/" not in name:
            (project.path / name).write_text(content)
    outcome = project.run(*QUIET)
    assert outcome.counts == {"passed": 5}, outcome.output


def test_documented_tenants(project: Project) -> None:
    """The test of docs/tenants.md passes on the tables, policies and role that the page shows."""
    page = (Path(__file__).parents[2] / "docs" / "tenants.md").read_text()
    found = re.search(r"^```python\n(.*?)^owner = ", page, re.MULTILINE | re.DOTALL)
    shown = re.search(r"^```py\n# test_tenants.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None and shown is not None
    migrate = """
ACME, GLOBEX = uuid4(), uuid4()


async def migrate(url):
    owner = create_async_engine(url)
    async with owner.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        for statement in SECURE:
            await connection.execute(text(statement))
    await owner.dispose()
"""
    (project.path / "shop_tenants.py").write_text(found[1] + migrate)
    project.write(test_tenants="from shop_tenants import *\n\n\n" + shown[1])
    outcome = project.run("-o", "pg_metadata=", "-o", "pg_migrate=shop_tenants:migrate", *QUIET)
    assert outcome.counts == {"passed": 1}, outcome.output


def test_documented_form_with_one_session(project: Project) -> None:
    """With the other conftest.py of docs/testing.md, a request changes the instances of the
    test."""
    files = documented_files()
    names = {"pytest.ini": "pytest.ini", "myapp.py": "myapp.py"}
    for name, file in (names | {"conftest-one-session.py": "conftest.py"}).items():
        (project.path / file).write_text(files[name])
    project.write(
        test_it="""
            from myapp import Item

            async def test_it(client, pg_session):
                item = Item(name="table")
                pg_session.add(item)
                await pg_session.flush()
                await client.put(f"/items/{item.id}", params={"name": "desk"})
                assert item.name == "desk"
        """
    )
    outcome = project.run()
    assert outcome.counts == {"passed": 1}, outcome.output
