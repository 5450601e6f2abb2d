"""What a unit of work costs, and each of its options. Run as `python -m benchmarks.units`.

One SELECT in `db_context()`, on an engine with one connection for each contestant. CPU time is that
of the client and of its backend together.

Then blocks without an option. Settings, deadlines, holders, verified commits, callbacks and
observers are looked for in each block and before each statement. Compared is CPU time of this
process, beside blocks of SQLAlchemy's on an engine that the library never sees, which do not verify
their COMMIT: the backend does the same for both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from benchmarks._declared import Benchmark, Experiment, Measure, at_least, at_most, with_cpu
from benchmarks._harness import Figures, Turn, backend_of, engines, timed
from benchmarks._run import alone
from pgtoolset import create_db_context, get_transaction, holders, warn_of_idle_transactions
from pgtoolset._postgres import statements
from pgtoolset._postgres.holders import _KEY, Holders, IdleLimit

SELECT = text("SELECT 1")
SETTINGS = {"app.tenant_id": "6d1cb3a4-8f4b-4c43-9d5e-0f7f0d6f6a51", "statement_timeout": "5s"}
BY_HAND = text(
    "SELECT set_config('app.tenant_id', :tenant, true), set_config('statement_timeout', '5s', true)"
)

CONTEXT, MAKER = "`db_context()`", "`session_maker.begin()`"

Maker: TypeAlias = async_sessionmaker[AsyncSession]
Block: TypeAlias = Callable[[], AbstractAsyncContextManager[AsyncSession]]
Inner: TypeAlias = Callable[[AsyncSession], AbstractAsyncContextManager[object]]


def leave_alone(engine: AsyncEngine) -> None:
    """Have the library believe that it notes the holders and the statements of an engine."""
    vars(engine.sync_engine.pool)[_KEY] = Holders(IdleLimit())
    vars(engine.dialect)[statements._KEY] = {}


def notes_holders(engine: AsyncEngine) -> bool:
    """Return whether the library follows which connections of the pool are out."""
    return not {"_do_get", "_do_return_conn", "connect"}.isdisjoint(vars(engine.sync_engine.pool))


def is_seen(engine: AsyncEngine) -> bool:
    """Return whether the library has replaced a method of the pool or of the dialect."""
    return notes_holders(engine) or any(name.startswith("do_") for name in vars(engine.dialect))


async def check_holders(engine: AsyncEngine, count: int) -> None:
    """Prove that the holders of an engine are noted, or are not."""
    async with create_db_context(async_sessionmaker(engine))() as session:
        await session.execute(SELECT)
        assert len(holders(engine)) == count
    assert notes_holders(engine) is bool(count)


def turn(block: Block, *, sets: bool = False, selects: int = 1) -> Turn:
    """Return a turn of units with some SELECTs, after a statement that sets something."""
    backends: list[int] = []

    async def unit() -> None:
        async with block() as session:
            if sets:
                await session.execute(BY_HAND, {"tenant": SETTINGS["app.tenant_id"]})
            for _ in range(selects):
                await session.execute(SELECT)

    async def run() -> Figures:
        if not backends:
            async with block() as session:
                backends.append(await backend_of(session))
        return await timed(unit, *backends)

    return run


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with engines(url, 7, pool_size=1, max_overflow=0) as made:
        plain, again, alone, reported, settings, statement, deadline = made
        leave_alone(alone)
        warn_of_idle_transactions(reported, 60)
        await check_holders(alone, 0)
        await check_holders(reported, 1)
        yield {
            "plain": turn(context(plain)),
            "plain again": turn(context(again)),
            "left alone": turn(context(alone)),
            "reported": turn(context(reported)),
            "settings": turn(context(settings, settings=SETTINGS)),
            "statement": turn(context(statement), sets=True),
            "deadline": turn(context(deadline, deadline=2)),
        }
        await check_holders(alone, 0)
        await check_holders(reported, 1)


def context(engine: AsyncEngine, **options: Any) -> Block:
    """Units of work on an engine."""
    return create_db_context(async_sessionmaker(engine), **options)


@asynccontextmanager
async def outermost(maker: Maker, block: Inner) -> AsyncIterator[AsyncSession]:
    """A block in a session of its own."""
    async with maker() as session, block(session):
        yield session


@asynccontextmanager
async def nested(maker: Maker, inner: Inner) -> AsyncIterator[AsyncSession]:
    """A block inside of a session's open transaction."""
    async with maker() as session:
        await session.begin()
        async with inner(session):
            yield session


def begin(session: AsyncSession) -> AbstractAsyncContextManager[object]:
    return session.begin()


def savepoint(session: AsyncSession) -> AbstractAsyncContextManager[object]:
    return session.begin_nested()


@asynccontextmanager
async def blocks(url: str, number: int) -> AsyncIterator[Mapping[str, Turn]]:
    """Blocks with so many statements, those of SQLAlchemy's where the library sees nothing."""
    async with engines(url, 2) as (seen, unseen):
        ours, theirs = async_sessionmaker(seen), async_sessionmaker(unseen)
        kinds: dict[str, Block] = {
            "plain": theirs.begin,
            "control": theirs.begin,
            "context": context(seen),
            "outermost": partial(outermost, ours, get_transaction),
            "begin": partial(outermost, theirs, begin),
            "nested": partial(nested, ours, get_transaction),
            "savepoint": partial(nested, theirs, savepoint),
        }
        yield {name: turn(block, selects=number) for name, block in kinds.items()}
        assert is_seen(seen) and not is_seen(unseen)


def unused(number: int) -> Experiment:
    """Blocks with so many statements."""

    def ratio(name: str, what: str, beside: str, theirs: str, limit: float | None) -> Measure:
        target = None if limit is None else at_most(limit)
        return Measure(f"{name}-{number}", what, name, beside, theirs, of="client", target=target)

    selects = "1 SELECT" if number == 1 else f"{number} SELECTs"
    return Experiment(
        f"No option is used, {selects}: CPU time of the client",
        partial(blocks, number=number),
        (
            ratio("context", CONTEXT, MAKER, "plain", 1.02),
            ratio("outermost", "`get_transaction`", "`session.begin()`", "begin", None),
            ratio("nested", "`get_transaction`, nested", "`begin_nested()`", "savepoint", 1.05),
            ratio("control", f"control: {MAKER}", "itself", "plain", None),
        ),
        seconds=12,
    )


BENCHMARK = Benchmark(
    title="Units of work",
    about="Units of work without HTTP, what each option adds, and what options cost unused.",
    experiments=(
        Experiment(
            "One SELECT in a unit of work",
            contestants,
            (
                *with_cpu(
                    Measure(
                        "settings",
                        "`settings=` of two",
                        "settings",
                        CONTEXT,
                        "plain",
                        target=at_most(1.15),
                    ),
                    target=True,
                ),
                *with_cpu(
                    Measure(
                        "settings-by-hand",
                        "a statement of its own that sets them",
                        "statement",
                        CONTEXT,
                        "plain",
                    )
                ),
                *with_cpu(
                    Measure(
                        "deadline",
                        "`deadline=`",
                        "deadline",
                        CONTEXT,
                        "plain",
                        target=at_most(1.10),
                    ),
                    target=True,
                ),
                Measure(
                    "holders",
                    "throughput while holders are noted",
                    "plain",
                    "the same on an engine whose pool is left alone",
                    "left alone",
                    inverse=True,
                    target=at_least(0.98),
                ),
                Measure(
                    "idle-reported",
                    "throughput while idle transactions are reported",
                    "reported",
                    "the same on an engine whose pool is left alone",
                    "left alone",
                    inverse=True,
                    target=at_least(0.98),
                ),
                *with_cpu(
                    Measure("control", f"control: {CONTEXT}", "plain again", "itself", "plain")
                ),
            ),
            note="`deadline=` sends its limit with the BEGIN, like `settings=`, and runs a timer "
            "for each statement.",
            seconds=20,
        ),
        unused(1),
        unused(10),
    ),
)

if __name__ == "__main__":
    alone("units")
