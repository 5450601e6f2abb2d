"""`pg_migrate`: a template database that a function of the project makes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.plugin.projects import ASYNCIO, Project
from tests.testing.template_server import Server, watched


@pytest.fixture
async def server(server_url: str) -> AsyncIterator[Server]:
    async with watched(server_url) as server:
        yield server


MIGRATED = """
    import pytest
    from models import Item
    from sqlalchemy import func, select, text

    @pytest.mark.parametrize("number", range(2))
    @pytest.mark.pg_commit
    async def test_commits(pg_session, pg_engine, number):
        assert await pg_session.scalar(select(func.count()).select_from(Item)) == 1
        pg_session.add(Item(name="lamp"))
        await pg_session.commit()
        await pg_session.execute(text("DROP TABLE IF EXISTS other"))
        async with pg_engine.begin() as connection:
            await connection.execute(text("CREATE TABLE made_by_a_test (id int)"))

    @pytest.mark.parametrize("number", range(2))
    async def test_joined(pg_session, number):
        assert list(await pg_session.scalars(select(Item.name))) == ["table"]
        pg_session.add(Item(name="lamp"))
        await pg_session.commit()
"""


MIGRATING = """
    import asyncio
    from pathlib import Path
    from models import Base, Item
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def migrate(url):
        with Path("made").open("a") as made:
            made.write("x")
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session, session.begin():
            session.add(Item(name="table"))
        await engine.dispose()

    def migrate_synchronously(url):
        asyncio.run(migrate(url))
"""


@pytest.mark.parametrize("function", ["migrate", "migrate_synchronously"])
async def test_migration(project: Project, server: Server, function: str) -> None:
    """A function makes the template: each copy has its rows, also after a test that commits."""
    project.write(migrating=MIGRATING, test_it=MIGRATED)
    before = await server.names()
    outcome = project.run("-o", "pg_metadata=", "-o", f"pg_migrate=migrating:{function}")
    assert outcome.counts == {"passed": 4}, outcome.output
    assert (project.path / "made").read_text() == "x"
    assert await server.names() == before


async def test_version_of_a_migration_is_kept(project: Project, server: Server) -> None:
    """With files the next run uses the template again, one of two workers makes it, and a change of
    a file makes another."""
    project.write(migrating=MIGRATING, test_it=MIGRATED)
    files, made, before = project.path / "models.py", project.path / "made", await server.names()
    options = (
        "-o",
        "pg_metadata=",
        "-o",
        "pg_migrate=migrating:migrate",
        "-o",
        f"pg_migrate_files={files}",
    )
    for expected in ("x", "x", "xx"):
        if expected == "xx":
            files.write_text(files.read_text() + "# another version")
        workers = () if made.exists() else ("-n", "2")
        outcome = project.run(*options, *workers)
        assert outcome.counts == {"passed": 4}, outcome.output
        assert made.read_text() == expected
        assert len(await server.names() - before) == len(expected)


def test_alembic(project: Project) -> None:
    """The project of docs/testing.md that Alembic migrates passes."""
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    for name, content in re.findall(
        r"^```(?:py|ini)\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    ):
        (project.path / name).parent.mkdir(parents=True, exist_ok=True)
        (project.path / name).write_text(content)
    project.write(
        test_myapp="""
            from myapp import Item
            from sqlalchemy import select, text

            async def test_migrated(pg_session):
                version = text("SELECT version_num FROM alembic_version")
                assert await pg_session.scalar(version) == "1"
                assert await pg_session.scalar(select(Item.name)) == "table"
        """
    )
    outcome = project.run("-c", "pytest-alembic.ini", *ASYNCIO, "test_myapp.py")
    assert outcome.counts == {"passed": 1}, outcome.output
