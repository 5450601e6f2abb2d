"""Many-to-many writes against plain SQLAlchemy, raw asyncpg and fastapi-toolsets. Run as `python -m
benchmarks.m2m`.

Measured is the time of one call on a warm connection inside an open transaction, which is then
rolled back:

- add of 1 row, against `session.execute(insert(table), {...})`;
- add of 10,000 and set of 10,000 with 1 % changed, related rows given as instances and as keys,
against the very same
  statement sent through raw asyncpg with the keys at hand, and against fastapi-toolsets;
- the cost per row from 1,000 to 100,000.

A set is two statements, the lock of the owner and the difference; raw asyncpg sends the difference
alone.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import asyncpg
from sqlalchemy import Column, ForeignKey, Table, event, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from benchmarks import _peers
from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import m2m_add, m2m_set

MOST = 100_000
MANY = 10_000
#: Calls between two looks at the clock where one takes less than a millisecond.
CALLS = 50


class Base(DeclarativeBase):
    pass


link = Table(
    "pgtoolset_benchmark_link",
    Base.metadata,
    Column("post", ForeignKey("pgtoolset_benchmark_post.id"), primary_key=True),
    Column("tag", ForeignKey("pgtoolset_benchmark_tag.id"), primary_key=True),
)


class Post(Base):
    __tablename__ = "pgtoolset_benchmark_post"

    id: Mapped[int] = mapped_column(primary_key=True)
    tags: Mapped[list[Tag]] = relationship(secondary=link)


class Tag(Base):
    __tablename__ = "pgtoolset_benchmark_tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Bench:
    """A post, many tags, and what is done to them."""

    def __init__(
        self, engine: AsyncEngine, session: AsyncSession, raw: asyncpg.Connection, peer: Any
    ) -> None:
        self.engine = engine
        self.session = session
        self.raw = raw
        self.peer = peer
        self.tags = [Tag(id=number) for number in range(1, MOST + 1)]
        self.post = Post(id=1)
        for instance in (self.post, *self.tags):
            # Instances of which the key is known and nothing else is: loading them is not what is
            # measured.
            state: Any = instance._sa_instance_state
            state.key = state.mapper.identity_key_from_instance(instance)

    async def fill(self, size: int) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(f"TRUNCATE {link.name}"))
            if size:
                await connection.execute(
                    text(
                        f"INSERT INTO {link.name} SELECT 1, number FROM generate_series(1, "
                        f"{size}) number"
                    )
                )

    async def timed(
        self, call: Callable[[], Awaitable[object]], *, filled: int = 0, calls: int = 1
    ) -> float:
        await self.fill(filled)
        await self.session.execute(text("SELECT 1"))
        seconds = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            await call()
            seconds += time.perf_counter() - start
            if calls > 1:
                await self.session.execute(text(f"DELETE FROM {link.name}"))
        await self.session.rollback()
        return seconds / calls

    async def timed_raw(self, sql: str, parameters: tuple[Any, ...], *, filled: int = 0) -> float:
        await self.fill(filled)
        transaction = self.raw.transaction()
        await transaction.start()
        await self.raw.fetchval("SELECT 1")
        start = time.perf_counter()
        await self.raw.fetch(sql, *parameters)
        seconds = time.perf_counter() - start
        await transaction.rollback()
        return seconds

    async def statement_of(
        self, call: Callable[[], Awaitable[object]], filled: int
    ) -> tuple[str, tuple[Any, ...]]:
        """The last statement that `call` sends, and its parameters."""
        await self.fill(filled)
        seen: list[tuple[str, tuple[Any, ...]]] = []

        def before(_: Any, __: Any, sql: str, parameters: Any, *___: Any) -> None:
            seen.append((sql, parameters))

        event.listen(self.engine.sync_engine, "before_cursor_execute", before)
        try:
            await call()
        finally:
            event.remove(self.engine.sync_engine, "before_cursor_execute", before)
            await self.session.rollback()
        return seen[-1]


def compare(
    results: dict[str, list[float]], ours: str, theirs: str, what: str, bound: Any, limit: float
) -> None:
    one, other = results[ours], results[theirs]
    spread = Spread.of_ratios(one, other) if bound == "at most" else Spread.of_ratios(other, one)
    target: tuple[Literal["at most", "at least"], float] = (bound, limit)
    tell(what, spread, target)


async def add_one(bench: Bench, rounds: int) -> None:
    headline("add of 1 row / one plain insert")
    tag, statement = bench.tags[0], insert(link)
    results = await alternate(
        {
            "ours": lambda: bench.timed(
                lambda: m2m_add(bench.session, bench.post, Post.tags, tag), calls=CALLS
            ),
            "core": lambda: bench.timed(
                lambda: bench.session.execute(statement, {"post": 1, "tag": 1}), calls=CALLS
            ),
            "control": lambda: bench.timed(
                lambda: bench.session.execute(statement, {"post": 1, "tag": 1}), calls=CALLS
            ),
        },
        rounds=rounds * 2,
    )
    compare(results, "ours", "core", "m2m_add / insert", "at most", 1.3)
    tell("insert / insert, control", Spread.of_ratios(results["control"], results["core"]))
    print(f"    a plain insert takes {Spread.of(results['core']).median * 1e6:.0f} us")


async def many(bench: Bench, rounds: int, *, replace: bool) -> None:
    """10,000 rows, added, or set where 9,900 of them are there already and 100 others go."""
    first = MANY // 100 + 1 if replace else 1
    tags, keys, filled = (
        bench.tags[first - 1 : first - 1 + MANY],
        range(first, first + MANY),
        MANY if replace else 0,
    )
    function: Any = m2m_set if replace else m2m_add
    session, post = bench.session, bench.post

    def by_key() -> Awaitable[object]:
        return function(session, post, Post.tags, pks=keys)

    headline(f"{'set of 10,000, 1 % changed' if replace else 'add of 10,000'}")
    sql, parameters = await bench.statement_of(by_key, filled)
    contestants: dict[str, Callable[[], Awaitable[float]]] = {
        "by key": lambda: bench.timed(by_key, filled=filled),
        "instances": lambda: bench.timed(
            lambda: function(session, post, Post.tags, *tags), filled=filled
        ),
        "raw": lambda: bench.timed_raw(sql, parameters, filled=filled),
        "control": lambda: bench.timed_raw(sql, parameters, filled=filled),
    }
    if bench.peer is not None:
        theirs = bench.peer.m2m_set if replace else bench.peer.m2m_add
        contestants["peer"] = lambda: bench.timed(
            lambda: theirs(session, post, Post.tags, *tags), filled=filled
        )
    results = await alternate(contestants, rounds=rounds)
    limit = 1.25 if replace else 1.10
    for ours in ("by key", "instances"):
        compare(
            results, ours, "raw", f"{ours} / the same statement through asyncpg", "at most", limit
        )
    tell("asyncpg / asyncpg, control", Spread.of_ratios(results["control"], results["raw"]))
    if bench.peer is not None:
        compare(
            results,
            "instances",
            "peer",
            "times faster than fastapi-toolsets",
            "at least",
            30 if replace else 5,
        )
    print(
        f"    the statement through asyncpg takes {Spread.of(results['raw']).median * 1e3:.1f} ms"
    )


async def sizes(bench: Bench, rounds: int) -> None:
    headline("add of 1,000, 10,000 and 100,000")

    def of_size(size: int) -> Callable[[], Awaitable[float]]:
        tags = bench.tags[:size]

        async def per_row() -> float:
            return (
                await bench.timed(lambda: m2m_add(bench.session, bench.post, Post.tags, *tags))
                / size
            )

        return per_row

    results = await alternate(
        {str(size): of_size(size) for size in (1_000, MANY, MOST)}, rounds=max(rounds // 4, 3)
    )
    for size in ("10000", "100000"):
        tell(f"time per row at {size} / at 1,000", Spread.of_ratios(results[size], results["1000"]))
    print(f"    a row takes {Spread.of(results['100000']).median * 1e6:.2f} us of 100,000")
    if bench.peer is not None:
        try:
            await bench.peer.m2m_add(bench.session, bench.post, Post.tags, *bench.tags)
        except Exception as error:
            reason = str(error.__cause__ or error).splitlines()[0][:100]
            print(f"    fastapi-toolsets at 100,000 fails: {type(error).__name__}: {reason}")
        else:
            print("    fastapi-toolsets at 100,000 works")
        await bench.session.rollback()


def load_peer() -> Any:
    folder = _peers.install(f"fastapi-toolsets=={_peers.FASTAPI_TOOLSETS[-1]}")
    if folder is None:
        return None
    sys.path.append(str(folder))
    try:
        return importlib.import_module("fastapi_toolsets.db.m2m")
    except ImportError as error:
        print(f"fastapi-toolsets: left out, because it cannot be imported: {error}")
        return None


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg")
    peer = load_peer()
    with database_url() as url:
        engine = create_async_engine(url)
        raw = await asyncpg.connect("postgresql://" + url.partition("://")[2])
        try:
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
                await connection.run_sync(Base.metadata.create_all)
                await connection.execute(text(f"INSERT INTO {Post.__tablename__} VALUES (1)"))
                series = f"SELECT generate_series(1, {MOST})"
                await connection.execute(text(f"INSERT INTO {Tag.__tablename__} {series}"))
            async with engine.connect() as connection:
                connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
                await connection.execute(text("ANALYZE"))
            async with AsyncSession(engine, expire_on_commit=False) as session:
                bench = Bench(engine, session, raw, peer)
                await add_one(bench, rounds)
                await many(bench, rounds, replace=False)
                await many(bench, rounds, replace=True)
                await sizes(bench, rounds)
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
        finally:
            await raw.close()
            await engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.m2m", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
