"""Random programs on the doubles and on PostgreSQL: what the doubles do claim, they do alike.

Transactions with callbacks, errors and associations; locks of several sessions; changes of rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, ForeignKey, Table, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

import pgtoolset
from pgtoolset import (
    LockMode,
    LockTimeoutError,
    PgToolsetError,
    RowLockMode,
    RowWatcher,
    TransactionAbortedError,
    get_transaction,
    on_commit,
)
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.testing import MemoryAssociations, MemoryDatabase, MemoryLocks, MemoryWatcher
from tests.support import examples

SIZE = 4
DEPTH = 3


class Base(DeclarativeBase):
    pass


left_right = Table(
    "doubles_left_right",
    Base.metadata,
    Column("left", ForeignKey("doubles_left.id"), primary_key=True),
    Column("right", ForeignKey("doubles_right.id"), primary_key=True),
)


class Left(Base):
    __tablename__ = "doubles_left"

    id: Mapped[int] = mapped_column(primary_key=True)
    rights: Mapped[list[Right]] = relationship(secondary=left_right, back_populates="lefts")


class Right(Base):
    __tablename__ = "doubles_right"

    id: Mapped[int] = mapped_column(primary_key=True)
    lefts: Mapped[list[Left]] = relationship(secondary=left_right, back_populates="rights")


class Row(Base):
    __tablename__ = "doubles_row"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


@pytest.fixture(scope="module")
def shared_engine(runner: asyncio.Runner, database_url: str) -> Iterator[AsyncEngine]:
    """One engine on one event loop for all examples."""
    engine = create_async_engine(database_url, pool_size=5, max_overflow=0)

    async def create() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            for number in range(SIZE):
                for class_ in (Left, Right, Row):
                    await connection.execute(class_.__table__.insert().values(id=number))

    async def drop() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)

    runner.run(create())
    yield engine
    runner.run(drop())
    runner.run(engine.dispose())


# Transactions: blocks, savepoints, errors, callbacks, associations


class Failure(Exception):
    """Raised by a program, and by nothing of the library."""


@dataclass(frozen=True)
class Step:
    """One action; `swallowed`: an error is caught, and the program goes on."""

    what: str
    owner: int = 0
    related: tuple[int, ...] = ()
    flag: bool = False
    swallowed: bool = False


@dataclass(frozen=True)
class Block:
    """A nested level; `caught`: an error that leaves it is caught around it."""

    steps: tuple[Any, ...] = ()
    caught: bool = True


numbers = st.integers(0, SIZE - 1)
ACTIONS = ["add", "add", "remove", "set", "set", "add many", "reverse", "statement", "callback"]
ENDS = ["error", "error", "raise", "commit", "rollback"]
steps = st.builds(
    Step,
    what=st.sampled_from([*ACTIONS, *ENDS]),
    owner=numbers,
    related=st.lists(numbers, max_size=3).map(tuple),
    flag=st.booleans(),
    swallowed=st.booleans(),
)


def blocks(depth: int) -> st.SearchStrategy[Block]:
    inner = steps if depth == 0 else st.one_of(steps, steps, steps, blocks(depth - 1))
    return st.builds(Block, steps=st.lists(inner, max_size=5).map(tuple), caught=st.booleans())


#: What a program may raise and catch.
ERRORS = (Failure, DBAPIError, PgToolsetError, InvalidRequestError)


def described(error: BaseException) -> tuple[str, str | None]:
    """An error by its class and its SQLSTATE.

    That a transaction is aborted is an error of the statement or of the block that finds it.
    """
    if isinstance(error, TransactionAbortedError) or sqlstate_of(error) in ("25P02", "3B001"):
        return "aborted", None
    names = [class_.__name__ for class_ in type(error).__mro__]
    known = ("IntegrityError", "DBAPIError", "InvalidRequestError")
    return next((name for name in known if name in names), names[0]), sqlstate_of(error)


class Run:
    """A program on one implementation, and a trace of what came of it."""

    def __init__(self, session: Any, associations: Any) -> None:
        self.session = session
        self.associations = associations
        self.trace: list[Any] = []

    async def fail(self) -> None:
        await self.session.execute(text("SELECT 1 / 0"))

    async def run(self, program: Block) -> list[Any]:
        try:
            async with get_transaction(self.session):
                await self._block(program)
            self.trace.append("committed")
        except ERRORS as error:
            self.trace.append(("rolled back", *described(error)))
        self.trace.append(self.session.in_transaction())
        return self.trace

    async def _block(self, block: Block) -> None:
        for step in block.steps:
            if isinstance(step, Block):
                try:
                    async with get_transaction(self.session):
                        await self._block(step)
                    self.trace.append("released")
                except ERRORS as error:
                    self.trace.append(("undone", *described(error)))
                    if not step.caught:
                        raise
                continue
            try:
                self.trace.append((step.what, await self._step(step)))
            except ERRORS as error:
                self.trace.append((step.what, *described(error)))
                if not step.swallowed:
                    raise
            self.trace.append(self.session.in_transaction())

    async def _step(self, step: Step) -> Any:
        session, m2m = self.session, self.associations
        left, keys = self.owners[step.owner], list(step.related)
        match step.what:
            case "add":
                skips = step.flag
                return await m2m.m2m_add(
                    session, left, Left.rights, pks=keys, ignore_conflicts=skips
                )
            case "remove":
                return await m2m.m2m_remove(session, left, Left.rights, pks=keys)
            case "set":
                return await m2m.m2m_set(
                    session, left, Left.rights, pks=keys, keep_existing=step.flag
                )
            case "add many":
                links = [(step.owner if step.flag else left, number) for number in keys]
                return await m2m.m2m_add_many(
                    session, Left.rights, [*links, *links[:1]], ignore_conflicts=step.flag
                )
            case "reverse":  # the same associations, from the other end
                right = self.related[step.owner]
                return await m2m.m2m_set(session, right, Right.lefts, pks=keys)
            case "statement":
                await session.execute(text("SELECT 1"))
            case "callback":
                on_commit(session, lambda: self.trace.append(("ran", step.owner)))
            case "error":
                await self.fail()
            case "raise":
                raise Failure
            case how:
                await getattr(session, how)()
        return None

    owners: list[Any]
    related: list[Any]


class DoubleRun(Run):
    def __init__(self, database: MemoryDatabase) -> None:
        super().__init__(database.session(), MemoryAssociations())
        self.database = database
        self.owners = [Left(id=number) for number in range(SIZE)]
        self.related = [Right(id=number) for number in range(SIZE)]

    async def fail(self) -> None:
        self.database.fail_next("STATEMENT", "22012")
        await super().fail()


async def transactions_on_double(program: Block) -> tuple[list[Any], list[Any]]:
    database = MemoryDatabase()
    trace = await DoubleRun(database).run(program)
    return trace, database.associations(Left.rights)


async def transactions_on_postgresql(
    engine: AsyncEngine, program: Block
) -> tuple[list[Any], list[Any]]:
    async with engine.begin() as connection:
        await connection.execute(left_right.delete())
    async with AsyncSession(engine, expire_on_commit=False) as session:
        run = Run(session, pgtoolset)
        run.owners = [await session.get_one(Left, number) for number in range(SIZE)]
        run.related = [await session.get_one(Right, number) for number in range(SIZE)]
        await session.commit()
        trace = await run.run(program)
        await session.rollback()
        rows = await session.execute(select(left_right).order_by(*left_right.c))
        return trace, [tuple(row) for row in rows]


@settings(
    max_examples=examples(50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(program=blocks(DEPTH))
def test_transactions(runner: asyncio.Runner, shared_engine: AsyncEngine, program: Block) -> None:
    """Results, errors, callbacks, and what is stored in the end: the same for every program."""
    double = runner.run(transactions_on_double(program))
    assert double == runner.run(transactions_on_postgresql(shared_engine, program))


# Locks: three sessions that lock without waiting


@dataclass(frozen=True)
class Lock:
    """One action of one of the sessions."""

    session: int
    what: str
    mode: int = 0
    keys: tuple[int, ...] = ()
    flag: bool = False


#: Of three tables the second is locked by rows, which takes ROW SHARE on it.
TABLES = [Left, Row, Right]
locks = st.lists(
    st.builds(
        Lock,
        session=st.integers(0, 2),
        what=st.sampled_from(
            ["tables", "tables", "rows", "rows", "advisory", "savepoint", "undo", "end"]
        ),
        mode=st.integers(0, 7),
        keys=st.lists(st.integers(0, SIZE), max_size=3).map(tuple),
        flag=st.booleans(),
    ),
    max_size=12,
)


class LockRun:
    """Locks without waiting, in blocks that stay open; what was locked, and what was in the way."""

    def __init__(self, sessions: list[Any], implementation: Any) -> None:
        self._sessions = sessions
        self._locks = implementation
        self._stacks: list[list[AsyncExitStack]] = [[] for _ in sessions]

    async def run(self, program: list[Lock]) -> list[Any]:
        trace = []
        for step in program:
            try:
                trace.append(await self._step(step))
            except LockTimeoutError as error:
                trace.append((sorted(error.tables), error.mode, error.timeout))
        for number in range(len(self._sessions)):
            await self._end(number, undone=True)
        return trace

    async def _open(self, number: int) -> AsyncExitStack:
        stack = AsyncExitStack()
        await stack.enter_async_context(get_transaction(self._sessions[number]))
        self._stacks[number].append(stack)
        return stack

    async def _end(self, number: int, *, undone: bool) -> None:
        while self._stacks[number]:
            await self._leave(number, undone=undone)

    async def _leave(self, number: int, *, undone: bool) -> None:
        stack = self._stacks[number].pop()
        if not undone:
            await stack.aclose()
            return
        error = Failure()
        with pytest.raises(Failure):
            await stack.__aexit__(Failure, error, None)
            raise error

    async def _step(self, step: Lock) -> Any:
        number, session = step.session, self._sessions[step.session]
        match step.what:
            case "end":
                return await self._end(number, undone=step.flag)
            case "undo":
                if self._stacks[number]:
                    await self._leave(number, undone=True)
                return None
            case "savepoint":
                await self._open(number)
                return None
        if not self._stacks[number]:
            await self._open(number)
        match step.what:
            case "tables":
                tables = [TABLES[key % 3] for key in step.keys] or [Row]
                mode = list(LockMode)[step.mode]
                async with self._locks.lock_tables(session, tables, mode=mode, nowait=True):
                    return "locked"
            case "rows":
                mode = list(RowLockMode)[step.mode % 4]
                # What is left out by skip_locked is asked for alone: PostgreSQL may lock a row
                # before it finds the next one locked.
                keys = step.keys[:1] if step.flag else step.keys
                how = {"skip_locked": True} if step.flag else {"nowait": True}
                rows = await self._locks.lock_rows(session, Row, keys, mode=mode, **how)
                return [row.id for row in rows]
            case _:
                block = self._locks.advisory_lock(
                    session, step.mode % 2, shared=step.flag, nowait=True
                )
                async with block as taken:
                    return taken


async def locks_on_double(program: list[Lock]) -> list[Any]:
    database = MemoryDatabase()
    for number in range(SIZE):
        database.put(Row, number, {"value": 0})
    return await LockRun([database.session() for _ in range(3)], MemoryLocks()).run(program)


async def locks_on_postgresql(engine: AsyncEngine, program: list[Lock]) -> list[Any]:
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(AsyncSession(engine)) for _ in range(3)]
        return await LockRun(sessions, pgtoolset).run(program)


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(program=locks)
def test_locks(runner: asyncio.Runner, shared_engine: AsyncEngine, program: list[Lock]) -> None:
    """The same locks are acquired and refused, and end with the same levels."""
    double = runner.run(locks_on_double(program))
    assert double == runner.run(locks_on_postgresql(shared_engine, program))


# Watching: changes of one row, committed or not

KEY = 99
changes = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "remove"]), st.integers(0, 2), st.sampled_from([True, False])
    ),
    max_size=8,
)


async def watched(watcher: Any, change: Any, program: list[Any]) -> list[Any]:
    """The changes of a row: after each commit that changes it, the next one is awaited."""
    trace: list[Any] = []
    current: int | None = None
    async with watcher, watcher.changes(Row, KEY, columns=["value"]) as stream:
        trace.append(stream.current)
        for what, value, commits in program:
            await change(what, value, commits)
            after = value if what == "put" else None
            if commits and after != current:
                current = after
                found = await asyncio.wait_for(anext(stream), 10)
                trace.append((found.kind, found.pk, _plain(found.before), _plain(found.after)))
    return trace


def _plain(values: Any) -> dict[str, Any] | None:
    return None if values is None else dict(values)


async def changes_on_double(program: list[Any]) -> list[Any]:
    database = MemoryDatabase()

    async def change(what: str, value: int, commits: bool) -> None:
        session = database.session()
        if what == "put":
            await session.put(Row, KEY, {"value": value})
        else:
            await session.remove(Row, KEY)
        await (session.commit() if commits else session.rollback())

    return await watched(MemoryWatcher(database), change, program)


async def changes_on_postgresql(engine: AsyncEngine, program: list[Any]) -> list[Any]:
    maker = async_sessionmaker(engine)

    async def change(what: str, value: int, commits: bool) -> None:
        async with maker() as session:
            row = await session.get(Row, KEY)
            if what == "remove":
                if row is not None:
                    await session.delete(row)
            elif row is None:
                session.add(Row(id=KEY, value=value))
            else:
                row.value = value
            await session.flush()
            await (session.commit() if commits else session.rollback())

    try:
        return await watched(RowWatcher(engine, interval=0.01), change, program)
    finally:
        await change("remove", 0, True)


@pytest.mark.asyncpg(reason="RowWatcher")
@settings(
    max_examples=examples(12),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(program=changes)
def test_changes(runner: asyncio.Runner, shared_engine: AsyncEngine, program: list[Any]) -> None:
    """The same changes are seen, and what is rolled back is never seen."""
    double = runner.run(changes_on_double(program))
    assert double == runner.run(changes_on_postgresql(shared_engine, program))
