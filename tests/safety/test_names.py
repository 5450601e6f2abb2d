"""A table, a column and a database may have any name: it is quoted wherever it stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import registry, relationship
from sqlalchemy.schema import CreateSchema

from pgtoolset import (
    LockTimeoutError,
    RowWatcher,
    cleanup_tables,
    create_database,
    drop_database,
    list_lock_waits,
    lock_rows,
    lock_tables,
    m2m_add,
    m2m_set,
    wait_for_row_change,
)
from pgtoolset._postgres.quoting import do_block, dollar_quoted, literal
from pgtoolset.testing import create_db_session
from pgtoolset.testing.templates import template_database
from tests.safety.names import NAMES
from tests.support import plain_url, sqlalchemy_url, until


class Shop:
    """Two tables, a key and an association table, all with odd names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.schema = f"{name[:40]} "
        self.metadata = MetaData(schema=self.schema)
        self.table = Table(name, self.metadata, Column(name, Integer, primary_key=True))
        other = Table(f"{name[:50]}2", self.metadata, Column(name, Integer, primary_key=True))
        link = Table(
            f"{name[:50]}3",
            self.metadata,
            Column("one", Integer, ForeignKey(self.table.c[name]), primary_key=True),
            Column(f"{name[:50]}4", Integer, ForeignKey(other.c[name]), primary_key=True),
        )
        self.model, self.other = type("One", (), {}), type("Other", (), {})
        mappers = registry(metadata=self.metadata)
        mappers.map_imperatively(
            self.model,
            self.table,
            properties={
                "key": self.table.c[name],
                "others": relationship(self.other, secondary=link, lazy="raise"),
            },
        )
        mappers.map_imperatively(self.other, other, properties={"key": other.c[name]})


@pytest.fixture(params=NAMES)
def shop(request: pytest.FixtureRequest) -> Shop:
    return Shop(request.param)


@pytest.fixture
async def engine(empty_database: str, shop: Shop) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(empty_database)
    async with engine.begin() as connection:
        await connection.execute(CreateSchema(shop.schema))
        await connection.run_sync(shop.metadata.create_all)
        for table in shop.metadata.sorted_tables[:2]:
            await connection.execute(table.insert(), [{shop.name: n} for n in range(1, 4)])
    yield engine
    await engine.dispose()


async def test_locks(engine: AsyncEngine, shop: Shop) -> None:
    """Table and row locks are taken and refused on tables of any name, with their blockers."""
    async with AsyncSession(engine) as session:
        async with lock_tables(session, [shop.model, shop.other], mode="EXCLUSIVE"):
            pass
        assert len(await lock_rows(session, shop.model, [1, 2], timeout=5)) == 2
        await session.commit()
    async with AsyncSession(engine) as holder, AsyncSession(engine) as session:
        async with lock_tables(holder, [shop.model], mode="ACCESS EXCLUSIVE"):
            for keywords in ({"timeout": 1.5}, {"nowait": True}):
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [shop.model], **keywords):
                        pass
                assert len(caught.value.blockers) == 1

            async def wait() -> None:
                async with lock_tables(session, [shop.model], timeout=None):
                    pass

            task = asyncio.create_task(wait())
            await until(lambda: _waits_on(engine, shop))
        await task


async def _waits_on(engine: AsyncEngine, shop: Shop) -> bool:
    waits = await list_lock_waits(engine)
    async with engine.connect() as connection:
        for wait in waits:
            # PostgreSQL reads the name that it has quoted.
            found = await connection.execute(
                text("SELECT relname FROM pg_class WHERE oid = to_regclass(:name)"),
                {"name": wait.relation},
            )
            assert found.scalar() == shop.name
    return bool(waits)


async def test_cleaning(engine: AsyncEngine, shop: Shop, empty_database: str) -> None:
    """Tables of any name are emptied."""
    async with AsyncSession(engine) as session:
        one = await session.get_one(shop.model, 1)
        await m2m_add(session, one, shop.model.others, pks=[1, 2])  # type: ignore[attr-defined]
        await session.commit()
        await cleanup_tables(session, shop.metadata)
        for table in shop.metadata.sorted_tables:
            assert (await session.execute(table.select())).first() is None
    async with create_db_session(empty_database, shop.metadata):
        pass


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_rows(engine: AsyncEngine, shop: Shop) -> None:
    """Rows of tables of any name are watched, and their associations written."""
    async with AsyncSession(engine) as session:
        one = await session.get_one(shop.model, 1)
        attribute = shop.model.others  # type: ignore[attr-defined]
        assert await m2m_set(session, one, attribute, pks=[1, 2]) == (2, 0)
        assert await m2m_set(session, one, attribute, pks=[2, 3]) == (1, 1)
        await session.commit()
        await wait_for_row_change(session, shop.model, 1, until=lambda row: True)
    async with RowWatcher(engine, interval=0.05) as watcher:
        await watcher.wait(shop.model, 1, until=lambda row: True)


async def test_databases(server_url: str, shop: Shop) -> None:
    """A database of any name is created and dropped."""
    name = shop.name
    await create_database(name, server_url=server_url)
    connection = await asyncpg.connect(plain_url(server_url), database=name)
    await connection.close()
    await drop_database(name, server_url=server_url, force=True)


async def test_templates(server_url: str, shop: Shop) -> None:
    """A template may have tables of any name; one with a row is noticed."""

    async def make(url: str) -> None:
        engine = create_async_engine(sqlalchemy_url(url))
        async with engine.begin() as connection:
            await connection.execute(CreateSchema(shop.schema))
            await connection.run_sync(shop.metadata.create_all)
            await connection.execute(shop.table.insert(), [{shop.name: 1}])
        await engine.dispose()

    async with template_database(server_url, make, run="names") as template:
        assert template.has_rows


@pytest.mark.parametrize(
    "body", ["$pgtoolset", "$pgtoolset$", "x $pgtoolset_$$pgtoolset$pgtoolset"]
)
async def test_a_body_cannot_end_its_quote(other: asyncpg.Connection, body: str) -> None:
    """Whatever a body has in it, PostgreSQL reads all of it as the body."""
    assert await other.fetchval(f"SELECT {dollar_quoted(body)}") == body
    await other.execute(do_block(f"BEGIN PERFORM {literal(body)}; END"))
