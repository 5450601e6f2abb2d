"""Crowds of waiters on a small pool, and the polls that they send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtoolset.watch import _queues
from tests.support import until


@asynccontextmanager
async def small(url: str, size: int, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine with so many connections and not one more, all of them open; afterwards they must
    all be there."""
    engine = create_async_engine(
        url, **{"pool_size": size, "max_overflow": 0, "pool_timeout": 30, **options}
    )
    try:
        async with every_connection(engine):
            pass
        yield engine
        await until(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


@asynccontextmanager
async def every_connection(engine: AsyncEngine) -> AsyncIterator[None]:
    """Hold every connection of the pool, so that polls have to wait."""
    async with AsyncExitStack() as stack:
        for _ in range(engine.pool.size()):  # type: ignore[attr-defined]
            await stack.enter_async_context(engine.connect())
        yield


class Polls:
    """What is asked over the connections of an engine.

    Attributes:
        sizes: for each statement, the number of keys that it polls.
        turns: the same for each checkout from the pool; for pools of one connection.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.sizes: list[int] = []
        self.turns: list[list[int]] = []
        event.listen(engine.sync_engine, "before_cursor_execute", self._statement)
        event.listen(engine.sync_engine, "checkout", self._checkout)

    def _statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> None:
        size = 0
        if "pgtoolset_wanted" in statement:
            # asyncpg takes the parameters by position, psycopg by name.
            values = parameters.values() if isinstance(parameters, dict) else parameters
            keys = next(iter(values))  # as text, or as an array
            size = keys.count(",") + 1 if isinstance(keys, str) else len(keys)
        self.sizes.append(size)
        if self.turns:
            self.turns[-1].append(size)

    def _checkout(self, *_: Any) -> None:
        self.turns.append([])


def queued() -> int:
    """The waiters in queues, and those that lead; not those that another one polls for."""
    queues = [
        queue for share in list(_queues._shares.values()) for queue in list(share._queues.values())
    ]
    return sum(
        len([entry for entry in queue._entries if entry.is_waiting]) + (queue._leader is not None)
        for queue in queues
    )


def shares_of(engine: AsyncEngine) -> list[Any]:
    """The shares of an engine's pool while there are waiters: one for each event loop."""
    return [share for share in list(_queues._shares.values()) if share.pool is engine.pool]
