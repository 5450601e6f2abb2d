"""`lock_tables` that fails: the error names the sessions in the way; other errors stay."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    LockTimeoutError,
    lock_tables,
)
from tests.locks.locking import (
    holding,
    waiting,
)
from tests.support import Account, Item, plain_url, roles

Maker = async_sessionmaker[AsyncSession]


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("arguments", [{"timeout": 0.4}, {"nowait": True}, {"timeout": 0.05}])
@pytest.mark.parametrize("outermost", [True, False])
async def test_blockers_are_named(
    session_maker: Maker, database_url: str, arguments: dict[str, Any], outermost: bool
) -> None:
    """The error has pid, application, state, query and age of the blocker, in words too."""
    holder = await asyncpg.connect(
        plain_url(database_url), server_settings={"application_name": "the till"}
    )
    try:
        await holder.execute("BEGIN")
        await holder.execute("INSERT INTO item (id, name) VALUES (9, '')")
        async with session_maker() as session:
            if not outermost:
                await session.begin()
            with pytest.raises(LockTimeoutError) as caught:
                async with lock_tables(session, [Account, Item], mode="EXCLUSIVE", **arguments):
                    pass
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert error.mode == "EXCLUSIVE"
        assert error.tables == ("account", "item")
        assert error.timeout == arguments.get("timeout", 0)
        [blocker] = error.blockers
        assert blocker.pid == holder.get_server_pid()
        assert (blocker.application_name, blocker.state) == ("the till", "idle in transaction")
        assert blocker.query == "INSERT INTO item (id, name) VALUES (9, '')"
        assert blocker.transaction_age is not None
        assert timedelta(0) < blocker.transaction_age < timedelta(minutes=1)
        for word in (
            "account, item",
            "EXCLUSIVE",
            f"pid {blocker.pid}",
            "the till",
            "idle in transaction",
            "INSERT",
        ):
            assert word in str(error)
    finally:
        await holder.close()


@pytest.mark.usefixtures("unhurried")
async def test_blockers_that_the_role_may_not_see(
    database_url: str, other: asyncpg.Connection
) -> None:
    """Of a session that the role may not see, the error has the pid and says why not more."""
    engine = create_async_engine(database_url.replace("://postgres@", "://pgtoolset_clerk@"))
    async with roles(database_url, "pgtoolset_clerk"):
        await other.execute("GRANT ALL ON item TO pgtoolset_clerk")
        async with holding(other, "LOCK TABLE item") as pid, AsyncSession(engine) as session:
            try:
                await session.connection()
            except Exception:
                pytest.skip("this server does not let a second role in")
            with pytest.raises(LockTimeoutError, match="may not see") as caught:
                async with lock_tables(session, [Item], timeout=0.2):
                    pass
            [blocker] = caught.value.blockers
            assert (blocker.pid, blocker.state, blocker.query, blocker.transaction_age) == (
                pid,
                None,
                None,
                None,
            )
        await engine.dispose()


@pytest.mark.usefixtures("unhurried")
async def test_session_bound_to_a_connection(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """For a session on a connection of the caller's own, blockers are found over another one."""
    async with engine.connect() as connection, holding(other, "LOCK TABLE item") as pid:
        async with AsyncSession(connection) as session:
            with pytest.raises(LockTimeoutError) as caught:
                async with lock_tables(session, [Item], timeout=0.2):
                    pass
    assert [blocker.pid for blocker in caught.value.blockers] == [pid]


async def test_errors_of_the_block_keep_their_type(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Errors of the block, a lock error too, are never translated."""
    async with holding(other, "LOCK TABLE account"), session_maker() as session:
        with pytest.raises(DBAPIError) as caught:
            async with lock_tables(session, [Item]):
                await session.execute(text("LOCK TABLE account NOWAIT"))
        assert getattr(caught.value.orig, "sqlstate", None) == "55P03"
        raised = LockTimeoutError("mine", tables=(), mode="SHARE", timeout=1.0)
        with pytest.raises(LockTimeoutError) as mine:
            async with lock_tables(session, [Item]):
                raise raised
        assert mine.value is raised


async def test_deadlock_propagates(
    session_maker: Maker, other: asyncpg.Connection, onlooker: asyncpg.Connection
) -> None:
    """A deadlock with a session that does not keep the order is PostgreSQL's own error."""
    await other.execute("BEGIN; SET LOCAL deadlock_timeout = '30s'; LOCK TABLE item")
    async with session_maker() as session:
        with pytest.raises(DBAPIError) as caught:
            async with lock_tables(session, [Account]):
                theirs = asyncio.create_task(other.execute("LOCK TABLE account"))
                await waiting(onlooker)
                async with lock_tables(session, [Item], timeout="10s"):
                    pass
        assert getattr(caught.value.orig, "sqlstate", None) == "40P01"
    await theirs
    await other.execute("ROLLBACK")


async def test_holder_that_disappears(session_maker: Maker, database_url: str) -> None:
    """The lock is granted as soon as its holder is gone, during the search for it too."""
    for delay in (0.1, 0.45, 0.55):
        holder = await asyncpg.connect(plain_url(database_url))
        await holder.execute("BEGIN; LOCK TABLE item")
        asyncio.get_running_loop().call_later(delay, holder.terminate)
        async with session_maker() as session:
            async with lock_tables(session, [Item], timeout=1.0):
                assert await session.scalar(text("SELECT 1")) == 1
