"""Random programs of transactions, savepoints, errors and Many-to-Many calls: the double and
PostgreSQL agree.

On what each call returns, on the class and SQLSTATE of each error, on how each block ends, on what
loaded collections show, and on what is stored in the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, ForeignKey, Table, inspect, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError

import pgtoolset
from pgtoolset import PgToolsetError, TransactionAbortedError, get_transaction, on_commit
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.testing import MemoryAssociations, MemoryDatabase, MemorySession
from tests.m2m import models
from tests.transactions.test_nesting_property import divide_by_zero

SIZE = 4
DEPTH = 4


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


@dataclass(frozen=True)
class Shape:
    owner: Any
    related: Any
    relationship: Any
    reverse: str
    #: The columns of the association table whose values do not depend on when and how often
    #: something was tried.
    columns: tuple[str, ...]
    values: dict[str, Any] | None = None

    @property
    def table(self) -> Any:
        return self.relationship.property.secondary


SHAPES = {
    "plain": Shape(Left, Right, Left.rights, "lefts", ("left", "right")),
    "self-referential": Shape(
        models.Person, models.Person, models.Person.follows, "followers", ("follower", "followed")
    ),
    "extra columns": Shape(
        models.Box,
        models.Thing,
        models.Box.things,
        "boxes",
        ("box", "thing", "note", "pair", "colour", "labels", "payload", "plain_key"),
        {"note": "given", "plain": "x"},
    ),
}


@dataclass(frozen=True)
class Step:
    """Something that is done; `swallowed`: an error is caught where it stands, and the program goes
    on."""

    what: str
    owner: int = 0
    related: tuple[int, ...] = ()
    flag: bool = False
    values: bool = False
    swallowed: bool = False


@dataclass(frozen=True)
class Block:
    """A nested level; `caught`: what leaves it is caught just outside."""

    steps: tuple[Any, ...] = ()
    caught: bool = True


class Failure(Exception):
    """Raised by a program, and by nothing else."""


numbers = st.integers(0, SIZE - 1)
actions = st.builds(
    Step,
    what=st.sampled_from(
        [
            "add",
            "add",
            "remove",
            "set",
            "set",
            "add many",
            "append",
            "load",
            "create",
            "delete",
            "error",
            "raise",
        ]
    ),
    owner=numbers,
    related=st.lists(numbers, max_size=3).map(tuple),
    flag=st.booleans(),
    values=st.booleans(),
    swallowed=st.booleans(),
)


def blocks(depth: int) -> st.SearchStrategy[Block]:
    inner = actions if depth == 0 else st.one_of(actions, actions, actions, blocks(depth - 1))
    return st.builds(Block, steps=st.lists(inner, max_size=4).map(tuple), caught=st.booleans())


#: What a program may raise and catch.
ERRORS = (Failure, DBAPIError, PgToolsetError, InvalidRequestError, StaleDataError, ValueError)


def told(error: BaseException) -> tuple[str, str | None]:
    """An error by its class, as far as it is one that code could catch, and its SQLSTATE.

    That a transaction is aborted is told in several ways, by whichever statement happens to find it
    out.
    """
    if isinstance(error, TransactionAbortedError) or sqlstate_of(error) in ("25P02", "3B001"):
        return "aborted", None
    names = [class_.__name__ for class_ in type(error).__mro__]
    known = ("IntegrityError", "DBAPIError", "StaleDataError", "InvalidRequestError", "ValueError")
    return next((name for name in known if name in names), names[0]), sqlstate_of(error)


class Run:
    """A program on one implementation, and a trace of what came of it."""

    def __init__(self, shape: Shape, session: AsyncSession, associations: Any) -> None:
        self.shape = shape
        self.session = session
        self.associations = associations
        self.trace: list[Any] = []

    async def prepare(self) -> None:
        keys = [
            inspect(class_).get_property_by_column(inspect(class_).primary_key[0]).key
            for class_ in self.classes
        ]
        self.owners = [self.shape.owner(**{keys[0]: number}) for number in range(SIZE)]
        self.related = self.owners
        if self.shape.related is not self.shape.owner:
            self.related = [self.shape.related(**{keys[1]: number}) for number in range(SIZE)]
        self.session.add_all([*self.owners, *self.related])
        await self.session.commit()
        self._new = lambda number: self.shape.owner(**{keys[0]: number})

    @property
    def classes(self) -> tuple[Any, Any]:
        return self.shape.owner, self.shape.related

    async def run(self, program: Block) -> list[Any]:
        await self.prepare()
        try:
            async with get_transaction(self.session):
                await self._block(program)
            self.trace.append("committed")
        except ERRORS as error:
            self.trace.append(("rolled back", *told(error)))
        return self.trace

    async def _block(self, block: Block) -> None:
        for step in block.steps:
            if isinstance(step, Block):
                try:
                    async with get_transaction(self.session):
                        await self._block(step)
                    self.trace.append("released")
                except ERRORS as error:
                    self.trace.append(("undone", *told(error)))
                    if not step.caught:
                        raise
                continue
            try:
                self.trace.append((step.what, await self._step(step)))
                self.trace.append(self._shown())
            except ERRORS as error:
                self.trace.append((step.what, *told(error)))
                if not step.swallowed:
                    raise

    async def _step(self, step: Step) -> Any:
        session, relationship = self.session, self.shape.relationship
        owner = self.owners[step.owner]
        related = [self.related[number] for number in step.related]
        # By key or by instance; a related that was deleted can only be named by its key.
        named = ((), list(step.related)) if step.flag else (related, [])
        values = self.shape.values if step.values else None
        match step.what:
            case "add":
                on_commit(session, lambda: self.trace.append(("ran", step.owner)))
                return await self.associations.m2m_add(
                    session,
                    owner,
                    relationship,
                    *named[0],
                    pks=named[1],
                    values=values,
                    ignore_conflicts=step.swallowed,
                )
            case "remove":
                return await self.associations.m2m_remove(
                    session, owner, relationship, *named[0], pks=named[1]
                )
            case "set":
                return await self.associations.m2m_set(
                    session,
                    owner,
                    relationship,
                    *named[0],
                    pks=named[1],
                    values=values,
                    keep_existing=step.values,
                )
            case "add many":
                links = [(step.owner if step.flag else owner, number) for number in step.related]
                return await self.associations.m2m_add_many(
                    session,
                    relationship,
                    [*links, *links[:1]],
                    values=values,
                    ignore_conflicts=step.flag,
                )
            case "append":
                await session.refresh(owner, [relationship.key])
                for each in related:
                    if each not in getattr(owner, relationship.key):
                        getattr(owner, relationship.key).append(each)
                if step.flag:
                    await session.flush()
            case "load":
                await session.refresh(owner, [relationship.key])
                for each in related:
                    await session.refresh(each, [self.shape.reverse])
            case "create":
                session.add(self._new(SIZE + step.owner if step.flag else step.owner))
                await session.flush()
            case "delete":
                await session.delete(owner)
                if step.flag:
                    await session.flush()
            case "error":
                await (
                    session.flush()
                )  # whether a plain statement does that, depends on the version of SQLAlchemy
                await divide_by_zero(session)
            case "raise":
                raise Failure
        return None

    def _shown(self) -> list[Any]:
        """What loaded collections show: numbers, or nothing for one that is not loaded.

        Those of a deleted instance are left out: a flush loads them to find what is to be deleted
        with it.
        """
        key, reverse = self.shape.relationship.key, self.shape.reverse
        shown: list[Any] = []
        for instances, name, others in (
            (self.owners, key, self.related),
            (self.related, reverse, self.owners),
        ):
            for instance in instances:
                loaded = None if inspect(instance).deleted else vars(instance).get(name)
                shown.append(None if loaded is None else sorted(map(others.index, loaded)))
        return shown


def agree(one: Any, other: Any) -> bool:
    """Whether two entries of a trace are the same. A collection may be loaded here and expired
    there."""
    if isinstance(one, list) and isinstance(other, list):
        return all(a == b or a is None or b is None for a, b in zip(one, other, strict=True))
    return bool(one == other)


class Outcome(NamedTuple):
    trace: list[Any]
    associations: list[Any]
    owners: list[int]


async def on_double(shape: Shape, program: Block) -> Outcome:
    database = MemoryDatabase()
    async with database.session() as session:
        trace = await Run(shape, session, MemoryAssociations()).run(program)
    rows = [tuple(row[name] for name in shape.columns) for row in database.rows(shape.table)]
    owners = sorted(tuple(row.values()) for row in database.rows(shape.owner.__table__))
    assert isinstance(session, MemorySession)
    assert not session.sync_session.work.store.locks.of(session.number)  # type: ignore[attr-defined]
    return Outcome(trace, sorted(rows, key=repr), [row[0] for row in owners])


async def on_postgresql(shape: Shape, program: Block, engine: AsyncEngine) -> Outcome:
    async with engine.begin() as connection:
        for table in (shape.table, shape.owner.__table__, shape.related.__table__):
            await connection.execute(table.delete())
    async with AsyncSession(engine, expire_on_commit=False) as session:
        trace = await Run(shape, session, pgtoolset).run(program)
        await session.rollback()
        columns = [shape.table.c[name] for name in shape.columns]
        rows = [tuple(row) for row in await session.execute(select(*columns))]
        owners = sorted(await session.scalars(select(inspect(shape.owner).primary_key[0])))
    return Outcome(trace, sorted(rows, key=repr), list(owners))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared_engine(runner: asyncio.Runner, database_url: str) -> Iterator[AsyncEngine]:
    """One engine on one event loop for all examples."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)

    async def create() -> None:
        await models.create(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def drop() -> None:
        await models.empty(engine)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)

    runner.run(create())
    yield engine
    runner.run(drop())
    runner.run(engine.dispose())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(program=blocks(DEPTH))
def test_double_and_postgresql_agree(
    runner: asyncio.Runner, shared_engine: AsyncEngine, shape: str, program: Block
) -> None:
    """The same program gives the same results, errors, collections and rows on the double and on
    PostgreSQL."""
    double = runner.run(on_double(SHAPES[shape], program))
    postgresql = runner.run(on_postgresql(SHAPES[shape], program, shared_engine))
    assert len(double.trace) == len(postgresql.trace)
    for one, other in zip(double.trace, postgresql.trace, strict=True):
        assert agree(one, other)
    assert double[1:] == postgresql[1:]
