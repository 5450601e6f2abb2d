"""What the options cost where nobody uses them. Run as `python -m benchmarks.unused`.

Settings, deadlines, holders, verified commits and callbacks are looked for in each block and before
each statement. Compared is CPU time of this process for a block without any of them and for a plain
block of SQLAlchemy's, which does not verify its COMMIT: the backend does the same for both. The
plain block takes part twice: the distance of its ratio from 1 says how far the others can be
trusted.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import create_db_context, get_transaction, holders

SELECT = text("SELECT 1")

#: Blocks of one contestant in one round.
BLOCKS = 20

#: Statements in a block: one, and as many as an endpoint has.
STATEMENTS = (1, 10)

PLAIN, CONTROL = "session_maker.begin()", "session_maker.begin() once more"
OURS, INNER, OUTER = "db_context()", "get_transaction(), nested", "get_transaction()"
SAVEPOINT = "begin_nested()"

#: What is divided by what, and the target: at most so much.
RATIOS = (
    (OURS, PLAIN, 1.02),
    (OUTER, PLAIN, None),
    (CONTROL, PLAIN, None),
    (INNER, SAVEPOINT, 1.05),
)

Block = Callable[[], AbstractAsyncContextManager[AsyncSession]]


class Nested(AbstractAsyncContextManager[AsyncSession]):
    """A block inside of a session's open transaction."""

    def __init__(
        self, maker: async_sessionmaker[AsyncSession], inner: Callable[[AsyncSession], Any]
    ) -> None:
        self._session = maker()
        self._inner = inner

    async def __aenter__(self) -> AsyncSession:
        await self._session.begin()
        self._block = self._inner(self._session)
        await self._block.__aenter__()
        return self._session

    async def __aexit__(self, *_: object) -> None:
        await self._block.__aexit__(None, None, None)
        await self._session.close()


class Outermost(Nested):
    """An outermost block of ours in a session of its own."""

    async def __aenter__(self) -> AsyncSession:
        self._block = self._inner(self._session)
        await self._block.__aenter__()
        return self._session


def contestants(engine: AsyncEngine, unseen: AsyncEngine) -> dict[str, Block]:
    """Return the blocks by name, those of SQLAlchemy's on an engine that the library never sees."""
    maker, plain = async_sessionmaker(engine), async_sessionmaker(unseen)
    return {
        PLAIN: plain.begin,
        CONTROL: plain.begin,
        OURS: create_db_context(maker),
        OUTER: lambda: Outermost(maker, get_transaction),
        INNER: lambda: Nested(maker, get_transaction),
        SAVEPOINT: lambda: Nested(plain, lambda session: session.begin_nested()),
    }


def blocks(block: Block, statements: int) -> Callable[[], Awaitable[float]]:
    """Return a function that runs blocks and returns the CPU time of one."""

    async def measure() -> float:
        began_at = time.process_time()
        for _ in range(BLOCKS):
            async with block() as session:
                for _ in range(statements):
                    await session.execute(SELECT)
        return (time.process_time() - began_at) / BLOCKS

    return measure


async def compete(url: str, rounds: int) -> None:
    for statements in STATEMENTS:
        engine, unseen = create_async_engine(url), create_async_engine(url)
        found = contestants(engine, unseen)
        results = await alternate(
            {name: blocks(block, statements) for name, block in found.items()}, rounds=rounds
        )
        assert holders(engine) == [] and "do_execute" not in vars(unseen.dialect)
        for each in (engine, unseen):
            await each.dispose()
        headline(f"A block with {statements} SELECT: CPU time of the client")
        for name, done in results.items():
            print(f"{name:<32} {Spread.of(each * 1e6 for each in done).median:7.0f} us")
        for ours, theirs, most in RATIOS:
            target = None if most is None else ("at most", most)
            tell(f"{ours} / {theirs}", Spread.of_ratios(results[ours], results[theirs]), target)


async def run(options: argparse.Namespace) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        await compete(url, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unused", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
