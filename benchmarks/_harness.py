"""Contestants measured in alternation, so that what a noisy machine does to one it does to the
other.

Absolute times on a shared machine drift by tens of percent, within a minute and within a tenth of a
second. A round here is short, each round runs every contestant once, and only figures of the same
round are divided by one another; of those ratios the median is kept, with the quartiles and with
how far it is known. In six seconds, turns of 5 ms find the median of a ratio to 0.7 %, and turns of
40 ms to 4 %: what a machine does to one turn, it does to its neighbour only where that is near.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
import statistics
import subprocess
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtoolset.testing import EmbeddedServer

R = TypeVar("R")

#: What a contestant gives for one turn: figures by their names, mostly `wall` and `cpu`.
Figures: TypeAlias = dict[str, float]

#: One turn of a contestant.
Turn: TypeAlias = Callable[[], Awaitable[Figures]]

#: Seconds after which a turn has failed, and likewise what is done before and after all turns.
TURN_LIMIT, SET_UP_LIMIT = 60, 120


@dataclass(slots=True)
class Alternation:
    """How often contestants take turns, and which of them have failed.

    Attributes:
        rounds: rounds that are measured, at most.
        warm_up: rounds before them that are not.
        seconds: no round begins so long after the warm-up, once `least` were measured.
        least: rounds that are measured even where the time is over.
        limit: no round begins so long after the warm-up began, even where fewer were measured.
        after_round: called with the number of rounds that are done.
        failures: contestants that raised an error, and the errors. They take no further turn.
    """

    rounds: int
    warm_up: int = 2
    seconds: float = float("inf")
    least: int = 3
    limit: float = float("inf")
    after_round: Callable[[int], None] = lambda done: None
    failures: dict[str, str] = field(default_factory=dict)

    async def run(
        self, contestants: Mapping[str, Callable[[], Awaitable[R]]]
    ) -> dict[str, list[R]]:
        """Run every contestant once per round and return the results, round by round.

        The order is drawn again for each round, the same in every run: a drift, or a neighbour who
        leaves the caches warm, then helps each as often as it harms it. (An order that is only
        reversed has the two at its ends run twice in a row, which is worth some percent.) The
        garbage of one contestant is collected before the next one starts, and collection stays on
        while it runs. What has survived the warm-up is frozen, as in a server that has been up for
        a while, so that collecting is quick.
        """
        order = random.Random(0)
        results: dict[str, list[R]] = {name: [] for name in contestants}
        end = float("inf")
        last = time.monotonic() + self.limit
        gc.collect()
        gc.freeze()
        try:
            for number in range(-self.warm_up, self.rounds):
                if number == 0:
                    gc.collect()
                    gc.freeze()
                    end = time.monotonic() + self.seconds
                now = time.monotonic()
                if now > last or (number >= self.least and now > end):
                    break
                for name in order.sample(list(contestants), len(contestants)):
                    if name not in self.failures:
                        result = await self._turn(name, contestants[name])
                        if number >= 0 and name not in self.failures:
                            results[name].extend(result)
                self.after_round(max(number + 1, 0))
        finally:
            gc.unfreeze()
        return results

    async def _turn(self, name: str, turn: Callable[[], Awaitable[R]]) -> list[R]:
        gc.collect()
        try:
            async with in_time(TURN_LIMIT, "no result"):
                return [await turn()]
        except Exception as error:
            self.failures[name] = described(error)
        return []


class Described(Exception):
    """An error whose message says all, without the name of its class."""


@asynccontextmanager
async def in_time(seconds: float, what: str) -> AsyncIterator[None]:
    """Cancel the block after some seconds, with an error that says what there is not."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise Described(f"{what} within {seconds:g} s") from error


def described(error: BaseException) -> str:
    """Return an error as one short line."""
    if isinstance(error, Described):
        return str(error)
    cause = error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    cause = getattr(cause, "orig", None) or cause
    inner = cause.__cause__ if type(cause).__module__.startswith("sqlalchemy") else None
    lines = str(inner or cause).strip().splitlines() or [""]
    # An adapter of SQLAlchemy puts the class of the driver's error before its message.
    line = lines[0].rpartition("'>: ")[2]
    return f"{type(inner or cause).__name__}: {line}"[:160].removesuffix(": ")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, and what is around it.

    Attributes:
        low: the lower quartile.
        median: of the figures.
        high: the upper quartile.
        least: where the true median begins, with a confidence of 95 %.
        most: where it ends. Of fewer than six figures, which cannot say so much, all lie between.
    """

    low: float
    median: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        ordered = sorted(figures)
        count = len(ordered)
        if count == 1:
            return cls(*ordered * 5)
        # The true median lies between these two of them, whatever the distribution: how many are
        # below it is binomial.
        outside = max(0, int((count - 1.96 * math.sqrt(count)) / 2))
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(low, median, high, ordered[outside], ordered[-1 - outside])

    @classmethod
    def of_ratios(cls, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
        """The ratios of figures that were measured in the same round."""
        return cls.of(one / other for one, other in zip(ours, theirs, strict=True))


def nanoseconds_of(pid: int) -> int:
    """Return the CPU time of a process; 0 where it runs elsewhere, or has ended."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except OSError:
        return 0


@contextmanager
def clocked(calls: int = 1, *backends: int) -> Iterator[Figures]:
    """Measure a block: the seconds of one call, as wall time and as CPU time.

    Args:
        calls: calls that the block makes.
        backends: processes of PostgreSQL whose CPU time counts beside that of this process.
            `Figures` has that of this process alone as `client`.
    """
    figures: Figures = {}
    theirs = sum(map(nanoseconds_of, backends))
    client, wall = time.process_time_ns(), time.perf_counter_ns()
    yield figures
    wall, client = time.perf_counter_ns() - wall, time.process_time_ns() - client
    theirs = sum(map(nanoseconds_of, backends)) - theirs
    figures["wall"] = wall / 1e9 / calls
    figures["client"] = client / 1e9 / calls
    figures["cpu"] = (client + theirs) / 1e9 / calls


#: Calls of one turn that are timed: a few milliseconds of blocks with one statement.
CALLS = 5


async def timed(call: Callable[[], Awaitable[object]], *backends: int) -> Figures:
    """Measure some calls in a row.

    The one before them is not measured: it finds the processor's caches as the other contestant has
    left them.
    """
    await call()
    with clocked(CALLS, *backends) as figures:
        for _ in range(CALLS):
            await call()
    return figures


async def output_of(command: Sequence[str], environ: Mapping[str, str]) -> bytes:
    """Return what a process prints, which does not outlive a turn that is cancelled.

    Raises:
        Described: the process has failed; the message is its last line.
    """
    process = await asyncio.create_subprocess_exec(
        *command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = errors.decode().strip().splitlines() or [f"ended with {process.returncode}"]
        raise Described(lines[-1][:160])
    return output


async def backend_of(connection: Any) -> int:
    """Return the process of PostgreSQL that serves a session or a connection."""
    return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())


@contextmanager
def database_url(**settings: str) -> Iterator[str]:
    """`DATABASE_URL` for SQLAlchemy, or a PostgreSQL of our own with these settings, over the
    driver that the environment variable `DRIVER` names, or asyncpg."""
    given = os.environ.get("DATABASE_URL")
    if given:
        yield given
    else:
        with EmbeddedServer(settings=settings) as server:
            yield server.url(driver=f"postgresql+{os.environ.get('DRIVER') or 'asyncpg'}")


def plain(url: str) -> str:
    """Return a URL of SQLAlchemy as drivers take it."""
    return "postgresql://" + url.partition("://")[2]


@asynccontextmanager
async def tables(engine: AsyncEngine, metadata: MetaData) -> AsyncIterator[None]:
    """Create tables, which an earlier run may have left, and drop them."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    try:
        yield
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.drop_all)


@asynccontextmanager
async def engines(url: str, number: int, **options: Any) -> AsyncIterator[list[AsyncEngine]]:
    """Yield engines and dispose of them."""
    made = [create_async_engine(url, **options) for _ in range(number)]
    try:
        yield made
    finally:
        for engine in made:
            await engine.dispose()
