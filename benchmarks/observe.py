"""What it costs to be observed. Run as `python -m benchmarks.observe`.

One SELECT in `db_context()`, on engines in alternation: one that has never had an observer, one
whose observer has unsubscribed, one with an observer that counts, and one with OpenTelemetry's
observer, which records into nothing. The first one takes part twice: the distance of its ratio from
1 says how far the others can be trusted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from benchmarks._declared import Benchmark, Experiment, Measure, Target, at_least
from benchmarks._harness import Turn, engines, timed
from benchmarks._run import alone
from pgtoolset import create_db_context
from pgtoolset.observe import Event, TransactionEnded, subscribe
from pgtoolset.observe.otel import OpenTelemetryObserver

SELECT = text("SELECT 1")


class Counter:
    """Counts the transactions that it is called with."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: Event, /) -> None:
        self.count += isinstance(event, TransactionEnded)


def turn(engine: AsyncEngine) -> Turn:
    """Return a turn that runs blocks."""
    db_context = create_db_context(async_sessionmaker(engine))

    async def block() -> None:
        async with db_context() as session:
            await session.execute(SELECT)

    return partial(timed, block)


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with engines(url, 5) as made:
        _, _, ended, counted, otel = made
        silent, counter = Counter(), Counter()
        subscribe(ended, silent)()
        subscribe(counted, counter)
        subscribe(otel, OpenTelemetryObserver(otel))
        names = ("alone", "control", "ended", "counted", "otel")
        yield {name: turn(engine) for name, engine in zip(names, made, strict=True)}
        assert silent.count == 0 < counter.count


ALONE = "an engine that was never observed"


def beside_alone(name: str, what: str, target: Target | None = None) -> tuple[Measure, Measure]:
    """Throughput and CPU time of the client, beside an engine that was never observed."""
    throughput = f"blocks a second, {what}"
    return (
        Measure(name, throughput, name, ALONE, "alone", inverse=True, target=target),
        Measure(
            f"{name}-cpu", f"CPU time of the client, {what}", name, ALONE, "alone", of="client"
        ),
    )


BENCHMARK = Benchmark(
    title="Observers",
    about="One SELECT in `db_context()`, observed or not.",
    packages=("opentelemetry-api",),
    experiments=(
        Experiment(
            "One SELECT, observed",
            contestants,
            (
                *beside_alone("ended", "an observer that has unsubscribed", at_least(0.98)),
                *beside_alone("counted", "an observer that counts"),
                *beside_alone("otel", "OpenTelemetry's observer"),
                *beside_alone("control", "control: never observed"),
            ),
            seconds=15,
        ),
    ),
)

if __name__ == "__main__":
    alone("observe")
