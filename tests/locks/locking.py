"""Tables and tools of the tests of locks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

import asyncpg
from sqlalchemy import ForeignKey, MetaData, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset._lifecycle import close
from tests.support import plain_url, until

SCHEMA = "Odd schema"

#: Takes the advisory lock that `is_free` looks at.
TAKE = "SELECT pg_advisory_xact_lock(42)"


class Base(DeclarativeBase):
    metadata = MetaData()


class Order(Base):
    """A reserved word, in a schema whose name needs quoting."""

    __tablename__ = "order"
    __table_args__ = ({"schema": SCHEMA},)

    id: Mapped[int] = mapped_column(primary_key=True)


class Animal(Base):
    __tablename__ = "Animal"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str] = mapped_column(default="")

    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = 'dog$pgtoolset$ "x" \';'

    id: Mapped[int] = mapped_column(ForeignKey("Animal.id"), primary_key=True)
    barks: Mapped[int] = mapped_column(default=0)

    __mapper_args__: ClassVar = {"polymorphic_identity": "dog"}


class Seat(Base):
    """A composite key."""

    __tablename__ = "seat"

    row: Mapped[int] = mapped_column(primary_key=True)
    letter: Mapped[str] = mapped_column(primary_key=True)
    taken: Mapped[bool] = mapped_column(default=False)


async def locks_of(connection: asyncpg.Connection, pid: int) -> set[tuple[str, str]]:
    """Return the (table, mode) pairs that a backend holds on tables of the tests."""
    rows = await connection.fetch(
        """SELECT c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
           WHERE l.pid = $1 AND l.granted AND c.relkind = 'r'
             AND c.relnamespace <> 'pg_catalog'::regnamespace""",
        pid,
    )
    return {(row["relname"], row["mode"]) for row in rows}


async def left_behind(connection: asyncpg.Connection) -> list[str]:
    """Return the locks that other sessions of the database hold or wait for."""
    rows = await connection.fetch(
        """SELECT l.locktype || ' ' || l.mode AS lock FROM pg_locks l
           WHERE l.pid <> pg_backend_pid()
             AND l.locktype IN ('relation', 'advisory', 'transactionid', 'tuple')
             AND (l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  OR l.locktype = 'transactionid')
             AND l.pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                             AND backend_type = 'client backend')"""
    )
    return [row["lock"] for row in rows]


async def nothing_left(connection: asyncpg.Connection) -> None:
    """Wait until no other session holds a lock; a backend notices late that it was cut off."""

    async def empty() -> bool:
        return not await left_behind(connection)

    await until(empty)


async def is_free(other: asyncpg.Connection, key: int = 42) -> bool:
    """Whether another session could have the advisory lock now."""
    async with other.transaction():
        return bool(await other.fetchval("SELECT pg_try_advisory_xact_lock($1)", key))


async def pid_of(session: AsyncSession) -> int:
    """Return the pid of the session's backend."""
    return int(await session.scalar(text("SELECT pg_backend_pid()")) or 0)


async def settings_of(session: AsyncSession) -> str:
    """Return the `lock_timeout` of the session."""
    return str(await session.scalar(text("SELECT current_setting('lock_timeout')")))


@asynccontextmanager
async def holding(connection: asyncpg.Connection, statement: str) -> AsyncIterator[int]:
    """Open a transaction of another session that has run `statement`, and yield its pid."""
    async with connection.transaction():
        await connection.execute(statement)
        yield connection.get_server_pid()


#: Seconds: a wait of 1 s beside `two_holders`. Counted anew for the second one it would end after
#: 1.7 s at the earliest.
COUNTED_ONCE = 1.65


@asynccontextmanager
async def two_holders(url: str, first: str, second: str) -> AsyncIterator[None]:
    """Open a transaction for each statement; the first one ends after 0.7 s."""
    holders = [await asyncpg.connect(plain_url(url)) for _ in range(2)]
    ends: list[asyncio.Future[str]] = []
    try:
        for holder, statement in zip(holders, (first, second), strict=True):
            await holder.execute(f"BEGIN; {statement}")
        end = holders[0].execute
        asyncio.get_running_loop().call_later(
            0.7, lambda: ends.append(asyncio.ensure_future(end("ROLLBACK")))
        )
        yield
    finally:
        await asyncio.gather(*ends)
        for holder in holders:
            await holder.close()


@asynccontextmanager
async def closing(session: AsyncSession) -> AsyncIterator[AsyncSession]:
    """Yield the session, and close it as the library does, whatever cancels the block."""
    try:
        yield session
    finally:
        await close(session)


async def waiting(connection: asyncpg.Connection, count: int = 1) -> None:
    """Wait until so many sessions wait for a lock."""

    async def enough() -> bool:
        # In a transaction the view stays as it was at the first query, until this call.
        await connection.execute("SELECT pg_stat_clear_snapshot()")
        waiters = await connection.fetchval(
            """SELECT count(*) FROM pg_stat_activity
               WHERE wait_event_type = 'Lock' AND datname = current_database()"""
        )
        return bool(waiters >= count)

    await until(enough)
