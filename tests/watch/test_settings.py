"""The looks of a wait, and those of a watcher, have the settings of their session or watcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    DeadlineExceededError,
    RowDeletedError,
    RowNotFoundError,
    RowWatcher,
    create_db_context,
    deadline,
    get_transaction,
    row_change_trigger,
    wait_for_row_change,
)
from tests.pgbouncer import WITHOUT_CACHES, pgbouncer
from tests.proxy import Proxy
from tests.settings import NOTHING, left_behind, narrow, setting
from tests.support import Item, connect_args, until
from tests.tenants import ROLE, secured_items, tenant
from tests.watch.crowd import Polls


@pytest.fixture
async def secured(
    engine: AsyncEngine, other: asyncpg.Connection, database_url: str
) -> AsyncIterator[str]:
    """Two items, 1 of the tenant a and 2 of the tenant b."""
    async with secured_items(other):
        await other.execute("INSERT INTO item VALUES (1, 'a: 1'), (2, 'b: 1')")
        yield database_url


@pytest.fixture
async def pool(secured: str) -> AsyncIterator[AsyncEngine]:
    """A pool in which every connection has been used, and left as it was."""
    engine = create_async_engine(
        secured, pool_size=2, max_overflow=0, connect_args=connect_args(application_name="tests")
    )
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    for _ in range(2):
        assert await left_behind(engine) == NOTHING
    await engine.dispose()


async def in_unit(maker: Any, name: str) -> Any:
    async with create_db_context(maker, settings=tenant(name))() as session:
        return await change(session)


async def in_block(maker: Any, name: str) -> Any:
    async with maker() as session, get_transaction(session, settings=tenant(name)):
        return await change(session)


async def in_nested_block(maker: Any, name: str) -> Any:
    other = "b" if name == "a" else "a"
    async with create_db_context(maker, settings=tenant(other))() as session:
        await session.execute(text("SELECT 1"))
        async with get_transaction(session, settings=tenant(name)):
            return await change(session)


async def in_used_unit(maker: Any, name: str) -> Any:
    async with create_db_context(maker, settings=tenant(name))() as session:
        assert await setting(session) == name
        return await change(session)


async def change(session: AsyncSession) -> str:
    id_ = 1 if await tenant_of(session) == "a" else 2
    item = await wait_for_row_change(
        session, Item, id_, baseline={"id": id_, "name": f"{'ab'[id_ - 1]}: 1"}, interval=0.02
    )
    return item.name


async def tenant_of(session: AsyncSession) -> str:
    from pgtoolset._record import current_settings

    settings = current_settings(session.sync_session)
    assert settings is not None
    return settings.values["app.tenant"]


WAYS = [in_unit, in_block, in_nested_block, in_used_unit]


@pytest.mark.parametrize("way", WAYS)
async def test_a_wait_sees_its_tenants_row(
    pool: AsyncEngine, other: asyncpg.Connection, way: Any
) -> None:
    """A row that row-level security hides without the settings is seen, by many waiters of two
    tenants at once; nothing stays on a connection."""
    polls = Polls(pool)
    maker = async_sessionmaker(pool)
    count = 1 if way in (in_used_unit, in_nested_block) else 4  # those hold their connection
    waits = [asyncio.create_task(way(maker, name)) for name in "ab"[:count] for _ in range(count)]
    await until(lambda: len(polls.sizes) > 8 or any(wait.done() for wait in waits))
    await other.execute("UPDATE item SET name = left(name, 1) || ': 2'")
    assert await asyncio.gather(*waits) == [
        f"{name}: 2" for name in "ab"[:count] for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["b", ""])
async def test_another_tenants_row(pool: AsyncEngine, name: str) -> None:
    """A row of another tenant is not found, with an error that names the role and the table."""
    async with create_db_context(async_sessionmaker(pool), settings=tenant(name))() as session:
        with pytest.raises(RowNotFoundError, match=f"role {ROLE} on item") as caught:
            await wait_for_row_change(session, Item, 1, timeout=30)
        assert not isinstance(caught.value, RowDeletedError)


async def test_waiters_with_other_settings(pool: AsyncEngine, other: asyncpg.Connection) -> None:
    """Waiters share a statement where their settings are equal, and never where they differ."""
    found: list[tuple[str, int]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "pgtoolset_wanted" in statement:
            values = parameters.values() if isinstance(parameters, dict) else parameters
            found.append((str(next(iter(values))), id(connection)))

    event.listen(pool.sync_engine, "before_cursor_execute", note)
    maker = async_sessionmaker(pool)

    async def wait(name: str, id_: int, wanted: str) -> str:
        async with create_db_context(maker, settings=tenant(name))() as session:
            row = await wait_for_row_change(
                session, Item, id_, until=lambda row: row.name == wanted, interval=0.05, timeout=60
            )
            return row.name

    await other.execute("INSERT INTO item VALUES (3, 'a: 3')")
    waits = [
        asyncio.create_task(wait(name, id_, f"{name}: end"))
        for name, id_ in [("a", 1), ("a", 3), ("b", 2)] * 5
    ]
    await until(lambda: len(found) > 30 or any(wait.done() for wait in waits))
    await other.execute("UPDATE item SET name = left(name, 1) || ': end'")
    results = await asyncio.gather(*waits)
    assert sorted(results) == ["a: end"] * 10 + ["b: end"] * 5
    keys = [set(json_or_list(each)) for each, _ in found]
    assert not [each for each in keys if "2" in each and each & {"1", "3"}]
    assert [each for each in keys if {"1", "3"} <= each], "equal settings share"


def json_or_list(shown: str) -> list[str]:
    return [each for each in "123" if each in shown]


async def test_settings_of_now(pool: AsyncEngine, other: asyncpg.Connection) -> None:
    """A wait has the settings of the block that it is in: those of a block that has ended are
    gone."""
    maker = async_sessionmaker(pool)
    async with create_db_context(maker, settings=tenant("a"))() as session:
        async with get_transaction(session, settings=tenant("b")):
            with pytest.raises(RowNotFoundError):
                await wait_for_row_change(session, Item, 1, timeout=30)
        row = await wait_for_row_change(session, Item, 1, until=lambda row: True, timeout=30)
        assert row.name == "a: 1"
        await session.commit()
        row = await wait_for_row_change(session, Item, 1, until=lambda row: True, timeout=30)
    async with maker() as session:
        await session.execute(text(f'SET ROLE "{ROLE}"'))
        await session.rollback()


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "control_fully"])
@pytest.mark.parametrize("has_begun", [True, False])
async def test_on_a_bound_connection(
    secured: str, other: asyncpg.Connection, mode: Any, has_begun: bool
) -> None:
    """The same for a session bound to one connection, which has none of it between two looks and
    after the wait."""
    async with narrow(secured) as engine:
        async with engine.connect() as connection:
            if has_begun:
                await connection.begin()
                await connection.execute(text("SELECT 1"))
            maker = async_sessionmaker(connection, join_transaction_mode=mode)
            for name in ("a", "b"):
                async with create_db_context(maker, settings=tenant(name))() as session:
                    id_ = "ab".index(name) + 1
                    wait = asyncio.create_task(
                        wait_for_row_change(session, Item, id_, interval=0.02, timeout=60)
                    )
                    await asyncio.sleep(0.1)
                    await other.execute(
                        "UPDATE item SET name = $1 WHERE id = $2", f"{name}: 2", id_
                    )
                    assert (await wait).name == f"{name}: 2"
            if has_begun:
                assert await setting(connection) == ""
                assert await setting(connection, "role") == "none"
        assert await left_behind(engine) == NOTHING


async def test_own_writes(pool: AsyncEngine, other: asyncpg.Connection) -> None:
    """What the session itself has written is seen with its settings too."""
    maker = async_sessionmaker(pool)
    async with create_db_context(maker, settings=tenant("b"))() as session:
        await session.execute(text("SELECT 1"))
        async with get_transaction(session, settings=tenant("a")):
            row = await wait_for_row_change(session, Item, 1, until=lambda row: True, timeout=30)
            assert row.name == "a: 1"
            await session.execute(text("UPDATE item SET name = 'a: mine'"))
            row = await wait_for_row_change(session, Item, 1, until=lambda row: True, timeout=30)
            assert row.name == "a: mine"
        assert await setting(session) == "b"


async def test_refused(pool: AsyncEngine) -> None:
    """A setting that PostgreSQL refuses ends the wait with its error, and costs no connection."""
    maker = async_sessionmaker(pool)
    for wrong in ({"statement_timeout": "soon"}, {"role": "nobody at all"}):
        async with create_db_context(maker, settings={**tenant("a"), **wrong})() as session:
            with pytest.raises(DBAPIError, match=r"soon|nobody"):
                await wait_for_row_change(session, Item, 1, timeout=30)


async def test_cancelled(pool: AsyncEngine) -> None:
    """A wait that is cancelled at any time leaves no settings on a connection."""
    from tests.support import interrupt_everywhere

    maker = async_sessionmaker(pool)

    async def work(n: int) -> None:
        async with create_db_context(maker, settings=tenant("a"))() as session:
            await wait_for_row_change(session, Item, 1, until=lambda row: True, timeout=60)

    async def check(n: int) -> None:
        await until(lambda: pool.pool.checkedout() == 0)  # type: ignore[attr-defined]
        assert await left_behind(pool) == NOTHING

    assert await interrupt_everywhere(work, check) >= 3


async def test_behind_pgbouncer(secured: str, other: asyncpg.Connection) -> None:
    """The same over the backends of a pooler."""
    async with (
        pgbouncer(secured) as url,
        narrow(url, pool_size=3, connect_args=WITHOUT_CACHES) as engine,
    ):
        maker = async_sessionmaker(engine)
        polls = Polls(engine)
        waits = [asyncio.create_task(in_unit(maker, name)) for name in "ab" for _ in range(3)]
        await until(lambda: len(polls.sizes) > 8 or any(wait.done() for wait in waits))
        await other.execute("UPDATE item SET name = left(name, 1) || ': 2'")
        assert await asyncio.gather(*waits) == ["a: 2"] * 3 + ["b: 2"] * 3
        for _ in range(3):
            async with engine.connect() as connection:
                assert await setting(connection) == ""


async def test_within_a_deadline(pool: AsyncEngine) -> None:
    """A deadline limits the looks, and the settings hold in them."""
    settings = {**tenant("a"), "statement_timeout": "20s"}
    async with create_db_context(async_sessionmaker(pool), settings=settings)() as session:
        with deadline(60):
            row = await wait_for_row_change(session, Item, 1, until=lambda row: True, timeout=30)
        assert row.name == "a: 1"
        with pytest.raises(DeadlineExceededError), deadline(0.2):
            await wait_for_row_change(session, Item, 1, interval=0.02)


# RowWatcher


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize("notify", [False, True])
async def test_watcher(pool: AsyncEngine, other: asyncpg.Connection, notify: bool) -> None:
    """A watcher sees the rows of its settings, and changes of them alone."""
    async with pool.begin() as connection:
        for ddl in row_change_trigger(Item):
            await connection.execute(ddl)
    events = ("insert", "update", "delete", "truncate")
    options: dict[str, Any] = {"interval": 30 if notify else 0.02, "notify": notify}
    async with RowWatcher(pool, settings=tenant("a"), **options) as watcher:
        async with watcher.changes(Item, 1) as mine, watcher.changes(Item, 2) as theirs:
            assert mine.current == {"id": 1, "name": "a: 1"}
            assert theirs.current is None
            await other.execute("UPDATE item SET name = name || '!'")
            async with asyncio.timeout(60):
                assert (await anext(mine)).after == {"id": 1, "name": "a: 1!"}
            await other.execute("UPDATE item SET name = 'a: now mine' WHERE id = 2")
            async with asyncio.timeout(60):
                assert (await anext(theirs)).kind == "insert"
    for event_ in events:
        await other.execute(f"DROP TRIGGER IF EXISTS pgtoolset_{event_} ON item")


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_watcher_after_a_lost_connection(secured: str, other: asyncpg.Connection) -> None:
    """A function gives the settings at each connection, and the next connection has them."""
    calls: list[int] = []

    def settings() -> dict[str, Any]:
        calls.append(1)
        return tenant("a" if len(calls) == 1 else "b")

    async with Proxy.to(secured) as proxy, narrow(proxy.url) as engine:
        async with RowWatcher(engine, interval=0.02, settings=settings) as watcher:
            async with watcher.changes(Item, 2) as changes:
                assert (changes.current, len(calls)) == (None, 1)
                proxy.drop()
                async with asyncio.timeout(60):
                    change = await anext(changes)
                assert change.after == {"id": 2, "name": "b: 1"}
                assert len(calls) >= 2
        assert await left_behind(engine) == NOTHING


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_watcher_behind_pgbouncer(secured: str, other: asyncpg.Connection) -> None:
    """Over a pooler each look has the settings, and the backends have none of them afterwards."""
    async with (
        pgbouncer(secured) as url,
        narrow(url, connect_args=WITHOUT_CACHES) as engine,
        RowWatcher(engine, interval=0.02, settings=tenant("a")) as watcher,
    ):
        async with watcher.changes(Item, 1) as mine:
            assert mine.current == {"id": 1, "name": "a: 1"}
            for _ in range(10):
                async with engine.connect() as connection:
                    assert await setting(connection) == ""
            await other.execute("UPDATE item SET name = 'a: 2' WHERE id = 1")
            async with asyncio.timeout(60):
                assert (await anext(mine)).after == {"id": 1, "name": "a: 2"}
        with pytest.raises(asyncpg.PostgresError, match="soon"):
            async with RowWatcher(engine, settings={"statement_timeout": "soon"}):
                pass


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_watcher_refused(secured: str) -> None:
    """A setting that PostgreSQL refuses is an error on entering."""
    async with narrow(secured) as engine:
        for wrong in ({"statement_timeout": "soon"}, {"role": "nobody at all"}):
            with pytest.raises(asyncpg.PostgresError, match=r"soon|nobody"):
                async with RowWatcher(engine, settings=wrong):
                    pass
