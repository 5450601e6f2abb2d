"""Many-to-many writes beside plain SQLAlchemy, raw asyncpg and fastapi-toolsets. Run as `python -m
benchmarks.m2m`.

Measured is the time of one call on a warm connection inside an open transaction, which is then
rolled back. Raw asyncpg sends the very statement that pgtoolset sends, with the keys at hand. A set
is two statements, the lock of the owner and the difference; raw asyncpg sends the difference alone.
fastapi-toolsets puts four parameters for each pair into one statement, of which PostgreSQL's
protocol allows 32,767.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import Column, ForeignKey, Table, event, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from benchmarks._declared import Benchmark, Curve, Experiment, Measure, at, at_least, at_most
from benchmarks._harness import Figures, Turn, backend_of, clocked, engines, plain, tables
from benchmarks._peers import LABELS, TOOLSETS
from benchmarks._run import alone
from benchmarks._worker import workers
from pgtoolset import m2m_add, m2m_set

MOST = 100_000
MANY = 10_000
SIZES = (1, 10, 100, 1_000, MANY, MOST)
#: Calls of a turn where one takes less than a millisecond. A longer turn meets more of what
#: disturbs it than the other turns of its round.
CALLS = 8


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
    """A post, many tags, and what is done to them over one session."""

    def __init__(self, engine: AsyncEngine, session: AsyncSession) -> None:
        self.engine = engine
        self.session = session
        self.backend = 0
        self.tags: list[Tag] = []
        self.post = known(Post(id=1))

    async def timed(
        self, call: Callable[[], Awaitable[object]], *, filled: int = 0, calls: int = 1
    ) -> Figures:
        """The time of a call, in a transaction that is rolled back."""
        await fill(self.engine, filled)
        try:
            self.backend = self.backend or await backend_of(self.session)
            await self.session.execute(text("SELECT 1"))
            times: list[Figures] = []
            for _ in range(calls):
                with clocked(1, self.backend) as figures:
                    await call()
                times.append(figures)
                if calls > 1:
                    await self.session.execute(text(f"DELETE FROM {link.name}"))
        finally:
            await self.session.rollback()
        return {key: sum(each[key] for each in times) / calls for key in times[0]}

    async def timed_raw(
        self, raw: asyncpg.Connection, sql: str, parameters: tuple[Any, ...], *, filled: int = 0
    ) -> Figures:
        """The time of a statement through asyncpg alone."""
        await fill(self.engine, filled)
        transaction = raw.transaction()
        await transaction.start()
        await raw.fetchval("SELECT 1")
        with clocked(1, raw.get_server_pid()) as figures:
            await raw.fetch(sql, *parameters)
        await transaction.rollback()
        return figures

    async def statement_of(
        self, call: Callable[[], Awaitable[object]], filled: int
    ) -> tuple[str, tuple[Any, ...]]:
        """The last statement that `call` sends, and its parameters."""
        await fill(self.engine, filled)
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

    def related(self, size: int, *, replace: bool) -> list[Tag]:
        """Tags to add, or to set where as many others are there and 1 % of them must go."""
        first = size // 100 if replace else 0
        start = len(self.tags) + 1
        self.tags += [known(Tag(id=number)) for number in range(start, first + size + 1)]
        return self.tags[first : first + size]

    def turn(self, function: Any, size: int, *, replace: bool) -> Turn:
        """A turn of a function that takes instances."""

        async def run() -> Figures:
            related = self.related(size, replace=replace)
            return await self.timed(
                lambda: function(self.session, self.post, Post.tags, *related),
                filled=size if replace else 0,
            )

        return run


def known(instance: Any) -> Any:
    """An instance of which the key is known and nothing else is: loading it is not measured."""
    state = instance._sa_instance_state
    state.key = state.mapper.identity_key_from_instance(instance)
    return instance


async def fill(engine: AsyncEngine, size: int) -> None:
    """Have the post associated with that many tags."""
    series = f"SELECT 1, number FROM generate_series(1, {size}) number"
    async with engine.begin() as connection:
        await connection.execute(text(f"TRUNCATE {link.name}"))
        if size:
            # The keys are right, and to check each takes longer than all that is measured.
            await connection.execute(text("SET LOCAL session_replication_role = replica"))
            await connection.execute(text(f"INSERT INTO {link.name} {series}"))


@asynccontextmanager
async def bench(url: str) -> AsyncIterator[Bench]:
    """A bench on tables that are there."""
    async with (
        engines(url, 1) as (engine,),
        AsyncSession(engine, expire_on_commit=False) as session,
    ):
        yield Bench(engine, session)


@asynccontextmanager
async def filled_tables(url: str) -> AsyncIterator[None]:
    """The tables, with one post and all tags."""
    async with engines(url, 1) as (engine,), tables(engine, Base.metadata):
        async with engine.begin() as connection:
            await connection.execute(text(f"INSERT INTO {Post.__tablename__} VALUES (1)"))
            series = f"SELECT generate_series(1, {MOST + MOST // 100 + 1})"
            await connection.execute(text(f"INSERT INTO {Tag.__tablename__} {series}"))
        async with engine.connect() as connection:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("ANALYZE"))
        yield


@asynccontextmanager
async def peer(url: str) -> AsyncIterator[dict[str, Callable[..., Awaitable[Figures]]]]:
    """fastapi-toolsets, whose functions have the same arguments as ours."""
    try:
        m2m = importlib.import_module("fastapi_toolsets.db.m2m")
    except ModuleNotFoundError:  # version 3
        m2m = importlib.import_module("fastapi_toolsets.db")
    async with bench(url) as own:

        async def add(size: int) -> Figures:
            return await own.turn(m2m.m2m_add, size, replace=False)()

        async def replace(size: int) -> Figures:
            return await own.turn(m2m.m2m_set, size, replace=True)()

        yield {"add": add, "set": replace}


@asynccontextmanager
async def one(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    async with filled_tables(url), bench(url) as own:
        tag, statement, values = (
            own.related(1, replace=False)[0],
            insert(link),
            {"post": 1, "tag": 1},
        )

        def core() -> Awaitable[object]:
            return own.session.execute(statement, values)

        yield {
            "ours": lambda: own.timed(
                lambda: m2m_add(own.session, own.post, Post.tags, tag), calls=CALLS
            ),
            "core": lambda: own.timed(core, calls=CALLS),
            "control": lambda: own.timed(core, calls=CALLS),
        }


def raw_turn(own: Bench, raw: asyncpg.Connection, size: int, replace: bool) -> Turn:
    """The statement of ours through asyncpg."""
    function: Any = m2m_set if replace else m2m_add
    filled = size if replace else 0
    seen: list[tuple[str, tuple[Any, ...]]] = []

    async def run() -> Figures:
        if not seen:
            keys = [tag.id for tag in own.related(size, replace=replace)]
            seen.append(
                await own.statement_of(
                    lambda: function(own.session, own.post, Post.tags, pks=keys), filled
                )
            )
        return await own.timed_raw(raw, *seen[0], filled=filled)

    return run


@asynccontextmanager
async def many(url: str, *, replace: bool) -> AsyncIterator[Mapping[str, Turn]]:
    """10,000 rows, added, or set where 9,900 of them are there already and 100 others go."""
    function: Any = m2m_set if replace else m2m_add
    async with filled_tables(url), bench(url) as own, AsyncExitStack() as stack:
        raw = await asyncpg.connect(plain(url))
        stack.push_async_callback(raw.close)
        keys = [tag.id for tag in own.related(MANY, replace=replace)]
        statement = raw_turn(own, raw, MANY, replace)
        yield {
            "by key": lambda: own.timed(
                lambda: function(own.session, own.post, Post.tags, pks=keys),
                filled=MANY if replace else 0,
            ),
            "instances": own.turn(function, MANY, replace=replace),
            "raw": statement,
            "control": statement,
        }


@asynccontextmanager
async def beside_peers(url: str, *, replace: bool) -> AsyncIterator[Mapping[str, Turn]]:
    """The same beside fastapi-toolsets: a round with it takes as long as many without."""
    function: Any = m2m_set if replace else m2m_add
    async with (
        filled_tables(url),
        bench(url) as own,
        workers(TOOLSETS, "benchmarks.m2m:peer", url) as peers,
    ):
        turns: dict[str, Turn] = {"instances": own.turn(function, MANY, replace=replace)}
        for name, worker in peers.items():
            turns[name] = worker.turn("set" if replace else "add", MANY)
        yield turns


@asynccontextmanager
async def sizes(url: str, *, replace: bool) -> AsyncIterator[Mapping[str, Turn]]:
    function: Any = m2m_set if replace else m2m_add
    async with filled_tables(url), bench(url) as own, AsyncExitStack() as stack:
        raw = await asyncpg.connect(plain(url))
        stack.push_async_callback(raw.close)
        peers = await stack.enter_async_context(workers(TOOLSETS, "benchmarks.m2m:peer", url))
        turns: dict[str, Turn] = {}
        for size in SIZES:
            turns[at("pgtoolset", size)] = own.turn(function, size, replace=replace)
            turns[at("raw", size)] = raw_turn(own, raw, size, replace)
            for name, worker in peers.items():
                turns[at(name, size)] = worker.turn("set" if replace else "add", size)
        yield turns


def of_many(word: str, function: str, limit: float) -> tuple[Measure, ...]:
    """The measures of 10,000 rows."""
    return (
        *(
            Measure(
                f"{word}-{how.replace(' ', '-')}",
                f"`{function}` of 10,000, {how}",
                how,
                "the same statement through raw asyncpg",
                "raw",
                target=at_most(limit),
            )
            for how in ("by key", "instances")
        ),
        Measure(f"{word}-control", "control: raw asyncpg", "control", "itself", "raw"),
    )


def of_peers(word: str, function: str, times: float) -> tuple[Measure, ...]:
    """The measures of fastapi-toolsets."""
    return tuple(
        Measure(
            f"{word}-{name.replace(' ', '-')}",
            f"{LABELS[name]}, {word} of 10,000",
            "instances",
            f"`{function}`, instances",
            name,
            inverse=True,
            target=at_least(times) if name == TOOLSETS[-1] else None,
        )
        for name in TOOLSETS
    )


def curve(word: str, function: str) -> Curve:
    """One call over sizes."""
    return Curve(
        f"m2m-{word}",
        f"{function}: one call",
        "rows",
        "ms",
        SIZES,
        {"pgtoolset": "pgtoolset", "raw": "raw asyncpg, the same statement"}
        | {name: LABELS[name] for name in TOOLSETS},
        scale=1000,
    )


OF_INSTANCES = (
    "Beside the statement of raw asyncpg, a set locks the owner's row: a second round trip through "
    "SQLAlchemy, a tenth of the time of the statement. With instances it also reads their keys, "
    "which takes nearly twice as long as that (see [compiled modules](#compiled-modules)), and is "
    "called with 10,000 arguments."
)

BENCHMARK = Benchmark(
    title="Many-to-many",
    about="One call on a warm connection inside an open transaction, which is then rolled back.",
    experiments=(
        Experiment(
            "Add of 1 row",
            one,
            (
                Measure(
                    "add-one",
                    "`m2m_add` of 1 row",
                    "ours",
                    "`session.execute(insert(table), {...})`",
                    "core",
                    target=at_most(1.3),
                ),
                Measure("add-one-control", "control: the insert", "control", "itself", "core"),
            ),
            seconds=10,
            rounds=1000,
        ),
        Experiment(
            "Add of 10,000 rows",
            partial(many, replace=False),
            of_many("add", "m2m_add", 1.10),
            seconds=20,
            note="PostgreSQL checks two foreign keys of each row, which is most of the time.",
        ),
        Experiment(
            "Add of 10,000 rows, beside fastapi-toolsets",
            partial(beside_peers, replace=False),
            of_peers("add", "m2m_add", 5),
            seconds=12,
        ),
        Experiment(
            "Set of 10,000 rows, 1 % changed",
            partial(many, replace=True),
            of_many("set", "m2m_set", 1.25),
            seconds=18,
            note=OF_INSTANCES,
        ),
        Experiment(
            "Set of 10,000 rows, 1 % changed, beside fastapi-toolsets",
            partial(beside_peers, replace=True),
            of_peers("set", "m2m_set", 30),
            seconds=12,
        ),
        Experiment(
            "Add of 1 to 100,000 rows",
            partial(sizes, replace=False),
            curves=(curve("add", "m2m_add"),),
            seconds=15,
            rounds=20,
            warm_up=1,
        ),
        Experiment(
            "Set of 1 to 100,000 rows, 1 % changed",
            partial(sizes, replace=True),
            curves=(curve("set", "m2m_set"),),
            seconds=18,
            rounds=20,
            warm_up=1,
            note="Below 100 rows nothing changes, and the set is one look.",
        ),
    ),
)

if __name__ == "__main__":
    alone("m2m")
