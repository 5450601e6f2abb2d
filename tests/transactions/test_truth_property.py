"""Random trees of units, blocks, commits, swallowed errors and callbacks, on a network that ends at
any chunk: what was reported is what is stored.

Success: stored. `CommitUnknownError`: either, as a whole. Any other error: not stored. Callbacks
have run exactly for what was reported as stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    CommitUnknownError,
    PgToolsetError,
    TransactionAbortedError,
    create_db_context,
    get_transaction,
    on_commit,
    run_transaction,
)
from tests.proxy import Direction, How, Proxy
from tests.support import Base, Item, examples, plain_url, sqlalchemy_url

#: SQLAlchemy's own, after a savepoint of its `begin_nested()` has lost its connection.
pytestmark = pytest.mark.filterwarnings("ignore:nested transaction already deassociated")


class Failure(Exception):
    """Raised by a program, and by nothing else."""


@dataclass(frozen=True)
class Write:
    """Insert a row, and register a callback with its id."""

    by_flush: bool = False


@dataclass(frozen=True)
class Raise:
    """Raise Failure."""


@dataclass(frozen=True)
class BadStatement:
    """Run a statement that PostgreSQL refuses."""

    is_swallowed: bool


@dataclass(frozen=True)
class Commit:
    """Commit; a failure is swallowed where it stands, with a rollback or without, or not."""

    is_swallowed: bool
    then_rolls_back: bool = False


@dataclass(frozen=True)
class Rollback:
    """Roll back."""


@dataclass(frozen=True)
class Block:
    """A nested level; `is_caught`: any error that leaves it is caught just outside."""

    steps: tuple[Step, ...] = ()
    is_caught: bool = True
    is_plain: bool = False


Step: TypeAlias = "Write | Raise | BadStatement | Commit | Rollback | Block"

STEPS: st.SearchStrategy[Step] = st.recursive(
    st.one_of(
        st.builds(Write, by_flush=st.booleans()),
        st.just(Write()),
        st.builds(Commit, is_swallowed=st.booleans(), then_rolls_back=st.booleans()),
        st.just(Rollback()),
        st.builds(BadStatement, is_swallowed=st.booleans()),
        st.just(Raise()),
    ),
    lambda inner: st.builds(
        Block,
        steps=st.lists(inner, max_size=4).map(tuple),
        is_caught=st.booleans(),
        is_plain=st.booleans(),
    ),
    max_leaves=10,
)

#: A program with every kind of step, for the cut at every chunk.
RICH = Block(
    (
        Write(),
        Block((Write(), BadStatement(is_swallowed=False))),
        Write(by_flush=True),
        Commit(is_swallowed=True),
        Write(),
        Block((Write(), Block((Write(),), is_plain=True))),
        Commit(is_swallowed=True, then_rolls_back=True),
        Write(),
    )
)

#: The ids of rows are never used twice: a COMMIT whose answer is lost may still be under way.
IDS = count(1)


class Ledger:
    """What a program was told, as it runs."""

    def __init__(self) -> None:
        #: The rows of the open transaction, as far as they are not undone.
        self.open: list[int] = []
        self.stored: list[int] = []
        #: Each is stored as a whole or not at all.
        self.unknown: list[list[int]] = []
        self.ran: list[int] = []
        self.generation = 0

    def end(self, error: BaseException | None) -> None:
        """Note the end of the open transaction."""
        if error is None:
            self.stored += self.open
        elif isinstance(error, CommitUnknownError):
            self.unknown.append(self.open)
        self.open = []
        self.generation += 1


class Program:
    """Runs a tree in a session, and keeps the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def attempt(self, session: AsyncSession, block: Block) -> None:
        """Run a program of `run_transaction`, which may have rolled an earlier attempt back."""
        self.ledger.end(Failure())
        await self.run(session, block)

    async def run(self, session: AsyncSession, block: Block) -> None:
        for step in block.steps:
            match step:
                case Write(by_flush):
                    await self.write(session, by_flush)
                case Raise():
                    raise Failure
                case BadStatement(is_swallowed):
                    try:
                        await session.execute(text("SELECT 1 / 0"))
                    except Exception:
                        if not is_swallowed:
                            raise
                case Commit():
                    await self.commit(session, step)
                case Rollback():
                    try:
                        await session.rollback()
                    finally:  # one that fails has cost the connection, and all levels with it
                        self.ledger.open = []
                        self.ledger.generation += 1
                case Block():
                    await self.nested(session, step)

    async def write(self, session: AsyncSession, by_flush: bool) -> None:
        id_ = next(IDS)
        if by_flush:
            session.add(Item(id=id_))
            try:
                await session.flush()
            finally:
                session.expunge_all()
        else:
            await session.execute(text("INSERT INTO item (id, name) VALUES (:id, '')"), {"id": id_})
        on_commit(session, lambda: self.ledger.ran.append(id_))
        self.ledger.open.append(id_)

    async def commit(self, session: AsyncSession, step: Commit) -> None:
        try:
            await session.commit()
        except Exception as error:
            # After a commit in doubt nothing more is committed.
            self.ledger.end(Failure() if self.ledger.unknown else error)
            if step.then_rolls_back:
                await session.rollback()
            if not step.is_swallowed:
                raise
        else:
            self.ledger.end(None)

    async def nested(self, session: AsyncSession, block: Block) -> None:
        # After a commit() the session is in no transaction, and a block of ours begins one.
        is_outermost = not block.is_plain and not session.in_transaction()
        rows, generation = list(self.ledger.open), self.ledger.generation
        try:
            async with session.begin_nested() if block.is_plain else get_transaction(session):
                await self.run(session, block)
        except Exception as error:
            if is_outermost:
                self.ledger.end(self.of_the_end(error))
            elif self.ledger.generation == generation:
                self.ledger.open = rows
            if not block.is_caught:
                raise
        else:
            if is_outermost:
                self.ledger.end(None)

    def of_the_end(self, error: Exception) -> Exception:
        """Return the error for the rows that were open at the end of a transaction: they are in
        doubt only where the first COMMIT in doubt is that of the end."""
        is_end = isinstance(error, CommitUnknownError) and error.phase == "end"
        return error if is_end and not self.ledger.unknown else Failure()


async def run(kind: str, maker: async_sessionmaker[AsyncSession], block: Block) -> Ledger:
    """Run a program as one unit of a kind."""
    ledger = Ledger()
    program = Program(ledger)
    try:
        if kind == "context":
            async with create_db_context(maker)() as session:
                await program.run(session, block)
        elif kind == "block":
            async with maker() as session, get_transaction(session):
                await program.run(session, block)
        else:
            await run_transaction(maker, lambda session: program.attempt(session, block))
    except Exception as error:
        ledger.end(program.of_the_end(error))
        assert isinstance(error, (PgToolsetError, SQLAlchemyError, Failure))
        if ledger.unknown:
            assert not isinstance(error, TransactionAbortedError)
            assert isinstance(error, CommitUnknownError) or kind != "run_transaction"
    else:
        assert not ledger.unknown, "success was reported in spite of a doubt"
        ledger.end(None)
    return ledger


class Lab:
    """An engine behind a proxy, and a connection that sees what is stored."""

    def __init__(self, proxy: Proxy, engine: AsyncEngine, other: asyncpg.Connection) -> None:
        self.proxy = proxy
        self.engine = engine
        self.other = other
        self.maker = async_sessionmaker(engine, expire_on_commit=False)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Lab]:
        other = await asyncpg.connect(plain_url(url))
        async with Proxy.to(url) as proxy:
            engine = create_async_engine(sqlalchemy_url(proxy.url), pool_size=1, max_overflow=0)
            yield cls(proxy, engine, other)
            await engine.dispose()
        tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
        await other.execute(f"TRUNCATE {tables}")
        await other.close()

    async def check(
        self, kind: str, block: Block, cut: tuple[Direction, int, How] | None
    ) -> dict[Direction, int]:
        """Run a program with a cut, and compare; return the number of chunks of each direction."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))  # the pool has a connection that works
        before = dict(self.proxy.counts)
        if cut is not None:
            self.proxy.cut_at_chunk(*cut)
        ledger = await run(kind, self.maker, block)
        self.proxy.cut = None
        assert self.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        rows = await self.other.fetch("SELECT id FROM item")
        stored = {row["id"] for row in rows}
        await self.other.execute("DELETE FROM item")
        expected = set(ledger.stored)
        for either in ledger.unknown:
            if stored & set(either):
                expected |= set(either)
        assert stored == expected
        assert ledger.ran == ledger.stored
        return {each: self.proxy.counts[each] - before[each] for each in before}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def lab(runner: asyncio.Runner, database_url: str) -> Iterator[Lab]:
    opened = Lab.open(database_url)
    lab = runner.run(opened.__aenter__())
    yield lab
    runner.run(opened.__aexit__(None, None, None))


KINDS = ["context", "block", "run_transaction"]
DIRECTIONS: list[Direction] = ["to server", "to client"]
HOWS: list[How] = ["RST", "FIN", "half"]


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(KINDS),
    program=st.builds(Block, steps=st.lists(STEPS, min_size=1, max_size=6).map(tuple)),
    direction=st.sampled_from(DIRECTIONS),
    chunk=st.integers(1, 30),
    how=st.sampled_from(HOWS),
)
@example("context", Block((Write(), Commit(True))), "to client", 4, "RST")
@example("context", Block((Write(), Commit(True, True), Write())), "to client", 4, "RST")
def test_random_trees(
    runner: asyncio.Runner,
    lab: Lab,
    kind: str,
    program: Block,
    direction: Direction,
    chunk: int,
    how: How,
) -> None:
    """A random tree, cut at a random chunk: success is stored, an error is not, a doubt is either,
    and callbacks have run exactly for success."""
    runner.run(lab.check(kind, program, (direction, chunk, how)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk(runner: asyncio.Runner, lab: Lab, kind: str) -> None:
    """A tree with every kind of step, cut at each chunk in either direction, in each way."""

    async def run() -> None:
        chunks = await lab.check(kind, RICH, None)
        for direction in DIRECTIONS:
            assert chunks[direction] > 10
            for number in range(1, chunks[direction] + 1):
                for how in HOWS:
                    await lab.check(kind, RICH, (direction, number, how))

    runner.run(run())
