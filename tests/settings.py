"""What the tests of settings share: an engine of one connection, and looks at what it has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import create_db_context, create_db_dependency, get_transaction
from tests.support import connect_args

Maker: TypeAlias = async_sessionmaker[AsyncSession]
Unit: TypeAlias = Callable[..., AbstractAsyncContextManager[AsyncSession]]
Asked: TypeAlias = AsyncSession | AsyncConnection

#: What `everything` returns for a connection that nobody has given settings.
NOTHING = ("", "0", "0", "none", '"$user", public', "tests")

NAMES = ("app.tenant", "statement_timeout", "lock_timeout", "role", "search_path")


@asynccontextmanager
async def narrow(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection, which each unit gets from the last one."""
    arguments = {"connect_args": connect_args(application_name="tests")}
    engine = create_async_engine(url, **{"pool_size": 1, "max_overflow": 0, **arguments, **options})
    try:
        yield engine
        assert engine.pool.checkedout() == 0, "a connection is lost"  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


async def setting(asked: Asked, name: str = "app.tenant") -> str:
    """Return the value of a setting, the empty string where it was never set."""
    found = await asked.execute(text("SELECT current_setting(:name, true)"), {"name": name})
    return found.scalar_one() or ""


async def everything(asked: Asked) -> tuple[str, ...]:
    """Return the values of the settings that these tests set."""
    return tuple([await setting(asked, name) for name in (*NAMES, "application_name")])


async def left_behind(engine: AsyncEngine) -> tuple[str, ...]:
    """Return what the next user of the pooled connection sees."""
    async with engine.connect() as connection:
        return await everything(connection)


# The units of work that have settings


@asynccontextmanager
async def by_context(maker: Maker, **options: Any) -> AsyncIterator[AsyncSession]:
    async with create_db_context(maker, **options)() as session:
        yield session


@asynccontextmanager
async def by_dependency(maker: Maker, **options: Any) -> AsyncIterator[AsyncSession]:
    async with asynccontextmanager(create_db_dependency(maker, **options))() as session:
        yield session


@asynccontextmanager
async def by_transaction(maker: Maker, **options: Any) -> AsyncIterator[AsyncSession]:
    async with maker() as session, get_transaction(session, **options):
        yield session


UNITS: list[Unit] = [by_context, by_dependency, by_transaction]

Step: TypeAlias = Callable[[AsyncSession], Awaitable[Any]]
