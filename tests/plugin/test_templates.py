"""Template databases of the pytest plugin: made once, sealed, kept while they are used, and
swept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from pgtoolset.databases import create_database, drop_database
from pytest_pgtoolset._recipes import Recipe
from pytest_pgtoolset._templates import template_of
from tests.plugin.projects import ASYNCIO, Project
from tests.support import plain_url, until


class Server:
    """The databases on the server of this run, seen from outside."""

    def __init__(self, url: str, connection: asyncpg.Connection) -> None:
        self.url = url
        self.connection = connection

    async def names(self, pattern: str = "^pgtoolset_template_") -> set[str]:
        rows = await self.connection.fetch(
            "SELECT datname FROM pg_database WHERE datname ~ $1", pattern
        )
        return {row["datname"] for row in rows}

    async def comment(self, name: str) -> str:
        query = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1"
        return await self.connection.fetchval(query, name)

    async def execute(self, url: str, statement: str) -> None:
        connection = await asyncpg.connect(plain_url(url))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture
async def server(server_url: str) -> AsyncIterator[Server]:
    connection = await asyncpg.connect(plain_url(server_url))
    server = Server(server_url, connection)
    before = await server.names()
    try:
        yield server
    finally:
        for name in await server.names() - before:
            await drop_database(name, server_url=server_url, force=True)
        await connection.close()


class Making:
    """A recipe that counts how often it is used."""

    def __init__(
        self, server: Server, *statements: str, versioned: bool = True, pause: float = 0
    ) -> None:
        self.server = server
        self.statements = statements
        self.pause = pause
        self.times = 0
        self.recipe = Recipe("test", None, uuid4().hex[:16] if versioned else None, self.make)

    async def make(self, url: str) -> None:
        self.times += 1
        await asyncio.sleep(self.pause)
        for statement in self.statements:
            await self.server.execute(url, statement)


async def test_made_once(server: Server) -> None:
    """Of several who want the same template at the same time one makes it; who comes later finds
    it."""
    making = Making(server, "CREATE TABLE item (id int)", pause=0.2)

    async def worker() -> str:
        async with template_of(server.url, making.recipe, "run") as template:
            assert not template.has_rows
            return template.name

    names = {*await asyncio.gather(*(worker() for _ in range(4))), await worker()}
    assert making.times == 1
    assert names == {f"pgtoolset_template_{making.recipe.version}"} <= await server.names()


async def test_sealed(server: Server) -> None:
    """Nobody can enter a template, so it can always be copied; who copies it is let in."""
    making = Making(server, "CREATE TABLE item AS SELECT 1 AS id")
    async with template_of(server.url, making.recipe, "run") as template:
        assert template.has_rows
        inside = plain_url(server.url).replace("/postgres?", f"/{template.name}?")
        with pytest.raises(
            asyncpg.ObjectNotInPrerequisiteStateError, match="not currently accepting"
        ):
            await asyncpg.connect(inside, database=template.name)
        await create_database(
            "pgtoolset_template_copy", server_url=server.url, template=template.name
        )
        copy = await asyncpg.connect(plain_url(server.url), database="pgtoolset_template_copy")
        assert await copy.fetchval("SELECT id FROM item") == 1
        await copy.close()


async def test_failure_leaves_nothing(server: Server) -> None:
    """A template that cannot be made is not there, whole or in half, and the next attempt starts
    anew."""
    before = await server.names()
    making = Making(server, "CREATE TABLE item (id int)", "SELECT 1 / 0")
    for _ in range(2):
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with template_of(server.url, making.recipe, "run"):
                pass
        assert await server.names() == before
    assert making.times == 2


async def test_cancelled_while_it_is_made(server: Server) -> None:
    """Neither does a cancellation leave anything."""
    before = await server.names()
    making = Making(server, pause=30)

    async def work() -> None:
        async with template_of(server.url, making.recipe, "run"):
            pass

    task = asyncio.create_task(work())
    await until(lambda: making.times == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await server.names() == before


async def test_draft_of_a_killed_run(server: Server) -> None:
    """What a run left that was killed while it made a template is dropped by the next that makes
    one, of any schema."""
    making, other = Making(server, "CREATE TABLE item (id int)"), Making(server)
    name = f"pgtoolset_template_{making.recipe.version}"
    for draft in (f"{name}_draft", f"pgtoolset_template_{other.recipe.version}_draft"):
        await create_database(draft, server_url=server.url)
    async with template_of(server.url, making.recipe, "run") as template:
        assert template.name == name
        assert not await server.names("^pgtoolset_template_.*_draft$")


async def test_template_of_one_run(server: Server) -> None:
    """Without a version a template is the run's: the last worker to leave drops it."""
    making = Making(server, versioned=False)
    async with template_of(server.url, making.recipe, "one") as first:
        async with template_of(server.url, making.recipe, "one") as second:
            assert first == second
        async with template_of(server.url, making.recipe, "two") as third:
            assert third.name != first.name
            assert {first.name, third.name} <= await server.names()
    assert making.times == 2
    assert not {first.name, third.name} & await server.names()


async def test_old_templates_are_swept(server: Server) -> None:
    """A template that nobody has used for a week goes, and so does that of a run that is no more;
    others stay."""
    today = datetime.now(UTC).date()
    names = {
        "pgtoolset_template_old": '\'pgtoolset template {"used": "2001-01-01", "has_rows": false}\'',
        "pgtoolset_template_new": f'\'pgtoolset template {{"used": "{today}", "has_rows": false}}\'',
        "pgtoolset_template_run_gone": "NULL",
        "pgtoolset_template_of_somebody": "'mine'",
    }
    for name, comment in names.items():
        await create_database(name, server_url=server.url)
        await server.connection.execute(f"COMMENT ON DATABASE {name} IS {comment}")
    alive = Making(server, versioned=False)
    async with template_of(server.url, alive.recipe, "alive") as kept:
        async with template_of(server.url, Making(server).recipe, "run") as made:
            pass
        stay = {"pgtoolset_template_new", "pgtoolset_template_of_somebody", kept.name, made.name}
        assert await server.names() & (names.keys() | stay) == stay


async def test_use_is_marked(server: Server) -> None:
    """A run that uses a template says so, once a day: it is not swept while it is in use."""
    making = Making(server, "CREATE TABLE item AS SELECT 1 AS id")
    async with template_of(server.url, making.recipe, "run") as template:
        pass
    today = await server.comment(template.name)
    long_ago = re.sub(r"\d{4}-\d\d-\d\d", "2001-01-01", today)
    await server.connection.execute(f"COMMENT ON DATABASE {template.name} IS '{long_ago}'")
    async with template_of(server.url, making.recipe, "run") as again:
        assert again == template
    assert await server.comment(template.name) == today


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
    """A function makes the template: its rows are in every copy, and there again after a test that
    commits."""
    project.write(migrating=MIGRATING, test_it=MIGRATED)
    before = await server.names()
    outcome = project.run("-o", "pg_metadata=", "-o", f"pg_migrate=migrating:{function}")
    assert outcome.counts == {"passed": 4}, outcome.output
    assert (project.path / "made").read_text() == "x"
    assert await server.names() == before


async def test_version_of_a_migration_is_kept(project: Project, server: Server) -> None:
    """With files the next run finds the template, and of two workers one makes it; a change of a
    file makes another."""
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
    """The project of docs/testing.md whose template Alembic makes."""
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
                assert await pg_session.scalar(text("SELECT version_num FROM alembic_version")) == "1"
                assert await pg_session.scalar(select(Item.name)) == "table"
        """
    )
    outcome = project.run("-c", "pytest-alembic.ini", *ASYNCIO)
    assert outcome.counts == {"passed": 1}, outcome.output
