"""What a unit of work costs, and each of its options. Run as `python -m benchmarks.units`.

One SELECT in `db_context()`, on an engine with one connection for each contestant. CPU time is that
of the client and of its backend together.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from benchmarks._declared import Benchmark, Experiment, Measure, at_least, at_most, with_cpu
from benchmarks._harness import Figures, Turn, backend_of, clocked, engines
from benchmarks._run import alone
from pgtoolset import create_db_context, holders, warn_of_idle_transactions
from pgtoolset._postgres import statements
from pgtoolset._postgres.holders import _KEY, Holders, IdleLimit

SELECT = text("SELECT 1")
SETTINGS = {"app.tenant_id": "6d1cb3a4-8f4b-4c43-9d5e-0f7f0d6f6a51", "statement_timeout": "5s"}
BY_HAND = text(
    "SELECT set_config('app.tenant_id', :tenant, true), set_config('statement_timeout', '5s', true)"
)

#: Units in one turn.
UNITS = 30

Block = Callable[[], AbstractAsyncContextManager[AsyncSession]]


def leave_alone(engine: AsyncEngine) -> None:
    """Have the library believe that it notes the holders and the statements of an engine."""
    vars(engine.sync_engine.pool)[_KEY] = Holders(IdleLimit())
    vars(engine.dialect)[statements._KEY] = {}


async def check_holders(engine: AsyncEngine, count: int) -> None:
    """Prove that the holders of an engine are noted, or are not."""
    async with create_db_context(async_sessionmaker(engine))() as session:
        await session.execute(SELECT)
        assert len(holders(engine)) == count


def turn(block: Block, *, sets: bool = False) -> Turn:
    """Return a turn of units with one SELECT, after a statement that sets something."""
    backends: list[int] = []

    async def run() -> Figures:
        if not backends:
            async with block() as session:
                backends.append(await backend_of(session))
        with clocked(UNITS, *backends) as figures:
            for _ in range(UNITS):
                async with block() as session:
                    if sets:
                        await session.execute(BY_HAND, {"tenant": SETTINGS["app.tenant_id"]})
                    await session.execute(SELECT)
        return figures

    return run


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with engines(url, 9, pool_size=1, max_overflow=0) as made:
        makers = [async_sessionmaker(engine) for engine in made]
        leave_alone(made[4])
        warn_of_idle_transactions(made[5], 60)
        await check_holders(made[4], 0)
        await check_holders(made[5], 1)
        yield {
            "plain": turn(create_db_context(makers[0])),
            "plain again": turn(create_db_context(makers[1])),
            "session_maker": turn(makers[2].begin),
            "left alone": turn(create_db_context(makers[4])),
            "reported": turn(create_db_context(makers[5])),
            "settings": turn(create_db_context(makers[6], settings=SETTINGS)),
            "statement": turn(create_db_context(makers[7]), sets=True),
            "deadline": turn(create_db_context(makers[8], deadline=2)),
        }


CONTEXT, MAKER = "`db_context()`", "`session_maker.begin()`"

BENCHMARK = Benchmark(
    title="Units of work",
    about="One SELECT in a unit of work without HTTP, and what its options add.",
    experiments=(
        Experiment(
            "One SELECT in a unit of work",
            contestants,
            (
                *with_cpu(Measure("context", CONTEXT, "plain", MAKER, "session_maker")),
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
            seconds=25,
        ),
    ),
)

if __name__ == "__main__":
    alone("units")
