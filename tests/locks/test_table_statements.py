"""`lock_tables`: how many statements it sends, and none that takes a snapshot too early."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import LockMode, get_transaction, lock_tables
from pgtoolset._postgres.locks import lock_block
from tests.locks.locking import holding, settings_of, waiting
from tests.support import Account, Item, Part

Maker = async_sessionmaker[AsyncSession]


async def test_one_statement(session_maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """All tables are locked, and the timeout is set and restored, by one statement."""
    with caplog.at_level("INFO", logger="sqlalchemy.engine.Engine"):
        async with session_maker() as session, session.begin():
            await session.execute(text("SELECT 1"))
            caplog.clear()
            async with lock_tables(session, [Part, Item, Account], mode="SHARE"):
                pass
    statements = [
        record.getMessage() for record in caplog.records if not record.getMessage().startswith("[")
    ]
    assert [statement.split()[0] for statement in statements if statement != "COMMIT"] == [
        "SAVEPOINT",
        "DO",
        "RELEASE",
    ]
    assert (
        statements[1].index("account") < statements[1].index("item") < statements[1].index("part")
    )


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("tables", [[Item], [Item, Account]], ids=["one", "two"])
async def test_no_snapshot_before_the_lock(
    session_maker: Maker, other: asyncpg.Connection, isolation_level: Any, tables: list[Any]
) -> None:
    """Locked first, a REPEATABLE READ transaction sees what the earlier holder has written."""

    async def count() -> list[int]:
        async with (
            session_maker() as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            async with lock_tables(session, tables, mode="EXCLUSIVE"):
                return list(await session.scalars(text("SELECT id FROM item")))

    async with holding(other, "LOCK TABLE item"):
        task = asyncio.create_task(count())
        await waiting(other)
        await other.execute("INSERT INTO item (id, name) VALUES (7, '')")
    assert await task == [7]


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("timeout", ["5s", None])
@pytest.mark.parametrize("blocked", [False, True])
async def test_statements_do_not_grow_with_the_tables(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    isolation_level: Any,
    timeout: Any,
    blocked: bool,
) -> None:
    """Without a snapshot too, three tables take as many statements as one, free or not."""
    statements: list[str] = []

    def sent(*arguments: Any) -> None:
        statements.append(arguments[2])

    async def count(tables: list[Any]) -> int:
        async with (
            AsyncSession(engine) as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            await session.connection()
            statements.clear()
            async with lock_tables(session, tables, mode="EXCLUSIVE", timeout=timeout):
                taken = sum(not each.startswith("SAVEPOINT") for each in statements)
                assert await settings_of(session) == "0"
                assert await session.scalar(text("SHOW statement_timeout")) == "0"
        return taken

    event.listen(engine.sync_engine, "before_cursor_execute", sent)
    counts = []
    for tables in ([Item], [Item, Account, Part]):
        if blocked:
            async with holding(other, "LOCK TABLE item"):
                task = asyncio.create_task(count(tables))
                await waiting(other)
            counts.append(await task)
        else:
            counts.append(await count(tables))
    event.remove(engine.sync_engine, "before_cursor_execute", sent)
    assert counts[0] == counts[1]
    assert blocked or counts[0] <= 2


def test_the_text_is_made_once() -> None:
    """The text for the same locks is kept; other tables, order, mode or time have their own."""
    kinds = [
        (names, mode, limit)
        for names in (["a"], ["b"], ["a", "b"], ["b", "a"])
        for mode in (LockMode.SHARE, LockMode.EXCLUSIVE)
        for limit in (None, 1, 5000)
    ]
    texts = [lock_block(*kind) for kind in kinds]
    assert len(set(texts)) == len(kinds)
    for (names, mode, limit), made in zip(kinds, texts, strict=True):
        assert lock_block(list(names), mode, limit) is made
