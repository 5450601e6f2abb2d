"""Crowds of waiters on a small pool: what their polls do, and a pool that has nothing left for
them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtoolset.watch import _turns
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
    """Hold all that the pool has, so that whoever looks has to wait."""
    async with AsyncExitStack() as stack:
        for _ in range(engine.pool.size()):  # type: ignore[attr-defined]
            await stack.enter_async_context(engine.connect())
        yield


class Polls:
    """What is asked over the connections of an engine.

    Attributes:
        sizes: for each statement, the number of its parameters.
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
        self.sizes.append(len(parameters))
        if self.turns:
            self.turns[-1].append(len(parameters))

    def _checkout(self, *_: Any) -> None:
        self.turns.append([])


def in_line() -> int:
    """The waiters who stand in a line, and those who lead; not those who are being looked for."""
    lines = [line for turns in list(_turns._all.values()) for line in list(turns._lines.values())]
    return sum(
        len([place for place in line._queue if place.is_taken]) + (line._leader is not None)
        for line in lines
    )


def turns_of(engine: AsyncEngine) -> list[Any]:
    """What there is of an engine while somebody waits over it: one for each event loop."""
    return [turns for turns in list(_turns._all.values()) if turns.pool is engine.pool]
