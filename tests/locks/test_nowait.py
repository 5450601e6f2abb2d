"""`lock_rows` with `nowait` and `skip_locked` waits neither for rows nor for the table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import LockMode, LockTimeoutError, lock_rows, lock_tables
from tests.locks.locking import Animal, Dog, holding, waiting
from tests.support import Account

Maker = async_sessionmaker[AsyncSession]

HOWS: list[dict[str, Any]] = [{"nowait": True}, {"skip_locked": True}]


class Base(DeclarativeBase):
    pass


class Parcel(Base):
    """A partitioned table."""

    __tablename__ = "parcel"

    id: Mapped[int] = mapped_column(primary_key=True)


class Account2(Base):
    """A view of the accounts."""

    __tablename__ = "account_view"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture(autouse=True)
async def accounts(engine: AsyncEngine, other: asyncpg.Connection) -> AsyncIterator[None]:
    """Two accounts, a view of them, and a partitioned table."""
    await other.execute(
        """INSERT INTO account (id, balance) SELECT generate_series(1, 2), 0;
           CREATE VIEW account_view AS SELECT id FROM account;
           CREATE TABLE parcel (id int PRIMARY KEY) PARTITION BY RANGE (id);
           CREATE TABLE parcel_low PARTITION OF parcel FOR VALUES FROM (0) TO (10);
           INSERT INTO parcel VALUES (1), (2)"""
    )
    yield
    await other.execute("DROP VIEW account_view; DROP TABLE parcel")


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("how", HOWS, ids=lambda how: next(iter(how)))
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("model", "table"),
    [
        (Account, "account"),
        (Account2, "account_view"),
        (Account2, "account"),
        (Parcel, "parcel"),
        (Parcel, "parcel_low"),
    ],
)
async def test_table_is_locked(
    session_maker: Maker,
    other: asyncpg.Connection,
    how: dict[str, Any],
    nested: bool,
    model: Any,
    table: str,
) -> None:
    """A lock on the table, or on one below it, is an error at once that names its holder."""
    async with holding(other, f"LOCK TABLE {table}") as pid, session_maker() as session:
        if nested:
            await session.begin()
            await session.execute(text("INSERT INTO item (id, name) VALUES (9, '')"))
            await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        async with asyncio.timeout(30):
            with pytest.raises(LockTimeoutError, match="without waiting") as caught:
                await lock_rows(session, model, [1], **how)
        assert [blocker.pid for blocker in caught.value.blockers] == [pid]
        assert await session.scalar(text("SELECT count(*) FROM item")) == nested
        assert await session.scalar(text("SHOW lock_timeout")) == ("1234ms" if nested else "0")


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("how", HOWS, ids=lambda how: next(iter(how)))
async def test_alter_table_is_queued(
    session_maker: Maker,
    other: asyncpg.Connection,
    onlooker: asyncpg.Connection,
    how: dict[str, Any],
) -> None:
    """An ALTER TABLE that waits for the table itself is in the way too, and named."""
    async with session_maker() as reader:
        await reader.execute(text("SELECT FROM account"))
        async with other.transaction():
            altering = asyncio.create_task(other.execute("ALTER TABLE account ADD extra int"))
            await waiting(onlooker)
            async with session_maker() as session, asyncio.timeout(30):
                with pytest.raises(LockTimeoutError) as caught:
                    await lock_rows(session, Account, [1], **how)
            assert other.get_server_pid() in {each.pid for each in caught.value.blockers}
            await reader.rollback()
            await altering
            await other.execute("ALTER TABLE account DROP extra")


@pytest.mark.parametrize("how", HOWS, ids=lambda how: next(iter(how)))
@pytest.mark.parametrize("mode", LockMode, ids=lambda mode: mode.name)
async def test_every_table_mode(
    session_maker: Maker, other: asyncpg.Connection, how: dict[str, Any], mode: LockMode
) -> None:
    """Rows are locked beside every mode that ROW SHARE does not conflict with; others refuse."""
    async with holding(other, f"LOCK TABLE account IN {mode.value} MODE"):
        async with session_maker() as session:
            try:
                rows = await lock_rows(session, Account, [1], **how)
            except LockTimeoutError:
                rows = []
    assert [row.id for row in rows] == (
        [] if mode in (LockMode.EXCLUSIVE, LockMode.ACCESS_EXCLUSIVE) else [1]
    )


@pytest.mark.parametrize("how", HOWS, ids=lambda how: next(iter(how)))
@pytest.mark.parametrize("nested", [True, False])
async def test_settings_are_restored(
    session_maker: Maker, how: dict[str, Any], nested: bool
) -> None:
    """After the call both timeouts are the caller's again."""
    async with session_maker() as session:
        if nested:
            await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
            await session.execute(text("SET LOCAL statement_timeout = '9s'"))
        assert len(await lock_rows(session, Account, [1, 2], **how)) == 2
        limits = (await session.scalar(text(f"SHOW {name}_timeout")) for name in _SETTINGS)
        assert [limit async for limit in limits] == (["1234ms", "9s"] if nested else ["0", "0"])


_SETTINGS = ("lock", "statement")


@pytest.mark.usefixtures("unhurried")
async def test_rows_of_a_view(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A row of a view that another session has locked: the error names that session."""
    async with holding(other, "UPDATE account SET balance = 1 WHERE id = 1") as pid:
        async with session_maker() as session:
            with pytest.raises(LockTimeoutError) as caught:
                await lock_rows(session, Account2, [1], nowait=True)
            assert [blocker.pid for blocker in caught.value.blockers] == [pid]


@pytest.mark.usefixtures("unhurried")
async def test_tables_below_a_view(session_maker: Maker, other: asyncpg.Connection) -> None:
    """`lock_tables(nowait=True)` on a view names the session that holds the table below it."""
    async with holding(other, "INSERT INTO account (id, balance) VALUES (7, 0)") as pid:
        for model in (Account2, Account):
            async with session_maker() as session:
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [model], mode="EXCLUSIVE", nowait=True):
                        pass
                assert [blocker.pid for blocker in caught.value.blockers] == [pid]


@pytest.mark.usefixtures("unhurried", "odd_tables")
@pytest.mark.parametrize("column", ["barks", "name"])
async def test_row_of_a_subclass(
    session_maker: Maker, other: asyncpg.Connection, column: str
) -> None:
    """Of joined inheritance, the row in either table has a holder that is named."""
    table = (Dog if column == "barks" else Animal).__tablename__.replace('"', '""')
    async with session_maker() as session:
        session.add(Dog(id=1))
        await session.commit()
    async with holding(other, f'UPDATE "{table}" SET {column} = {column}') as pid:
        async with session_maker() as session:
            with pytest.raises(LockTimeoutError) as caught:
                await lock_rows(session, Dog, [1], nowait=True)
            assert [blocker.pid for blocker in caught.value.blockers] == [pid]
