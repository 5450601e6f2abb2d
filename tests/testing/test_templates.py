"""`template_database`: made once, sealed, kept while it is used, and swept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from pgtoolset import LockTimeoutError
from pgtoolset._postgres import turns
from pgtoolset.databases import create_database
from pgtoolset.testing import templates
from pgtoolset.testing.templates import TemplateDatabase, template_database
from tests import pgbouncer
from tests.support import plain_url, until
from tests.testing.template_server import Server, watched


@pytest.fixture
async def server(server_url: str) -> AsyncIterator[Server]:
    async with watched(server_url) as server:
        yield server


class Making:
    """A function that makes a template and counts its calls."""

    def __init__(
        self, server: Server, *statements: str, versioned: bool = True, pause: float = 0
    ) -> None:
        self.server = server
        self.statements = statements
        self.pause = pause
        self.times = 0
        self.version = uuid4().hex[:16] if versioned else None

    def template(self, run: str = "run") -> AbstractAsyncContextManager[TemplateDatabase]:
        return template_database(self.server.url, self.make, run=run, version=self.version)

    async def make(self, url: str) -> None:
        self.times += 1
        await asyncio.sleep(self.pause)
        for statement in self.statements:
            await self.server.execute(url, statement)


async def test_made_once(server: Server) -> None:
    """Of several callers at a time one makes the template, and a later one finds it."""
    making = Making(server, "CREATE TABLE item (id int)", pause=0.2)

    async def worker() -> str:
        async with making.template() as template:
            assert not template.has_rows
            return template.name

    names = {*await asyncio.gather(*(worker() for _ in range(4))), await worker()}
    assert making.times == 1
    assert names == {f"pgtoolset_template_{making.version}"} <= await server.names()


async def test_sealed(server: Server) -> None:
    """No session can enter a template, so it can always be copied, and its copies are open."""
    making = Making(server, "CREATE TABLE item AS SELECT 1 AS id")
    async with making.template() as template:
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
    """A template that cannot be made leaves no database, and the next attempt starts again."""
    before = await server.names()
    making = Making(server, "CREATE TABLE item (id int)", "SELECT 1 / 0")
    for _ in range(2):
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with making.template():
                pass
        assert await server.names() == before
    assert making.times == 2


async def test_cancelled_while_it_is_made(server: Server) -> None:
    """A cancellation leaves no database."""
    before = await server.names()
    making = Making(server, pause=30)

    async def work() -> None:
        async with making.template():
            pass

    task = asyncio.create_task(work())
    await until(lambda: making.times == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await server.names() == before


async def test_draft_of_a_killed_run(server: Server) -> None:
    """A draft of a killed run, of any schema, is dropped when a template is made."""
    making, other = Making(server, "CREATE TABLE item (id int)"), Making(server)
    name = f"pgtoolset_template_{making.version}"
    for draft in (f"{name}_draft", f"pgtoolset_template_{other.version}_draft"):
        await create_database(draft, server_url=server.url)
    async with making.template() as template:
        assert template.name == name
        assert not await server.names("^pgtoolset_template_.*_draft$")


async def test_template_of_one_run(server: Server) -> None:
    """A template without a version is that of the run, and its last block drops it."""
    making = Making(server, versioned=False)
    async with making.template("one") as first:
        async with making.template("one") as second:
            assert first == second
        async with making.template("two") as third:
            assert third.name != first.name
            assert {first.name, third.name} <= await server.names()
    assert making.times == 2
    assert not {first.name, third.name} & await server.names()


async def test_old_templates_are_swept(server: Server) -> None:
    """Templates that were not used for a week, and those of runs that have ended, are dropped;
    others stay."""
    today = datetime.now(UTC).date()
    start = "pgtoolset template "
    names = {
        "pgtoolset_template_old": f"""'{start}{{"used": "2001-01-01", "has_rows": false}}'""",
        "pgtoolset_template_new": f"""'{start}{{"used": "{today}", "has_rows": false}}'""",
        "pgtoolset_template_run_gone": "NULL",
        "pgtoolset_template_of_somebody": "'mine'",
    }
    for name, comment in names.items():
        await create_database(name, server_url=server.url)
        await server.connection.execute(f"COMMENT ON DATABASE {name} IS {comment}")
    alive = Making(server, versioned=False)
    async with alive.template("alive") as kept:
        async with Making(server).template() as made:
            pass
        stay = {"pgtoolset_template_new", "pgtoolset_template_of_somebody", kept.name, made.name}
        assert await server.names() & (names.keys() | stay) == stay


async def test_use_is_marked(server: Server) -> None:
    """The first block of a day marks the template as used."""
    making = Making(server, "CREATE TABLE item AS SELECT 1 AS id")
    async with making.template() as template:
        pass
    today = await server.comment(template.name)
    long_ago = re.sub(r"\d{4}-\d\d-\d\d", "2001-01-01", today)
    await server.connection.execute(f"COMMENT ON DATABASE {template.name} IS '{long_ago}'")
    async with making.template() as again:
        assert again == template
    assert await server.comment(template.name) == today


@pytest.mark.parametrize("purpose", ["making", "using"])
async def test_locked_by_a_stranger(
    server: Server, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    """An advisory lock that a stranger holds is waited for within a limit, the error names the
    stranger, and a cancellation ends the wait."""
    making = Making(server, "CREATE TABLE item (id int)")
    name = f"pgtoolset_template_{making.version}"
    key = turns.key_of(purpose, name)
    await server.connection.execute("SET application_name = 'the stranger'")
    await server.connection.execute(f"SELECT pg_advisory_lock({key})")
    asked = asyncio.Event()
    take = turns._take

    async def seen(*arguments: Any) -> bool:
        asked.set()
        return await take(*arguments)

    monkeypatch.setattr(turns, "_take", seen)

    async def work() -> None:
        async with making.template():
            raise AssertionError

    task = asyncio.create_task(work())
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.setattr(templates, "_TIMEOUT", 0.2)
    with pytest.raises(LockTimeoutError, match=f"{name}.* within 0.2 s") as raised:
        await work()
    if purpose == "making":
        assert [each.application_name for each in raised.value.blockers] == ["the stranger"]
    assert making.times == 0
    await server.connection.execute("SELECT pg_advisory_unlock_all()")
    async with making.template():
        pass
    assert making.times == 1


async def test_no_lock_is_left(server: Server) -> None:
    """A block, of a run too and after an error too, leaves no lock and no open transaction."""
    for versioned in (True, False):
        making = Making(server, "CREATE TABLE item (id int)", versioned=versioned)
        with pytest.raises(KeyError):
            async with making.template():
                raise KeyError
    query = (
        "SELECT count(*) FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)"
        " WHERE l.locktype = 'advisory' OR (a.datname = 'postgres' AND a.state LIKE 'idle in%')"
    )
    assert await server.connection.fetchval(query) == 0


async def test_behind_a_pooler(server: Server) -> None:
    """Behind PgBouncer in transaction mode, with fewer backends than callers, one makes the
    template, each gets it, and no lock stays on a backend."""
    making = Making(server, "CREATE TABLE item (id int)", pause=0.2)
    async with pgbouncer.pgbouncer(server.url) as pooled:

        async def worker() -> str:
            async with template_database(
                pooled, making.make, run="run", version=making.version
            ) as template:
                return template.name

        names = set(await asyncio.gather(*(worker() for _ in range(4))))
        assert len(names) == making.times == 1
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        assert await server.connection.fetchval(query) == 0


async def test_template_that_cannot_be_dropped(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """An old template that cannot be dropped is a warning, and the new one is made."""
    name = "pgtoolset_template_run_gone"
    await create_database(name, server_url=server.url)
    await server.connection.execute(f"BEGIN; COMMENT ON DATABASE {name} IS NULL")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "LOCK_TIMEOUT", 0.1)
        async with Making(server).template() as made:
            assert made.name in await server.names()
    await server.connection.execute("ROLLBACK")
    assert name in await server.names()
    assert "could not be dropped" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"server_url": "sqlite://"}, ValueError),
        ({"server_url": None}, TypeError),
        ({"run": "a b"}, ValueError),
        ({"run": None}, TypeError),
        ({"version": ""}, ValueError),
        ({"version": "x" * 33}, ValueError),
        ({"version": 7}, TypeError),
    ],
)
async def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong argument is refused before any SQL: here is no server at all."""

    async def make(url: str) -> None: ...

    good = {"server_url": "postgresql://user@127.0.0.1:1/x", "run": "run"}
    with pytest.raises(error, match=f"^{next(iter(arguments))} "):
        async with template_database(make=make, **(good | arguments)):
            raise AssertionError
