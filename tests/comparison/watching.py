"""Promises about waits for a change of a row."""

import asyncio
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from tests.comparison.models import Item, create_tables
from tests.comparison.promises import promise
from tests.comparison.stacks import FastapiToolsets, PgToolset, Stack, plain


def wait(stack: Stack, session: Any, **options: Any) -> Any:
    """The stack's wait for a change of the item."""
    if isinstance(stack, PgToolset):
        from pgtoolset import wait_for_row_change
    else:
        from fastapi_toolsets.db import wait_for_row_change
    return wait_for_row_change(session, Item, 1, **options)


WATCHING = r"wait_for_\w*(row|change)\w*|\w*RowWatcher|watch_rows?"


@promise(FastapiToolsets, PgToolset, lacking=WATCHING)
async def no_connection(stack: Stack) -> bool:
    """A wait for a row holds no connection between its looks, and sees the change."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        task = asyncio.create_task(wait(stack, session, interval=0.2, timeout=20))
        free = 0
        for _ in range(20):
            await asyncio.sleep(0.02)
            free += stack.checked_out() == 0
        with plain(stack.url) as connection:
            connection.execute("UPDATE item SET name = 'paid'")
        return (await task).name == "paid" and free > 0


@promise(FastapiToolsets, PgToolset, lacking=WATCHING)
async def last_look(stack: Stack) -> bool:
    """A wait whose interval is longer than its timeout still sees a change."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        task = asyncio.create_task(wait(stack, session, interval=30, timeout=2))
        await asyncio.sleep(0.5)
        with plain(stack.url) as connection:
            connection.execute("UPDATE item SET name = 'paid'")
        try:
            return (await task).name == "paid"
        except TimeoutError:
            return False


@promise(FastapiToolsets, PgToolset, lacking=WATCHING)
async def waiters(stack: Stack) -> bool:
    """A hundred waiters need one connection between them."""
    create_tables(stack)
    backends = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    backends += " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    tasks: list[asyncio.Task[Any]] = []

    async def with_watcher(connection: Any) -> int:
        from pgtoolset import RowWatcher

        async with RowWatcher(stack.engine, interval=0.1) as watcher:
            waits = (watcher.wait(Item, 1, timeout=60) for _ in range(100))
            tasks.extend(asyncio.create_task(wait) for wait in waits)
            return await most_backends(connection)

    async def each_for_itself(connection: Any) -> int:
        sessions = [AsyncSession(stack.engine) for _ in range(100)]
        waits = (wait(stack, session, interval=0.1, timeout=60) for session in sessions)
        tasks.extend(asyncio.create_task(wait) for wait in waits)
        return await most_backends(connection)

    async def most_backends(connection: Any) -> int:
        most = 0
        for _ in range(20):
            await asyncio.sleep(0.05)
            most = max(most, connection.execute(backends).fetchone()[0])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most

    with plain(stack.url) as connection:
        if isinstance(stack, PgToolset):
            return await with_watcher(connection) == 1
        return await each_for_itself(connection) == 1
