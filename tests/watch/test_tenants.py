"""Tenants: the same tables in several schemas. Each statement goes where the session's own go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
import sqlalchemy
from sqlalchemy import Delete, Insert, Update, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from pgtoolset import (
    LockTimeoutError,
    RowDeletedError,
    RowWatcher,
    cleanup_tables,
    lock_rows,
    lock_tables,
    row_change_trigger,
    wait_for_row_change,
)
from pgtoolset._postgres import lookout
from pgtoolset._postgres.notifications import channel_in
from tests.support import Base, Item, plain_url, until
from tests.watch.crowd import Polls

#: A name that has to be quoted, and one that no tenant uses.
TENANT, OTHER = "tenant a", "tenant_b"
TRANSLATION = {"schema_translate_map": {None: TENANT}}
IS_21 = tuple(int(part) for part in sqlalchemy.__version__.split(".")[:2]) >= (2, 1)


@pytest.fixture
async def tenants(engine: AsyncEngine, other: asyncpg.Connection) -> AsyncIterator[None]:
    """Three rows with one key: of each tenant, and of `public`, which belongs to neither."""
    for schema in (TENANT, OTHER):
        await other.execute(f'CREATE SCHEMA "{schema}"')
        await make_tables(engine, schema)
        await other.execute(f'INSERT INTO "{schema}".item VALUES (1, $1)', schema)
    await other.execute("INSERT INTO item VALUES (1, 'public')")
    try:
        yield
    finally:
        for schema in (TENANT, OTHER):
            await other.execute(f'DROP SCHEMA "{schema}" CASCADE')


async def make_tables(engine: AsyncEngine, schema: str) -> None:
    translated = engine.execution_options(schema_translate_map={None: schema})
    async with translated.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def names(other: asyncpg.Connection) -> dict[str, list[str]]:
    return {
        schema: [row["name"] for row in await other.fetch(f'SELECT name FROM "{schema}".item')]
        for schema in ("public", TENANT, OTHER)
    }


Opened = Callable[[AsyncExitStack, AsyncEngine], Any]


async def on_engine(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    return await stack.enter_async_context(AsyncSession(engine.execution_options(**TRANSLATION)))


async def on_connection(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    connection = await stack.enter_async_context(engine.connect())
    connection = await connection.execution_options(**TRANSLATION)
    return await stack.enter_async_context(AsyncSession(connection))


async def on_the_sessions_connection(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    session = await stack.enter_async_context(AsyncSession(engine))
    await session.connection(execution_options=TRANSLATION)
    return session


async def in_a_savepoint(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    session = await on_the_sessions_connection(stack, engine)
    await session.begin_nested()
    return session


async def on_session(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    options: dict[str, Any] = {"execution_options": TRANSLATION}
    return await stack.enter_async_context(AsyncSession(engine, **options))


async def on_session_with_connection(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    connection = await stack.enter_async_context(engine.connect())
    options: dict[str, Any] = {"execution_options": TRANSLATION}
    return await stack.enter_async_context(AsyncSession(connection, **options))


class Routing(Session):
    """Routes as SQLAlchemy's documentation shows it: by the class and the kind of statement."""

    def __init__(self, tenant: AsyncEngine, public: AsyncEngine, **options: Any) -> None:
        super().__init__(**options)
        self.reads = tenant.sync_engine.execution_options(role="reads")
        self.writes = tenant.sync_engine.execution_options(role="writes")
        self.unknown = public.sync_engine

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
        if self._flushing or isinstance(clause, Insert | Update | Delete):
            return self.writes
        return self.unknown if mapper is None else self.reads


async def routed(stack: AsyncExitStack, engine: AsyncEngine) -> AsyncSession:
    return await stack.enter_async_context(
        AsyncSession(
            sync_session_class=Routing,
            tenant=engine.execution_options(**TRANSLATION),
            public=engine,
        )
    )


needs_21 = pytest.mark.skipif(not IS_21, reason="sessions have options from SQLAlchemy 2.1 on")
ON_SESSION = [
    pytest.param(on_session, marks=needs_21),
    pytest.param(on_session_with_connection, marks=needs_21),
]
WAYS = [on_engine, on_connection, on_the_sessions_connection, in_a_savepoint, routed, *ON_SESSION]


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("open_session", WAYS)
@pytest.mark.parametrize("with_predicate", [False, True])
async def test_wait_for_row_change(
    engine: AsyncEngine, other: asyncpg.Connection, open_session: Opened, with_predicate: bool
) -> None:
    """A wait sees the rows of its own tenant, and puts nothing of another into the session."""
    async with AsyncExitStack() as stack:
        session = await open_session(stack, engine)
        polls = Polls(engine)
        holds = (lambda row: row.name == "changed") if with_predicate else None
        wait = asyncio.create_task(
            wait_for_row_change(session, Item, 1, interval=0.01, timeout=30, until=holds)
        )
        await until(lambda: len(polls.sizes) >= 2)
        await other.execute(f"UPDATE {OTHER}.item SET name = 'changed'")
        await other.execute("UPDATE item SET name = 'changed'")
        count = len(polls.sizes)
        await until(lambda: len(polls.sizes) >= count + 3)
        assert not wait.done()
        await other.execute(f"UPDATE \"{TENANT}\".item SET name = 'changed'")
        item = await wait
        assert (item.name, item in session) == ("changed", True)
        await session.rollback()
    assert (await names(other))[TENANT] == ["changed"]


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("open_session", WAYS)
async def test_a_deletion(
    engine: AsyncEngine, other: asyncpg.Connection, open_session: Opened
) -> None:
    """A row that only other tenants have is deleted for this one."""
    await other.execute(f'DELETE FROM "{TENANT}".item')
    async with AsyncExitStack() as stack:
        session = await open_session(stack, engine)
        with pytest.raises(RowDeletedError):
            await wait_for_row_change(session, Item, 1, baseline={"name": "seen"}, timeout=30)
        await session.rollback()


@pytest.mark.usefixtures("tenants")
async def test_waiters_of_many_tenants(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """Waiters of two tenants over one pool never share a statement, and those of one tenant do."""
    polls = Polls(engine)

    async def wait(schema: str) -> str:
        async with AsyncSession(engine) as session:
            options = {"schema_translate_map": {None: schema}}
            await session.connection(execution_options=options)
            row = await wait_for_row_change(
                session, Item, 1, until=lambda row: row.name.startswith("new"), interval=0.02
            )
            return row.name

    async def watch(schema: str) -> str:
        async with AsyncSession(
            engine.execution_options(schema_translate_map={None: schema})
        ) as session:
            return (await wait_for_row_change(session, Item, 1, interval=0.02)).name

    waits = [asyncio.create_task(each(TENANT)) for each in (wait, watch, watch)]
    waits += [asyncio.create_task(each(OTHER)) for each in (wait, watch)]
    await until(lambda: len(polls.sizes) > 10)
    await other.execute(f"UPDATE \"{TENANT}\".item SET name = 'new a'")
    assert await asyncio.gather(*waits[:3]) == ["new a"] * 3
    assert not waits[3].done() and not waits[4].done()
    await other.execute(f"UPDATE {OTHER}.item SET name = 'new b'")
    assert await asyncio.gather(*waits[3:]) == ["new b"] * 2


@pytest.mark.usefixtures("tenants")
async def test_options_of_the_application(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """Options that the application's own events read hold for polls; those of the transaction do
    not."""
    seen: list[Any] = []

    def note(connection: Any, *_: Any) -> None:
        options = connection.get_execution_options()
        seen.append((options.get("tenant"), options["isolation_level"]))

    async with AsyncSession(engine) as session:
        await session.connection(
            execution_options={"tenant": ["a"], "isolation_level": "SERIALIZABLE"}
        )
        sqlalchemy.event.listen(engine.sync_engine, "before_cursor_execute", note)
        await wait_for_row_change(session, Item, 1, until=lambda row: True)
    sqlalchemy.event.remove(engine.sync_engine, "before_cursor_execute", note)
    assert seen == [(["a"], "AUTOCOMMIT")]


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("notify", [False, True])
async def test_row_watcher(engine: AsyncEngine, other: asyncpg.Connection, notify: bool) -> None:
    """A watcher sees the rows of its engine's tenant."""
    tenant = engine.execution_options(**TRANSLATION)
    async with tenant.begin() as connection:
        for ddl in row_change_trigger(Item):
            await connection.execute(ddl)
    async with RowWatcher(tenant, interval=30 if notify else 0.02, notify=notify) as watcher:
        async with watcher.changes(Item, 1) as changes:
            assert changes.current == {"id": 1, "name": TENANT}
            await other.execute("UPDATE item SET name = 'changed'")
            await other.execute(f"UPDATE {OTHER}.item SET name = 'changed'")
            await other.execute(f"UPDATE \"{TENANT}\".item SET name = 'mine'")
            async with asyncio.timeout(30):
                assert (await anext(changes)).after == {"id": 1, "name": "mine"}


@pytest.mark.usefixtures("tenants")
async def test_channels(engine: AsyncEngine, other: asyncpg.Connection, database_url: str) -> None:
    """Tenants share no channel: a write of one is not announced to the others."""
    for schema in (TENANT, OTHER):
        tenant = engine.execution_options(schema_translate_map={None: schema})
        async with tenant.begin() as connection:
            for ddl in row_change_trigger(Item):
                await connection.execute(ddl)
    heard: list[tuple[str, str]] = []
    listener = await asyncpg.connect(plain_url(database_url))
    channels = {s: channel_in(Item.__table__, s) for s in ("public", TENANT, OTHER)}  # type: ignore[arg-type]
    assert len(set(channels.values())) == 3
    try:
        for schema, channel in channels.items():
            await listener.add_listener(
                channel, lambda *args, schema=schema: heard.append((schema, args[3]))
            )
        await other.execute(f"UPDATE {OTHER}.item SET name = 'changed'")
        await other.execute(f"UPDATE \"{TENANT}\".item SET name = 'changed'")
        await until(lambda: len(heard) >= 2)
        await listener.fetch("SELECT 1")
        assert heard == [(OTHER, "[[1]]"), (TENANT, "[[1]]")]
    finally:
        await listener.close()


WAYS_TO_LOCK = [way for way in WAYS if way is not in_a_savepoint]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error waits for the names of its blockers, however slow the machine is."""
    monkeypatch.setattr(lookout, "_GRACE", 20.0)
    monkeypatch.setattr(lookout, "_SHORT_GRACE", 20.0)


@pytest.mark.usefixtures("tenants", "unhurried")
@pytest.mark.parametrize("open_session", WAYS_TO_LOCK)
@pytest.mark.parametrize("nowait", [False, True])
@pytest.mark.parametrize("what", ["rows", "tables"])
async def test_blockers(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    database_url: str,
    open_session: Opened,
    what: str,
    nowait: bool,
) -> None:
    """The blockers are those of the tenant's own row and table, not of the one in public."""
    elsewhere = await asyncpg.connect(plain_url(database_url))
    statement = "SELECT FROM {} FOR UPDATE" if what == "rows" else "LOCK TABLE {}"
    try:
        async with elsewhere.transaction(), other.transaction():
            await elsewhere.execute(statement.format("public.item"))
            await other.execute(statement.format(f'"{TENANT}".item'))
            async with AsyncExitStack() as stack:
                session = await open_session(stack, engine)
                limits: dict[str, Any] = {"nowait": True} if nowait else {"timeout": "300ms"}
                with pytest.raises(LockTimeoutError) as caught:
                    if what == "rows":
                        await lock_rows(session, Item, [1], **limits)
                    else:
                        async with lock_tables(session, [Item], **limits):
                            pass
                await session.rollback()
            pids = [blocker.pid for blocker in caught.value.blockers]
            assert pids == [other.get_server_pid()]
            assert caught.value.tables == (f'"{TENANT}".item',)
    finally:
        await elsewhere.close()


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("open_session", WAYS)
async def test_cleanup_tables(
    engine: AsyncEngine, other: asyncpg.Connection, open_session: Opened
) -> None:
    """`cleanup_tables` empties the tables of the session's tenant, and no others."""
    async with AsyncExitStack() as stack:
        session = await open_session(stack, engine)
        if open_session is in_a_savepoint:
            assert await session.scalar(select(Item.name)) == TENANT
        await cleanup_tables(session, Base)
        await session.rollback()
    assert await names(other) == {"public": ["public"], TENANT: [], OTHER: [OTHER]}


@pytest.mark.usefixtures("tenants")
async def test_cleanup_tables_leaves_options_of_the_transaction(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A read-only transaction that is rolled back does not make the cleaning read-only."""
    async with AsyncSession(engine) as session:
        options = {**TRANSLATION, "postgresql_readonly": True, "isolation_level": "SERIALIZABLE"}
        await session.connection(execution_options=options)
        await session.execute(text("SELECT 1"))
        await cleanup_tables(session, Base.metadata)
    assert await names(other) == {"public": ["public"], TENANT: [], OTHER: [OTHER]}
