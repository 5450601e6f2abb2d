"""What `get_transaction` costs beside SQLAlchemy's own blocks. Run as `python -m
benchmarks.transactions`.

Measured is the time from entering a block to having left it, with one statement inside, on a warm
connection:

- nested: in a session that is in a transaction, against `session.begin_nested()`;
- outermost: on an idle session, against `session.begin()`;
- resolve_commit: an outermost block that notes its transaction before the COMMIT, so that a lost
  answer can be resolved, against the same block without.

Wall time decides, because it is what a caller waits for. The CPU time is that of this process
alone, without PostgreSQL's part: the same difference against a smaller base. The control is
SQLAlchemy's block against itself.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import Column, Executable, Identity, Integer, MetaData, Table, Text, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import get_transaction

Block: TypeAlias = Callable[[AsyncSession], AbstractAsyncContextManager[Any]]

metadata = MetaData()
notes = Table(
    "pgtoolset_benchmark_notes",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("note", Text),
)

STATEMENTS: dict[str, Executable] = {
    "SELECT 1": text("SELECT 1"),
    "INSERT": insert(notes).values(note="measured"),
}

#: Blocks between two looks at the clock. SQLAlchemy numbers savepoints anew in each transaction, so
#: that few of them leave room for their statements in the adapter's cache of prepared ones: the
#: base is as fast as it gets.
BLOCKS = 20


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one block took."""

    wall: float
    cpu: float


async def nested(engine: AsyncEngine, block: Block, statement: Executable) -> Seconds:
    """The time of a block inside a transaction that is open already."""
    async with AsyncSession(engine) as session:
        await session.begin()
        seconds = await timed(session, block, statement)
        await session.rollback()
    return seconds


async def outermost(engine: AsyncEngine, block: Block, statement: Executable) -> Seconds:
    """The time of a block that is a transaction of its own."""
    async with AsyncSession(engine) as session:
        return await timed(session, block, statement)


async def timed(session: AsyncSession, block: Block, statement: Executable) -> Seconds:
    """The first block is not measured: it finds the processor's caches as the other contestant has
    left them."""
    async with block(session):
        await session.execute(statement)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(BLOCKS):
        async with block(session):
            await session.execute(statement)
    return Seconds((time.perf_counter() - wall) / BLOCKS, (time.process_time() - cpu) / BLOCKS)


def resolving(session: AsyncSession) -> AbstractAsyncContextManager[Any]:
    """Open a block whose commit could be resolved."""
    return get_transaction(session, resolve_commit=10)


def contestants(
    measure: Callable[[AsyncEngine, Block, Executable], Awaitable[Seconds]],
    engines: tuple[AsyncEngine, AsyncEngine],
    theirs: Block,
    statement: Executable,
) -> dict[str, Callable[[], Awaitable[Seconds]]]:
    """Each library has an engine of its own: ours listens to the one that it works with, which
    costs a little."""
    our_engine, their_engine = engines
    return {
        "pgtoolset": lambda: measure(our_engine, get_transaction, statement),
        "sqlalchemy": lambda: measure(their_engine, theirs, statement),
        "control": lambda: measure(their_engine, theirs, statement),
    }


async def compare(
    what: str,
    between: dict[str, Callable[[], Awaitable[Seconds]]],
    rounds: int,
    target: tuple[Literal["at most", "at least"], float] | None = None,
    *,
    base: str = "SQLAlchemy's own block",
) -> None:
    results = await alternate(between, rounds=rounds, warm_up=10)
    theirs = results["sqlalchemy"]
    for name, mark in (("pgtoolset", ""), ("control", ", control")):
        ours = results[name]
        wall = Spread.of_ratios([each.wall for each in ours], [each.wall for each in theirs])
        cpu = Spread.of_ratios([each.cpu for each in ours], [each.cpu for each in theirs])
        tell(f"{what}, wall time{mark}", wall, target if name == "pgtoolset" else None)
        tell(f"{what}, CPU time{mark}", cpu)
    wall_time = Spread.of(each.wall for each in theirs).median
    more = Spread.of(
        one.cpu - other.cpu for one, other in zip(results["pgtoolset"], theirs, strict=True)
    ).median
    print(
        f"    {base}: {wall_time * 1e6:.0f} us of wall time; ours adds "
        f"{more * 1e6:.1f} us of CPU time"
    )


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg")
    with database_url() as url:
        engines = create_async_engine(url), create_async_engine(url)
        try:
            async with engines[0].begin() as connection:
                await connection.run_sync(metadata.drop_all)
                await connection.run_sync(metadata.create_all)
            headline("get_transaction(session) nested / session.begin_nested()")
            for name, statement in STATEMENTS.items():
                between = contestants(nested, engines, AsyncSession.begin_nested, statement)
                await compare(name, between, rounds, ("at most", 1.05))
            headline("get_transaction(session) outermost / session.begin()")
            for name, statement in STATEMENTS.items():
                between = contestants(outermost, engines, AsyncSession.begin, statement)
                await compare(name, between, rounds)
            headline("get_transaction(session, resolve_commit=10) / get_transaction(session)")
            statement = STATEMENTS["INSERT"]
            between = {
                "pgtoolset": lambda: outermost(engines[0], resolving, statement),
                "sqlalchemy": lambda: outermost(engines[0], get_transaction, statement),
                "control": lambda: outermost(engines[0], get_transaction, statement),
            }
            await compare("INSERT", between, rounds, ("at most", 1.35), base="Without")
            async with engines[0].begin() as connection:
                await connection.run_sync(metadata.drop_all)
        finally:
            for engine in engines:
                await engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transactions", description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
