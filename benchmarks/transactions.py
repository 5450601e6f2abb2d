"""What `get_transaction` costs beside SQLAlchemy's own blocks. Run as `python -m
benchmarks.transactions`.

Measured is the time from entering a block to having left it, with one statement inside, on a warm
connection:

- nested: in a session that is in a transaction, against `session.begin_nested()`;
- outermost: on an idle session, against `session.begin()`;
- resolve_commit: an outermost block that notes its transaction before the COMMIT, so that a lost
  answer can be resolved, against the same block without.

Wall time decides, because it is what a caller waits for. CPU time is that of the client and of its
backend together. The control is SQLAlchemy's block against itself.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy import Column, Executable, Identity, Integer, MetaData, Table, Text, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from benchmarks._declared import Benchmark, Experiment, Measure, at_most, with_cpu
from benchmarks._harness import Figures, Turn, backend_of, engines, tables, timed
from benchmarks._peers import LABELS, TOOLSETS
from benchmarks._run import alone
from benchmarks._worker import workers
from pgtoolset import get_transaction

Block: TypeAlias = Callable[[AsyncSession], AbstractAsyncContextManager[Any]]

metadata = MetaData()
notes = Table(
    "pgtoolset_benchmark_notes",
    metadata,
    Column("id", Integer, Identity(), primary_key=True),
    Column("note", Text),
)

SELECT, INSERT = text("SELECT 1"), insert(notes).values(note="measured")


async def nested(engine: AsyncEngine, block: Block, statement: Executable) -> Figures:
    """The time of a block inside a transaction that is open already."""
    async with AsyncSession(engine) as session:
        await session.begin()
        figures = await blocks(session, block, statement, await backend_of(session))
        await session.rollback()
    return figures


async def outermost(engine: AsyncEngine, block: Block, statement: Executable) -> Figures:
    """The time of a block that is a transaction of its own."""
    async with AsyncSession(engine) as session:
        backend = await backend_of(session)
        await session.rollback()
        return await blocks(session, block, statement, backend)


async def blocks(
    session: AsyncSession, block: Block, statement: Executable, backend: int
) -> Figures:
    """The time of one of some blocks.

    SQLAlchemy numbers savepoints again in each transaction, so that few of them leave room for
    their statements in the adapter's cache of prepared ones: the base is as fast as it gets.
    """

    async def one() -> None:
        async with block(session):
            await session.execute(statement)

    return await timed(one, backend)


def resolving(session: AsyncSession) -> AbstractAsyncContextManager[Any]:
    """Open a block whose commit could be resolved."""
    return get_transaction(session, resolve_commit=10)


@asynccontextmanager
async def peer(url: str) -> AsyncIterator[dict[str, Callable[..., Awaitable[Figures]]]]:
    """fastapi-toolsets, whose block has another name since version 4."""
    db: Any = importlib.import_module("fastapi_toolsets.db")
    block: Block = getattr(db, "get_transaction", None) or db.transaction
    async with engines(url, 1) as (engine,):
        yield {"nested": partial(nested, engine, block, SELECT)}


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    """Each library has an engine of its own: ours listens to the one that it works with, which
    costs a little."""
    async with (
        engines(url, 2) as (ours, theirs),
        tables(ours, metadata),
        workers(TOOLSETS, "benchmarks.transactions:peer", url) as peers,
    ):
        turns: dict[str, Turn] = {}
        for name, statement in (("SELECT", SELECT), ("INSERT", INSERT)):
            for kind, begin in (
                (nested, AsyncSession.begin_nested),
                (outermost, AsyncSession.begin),
            ):
                key = f"{kind.__name__} {name}"
                turns[key] = partial(kind, ours, get_transaction, statement)
                turns[f"{key}, theirs"] = partial(kind, theirs, begin, statement)
        turns["control"] = partial(nested, theirs, AsyncSession.begin_nested, SELECT)
        turns["resolving"] = partial(outermost, ours, resolving, INSERT)
        for name, worker in peers.items():
            turns[name] = worker.turn("nested")
        yield turns


def beside_sqlalchemy(
    kind: str, statement: str, by_hand: str, limit: float | None
) -> list[Measure]:
    """The measures of one kind of block with one statement."""
    measure = Measure(
        f"{kind}-{statement.lower()}",
        f"`get_transaction`, {kind}, one {statement}",
        f"{kind} {statement}",
        f"`session.{by_hand}()`",
        f"{kind} {statement}, theirs",
        target=at_most(limit) if limit else None,
    )
    return list(with_cpu(measure))


BENCHMARK = Benchmark(
    title="Transactions",
    about="A block with one statement on a warm connection, from its begin to its end.",
    experiments=(
        Experiment(
            "Blocks beside SQLAlchemy's own",
            contestants,
            (
                *beside_sqlalchemy("nested", "SELECT", "begin_nested", 1.05),
                *beside_sqlalchemy("nested", "INSERT", "begin_nested", 1.05),
                *beside_sqlalchemy("outermost", "SELECT", "begin", None),
                *beside_sqlalchemy("outermost", "INSERT", "begin", None),
                *with_cpu(
                    Measure(
                        "resolving",
                        "an outermost block with `resolve_commit=`, one INSERT",
                        "resolving",
                        "the same without",
                        "outermost INSERT",
                        target=at_most(1.35),
                    )
                ),
                *(
                    Measure(
                        f"nested-{name.replace(' ', '-')}",
                        "`get_transaction`, nested, one SELECT",
                        "nested SELECT",
                        f"{LABELS[name]}, which verifies nothing",
                        name,
                    )
                    for name in TOOLSETS
                ),
                *with_cpu(
                    Measure(
                        "control",
                        "control: `begin_nested()`",
                        "control",
                        "itself",
                        "nested SELECT, theirs",
                    )
                ),
            ),
            note="Both send the same two statements. A nested block executes 8 % more bytecode, "
            "for swallowed errors, callbacks after the commit, and cancellation.",
            seconds=30,
            warm_up=5,
        ),
    ),
)

if __name__ == "__main__":
    alone("transactions")
