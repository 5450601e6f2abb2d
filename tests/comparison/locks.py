"""Promises about locks on tables, and advisory locks."""

import asyncio
import re
from contextlib import suppress
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tests.comparison.models import Base, Item, Order, Part, create_tables
from tests.comparison.promises import promise
from tests.comparison.stacks import FastapiToolsets, PgToolset, Stack, plain, until


def table_lock(stack: Stack, session: Any, *tables: type[Base], timeout: str = "100ms") -> Any:
    """The block of the stack that locks tables."""
    if isinstance(stack, PgToolset):
        from pgtoolset import lock_tables

        return lock_tables(session, tables, mode="EXCLUSIVE", timeout=timeout)
    from fastapi_toolsets.db import LockMode

    return stack.database.lock_tables(
        [*tables], session=session, mode=LockMode.EXCLUSIVE, timeout=timeout
    )


LOCKS = r"lock_tables?|table_lock|LockMode"


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def any_table(stack: Stack) -> bool:
    """A lock on a table whose name is a word of SQL."""
    create_tables(stack)
    try:
        async with stack.unit() as session, table_lock(stack, session, Order):
            return True
    except SQLAlchemyError:
        return False


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def restores(stack: Stack) -> bool:
    """After a table lock, lock_timeout has its earlier value."""
    async with stack.unit() as session, table_lock(stack, session, Part):
        return await session.scalar(text("SHOW lock_timeout")) == "0"


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def names_blockers(stack: Stack) -> bool:
    """The error of a table lock that timed out names the session in the way."""
    with plain(stack.url) as blocker:
        pid = blocker.info.backend_pid
        with blocker.transaction():
            blocker.execute("LOCK TABLE part")
            try:
                async with stack.unit() as session, table_lock(stack, session, Part):
                    raise AssertionError("the table was locked twice")
            except Exception as error:
                return re.search(rf"\b{pid}\b", str(error)) is not None


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def opposite_orders(stack: Stack) -> bool:
    """Two callers that name the same tables in opposite orders do not deadlock."""
    create_tables(stack)

    async def work(*tables: type[Base]) -> None:
        async with stack.unit() as session, table_lock(stack, session, *tables, timeout="30s"):
            pass

    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with plain(stack.url) as gate, plain(stack.url) as other:
        with gate.transaction():
            gate.execute("LOCK TABLE item")
            first = asyncio.create_task(work(Item, Part))
            await until(lambda: other.execute(waiting).fetchone() == (1,))
            second = asyncio.create_task(work(Part, Item))
            await until(lambda: other.execute(waiting).fetchone() == (2,))
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
    return outcomes == [None, None]


@promise(FastapiToolsets, PgToolset, lacking="advisory_lock")
async def advisory(stack: Stack) -> bool:
    """An advisory lock has ended when its block has failed and its session is closed."""
    if isinstance(stack, PgToolset):
        from pgtoolset import advisory_lock
    else:
        from fastapi_toolsets.db import advisory_lock
    with suppress(DBAPIError):
        async with stack.unit() as session, advisory_lock(session, 5):
            await session.execute(text("SELECT 1/0"))
    with plain(stack.url) as other:
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        return other.execute(held).fetchone() == (0,)
