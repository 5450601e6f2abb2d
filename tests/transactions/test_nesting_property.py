"""Random trees of nested transactions with random failures, against a model of savepoint semantics.

The same programs run on PostgreSQL, by blocks of ours mixed with SQLAlchemy's own, on the double of
`pgtoolset.testing`, and on a session that knows nothing of SQLAlchemy. Model and implementation
must agree on what is stored, on which callbacks ran in which order, and on how the outermost block
ended.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_sessionmaker,
)

from pgtoolset import TransactionAbortedError, get_transaction, on_commit
from pgtoolset.testing import MemoryDatabase
from tests.support import Item, examples
from tests.transactions.plain_session import PlainSession


class Failure(Exception):
    """Raised by a program, and by nothing else."""


@dataclass(frozen=True)
class Write:
    """Insert the next id and register a callback with its number."""


@dataclass(frozen=True)
class Flush:
    """The same through SQLAlchemy's unit of work."""


@dataclass(frozen=True)
class Raise:
    """Raise Failure."""


@dataclass(frozen=True)
class BadStatement:
    """Run a statement that PostgreSQL refuses; swallowed where it stands, or not."""

    swallowed: bool


@dataclass(frozen=True)
class Block:
    """A nested level; `caught`: an exception that leaves it is caught just outside."""

    steps: tuple[Step, ...] = ()
    caught: bool = True
    plain: bool = False


Step: TypeAlias = "Write | Flush | Raise | BadStatement | Block"


def steps(*, sql: bool, plain: bool) -> st.SearchStrategy[Any]:
    simple: list[st.SearchStrategy[Any]] = [
        st.just(Write()),
        st.just(Write()),
        st.just(Flush()),
        st.just(Raise()),
    ]
    if sql:
        simple.append(st.builds(BadStatement, swallowed=st.booleans()))
    return st.recursive(
        st.one_of(simple),
        lambda inner: st.builds(
            Block,
            steps=st.lists(inner, max_size=5).map(tuple),
            caught=st.booleans(),
            plain=st.booleans() if plain else st.just(False),
        ),
        max_leaves=20,
    )


def programs(*, sql: bool, plain: bool) -> st.SearchStrategy[Block]:
    return st.builds(Block, steps=st.lists(steps(sql=sql, plain=plain), max_size=6).map(tuple))


class Refused(Exception):
    """The model's word for an error that the database raises."""


class Aborted(Exception):
    """The model's word for TransactionAbortedError."""


@dataclass
class Model:
    """What PostgreSQL's documentation says of BEGIN, SAVEPOINT, ROLLBACK TO and an aborted
    transaction."""

    next_id: int = 0
    rows: list[int] = field(default_factory=list)
    aborted: bool = False
    #: SAVEPOINT is sent with the first statement of a level, so an empty level in an aborted
    #: transaction is harmless.
    touched: list[bool] = field(default_factory=list)

    def statement(self) -> None:
        if self.aborted:
            raise Refused
        self.touched[:] = [True] * len(self.touched)

    def run(self, block: Block) -> None:
        for step in block.steps:
            match step:
                case Write() | Flush():
                    self.next_id += 1
                    self.statement()
                    self.rows.append(self.next_id)
                case Raise():
                    raise Failure
                case BadStatement(swallowed):
                    try:
                        self.statement()
                        self.aborted = True
                        raise Refused
                    except Refused:
                        if not swallowed:
                            raise
                case Block():
                    try:
                        self.level(step)
                    except (Failure, Refused, Aborted):
                        if not step.caught:
                            raise

    def level(self, block: Block) -> None:
        rows, aborted = list(self.rows), self.aborted
        self.touched.append(False)
        try:
            self.run(block)
            if self.touched[-1] and self.aborted and not block.plain:
                raise Aborted
        except (Failure, Refused, Aborted):
            self.rows, self.aborted = rows, aborted
            raise
        finally:
            touched = self.touched.pop()
        if touched and self.aborted:
            # SQLAlchemy's own block sends RELEASE, which is refused, and leaves the transaction
            # aborted.
            raise Refused

    def outermost(self, block: Block) -> str:
        self.touched = [False]
        try:
            self.run(block)
            if self.aborted:
                raise Aborted
        except (Failure, Refused, Aborted) as error:
            self.rows.clear()
            return type(error).__name__
        return "committed"


#: What the implementation raises, in the model's words.
OUTCOMES = {Failure: "Failure", TransactionAbortedError: "Aborted"}


def outcome_of(error: BaseException) -> str:
    return OUTCOMES.get(type(error), "Refused")


class Actions:
    """The actions of a program on PostgreSQL."""

    async def write(self, session: Any, id_: int) -> None:
        await session.execute(text("INSERT INTO item (id, name) VALUES (:id, '')"), {"id": id_})

    async def flush(self, session: Any, id_: int) -> None:
        session.add(Item(id=id_))
        try:
            await session.flush()
        finally:
            session.expunge_all()

    async def divide_by_zero(self, session: Any) -> None:
        await session.execute(text("SELECT 1 / 0"))


class DoubleActions(Actions):
    """The same on the double, which is asked to fail."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    async def write(self, session: Any, id_: int) -> None:
        await session.put(Item, id_)

    flush = write

    async def divide_by_zero(self, session: Any) -> None:
        self._database.fail_next("STATEMENT", "22012")
        await super().divide_by_zero(session)


async def run_on_session(session: Any, program: Block, ran: list[int], actions: Actions) -> str:
    """On PostgreSQL and on the double, by the same code."""
    next_id = 0

    async def run(block: Block) -> None:
        nonlocal next_id
        for step in block.steps:
            match step:
                case Write() | Flush():
                    next_id += 1
                    id_ = next_id
                    act = actions.write if isinstance(step, Write) else actions.flush
                    await act(session, id_)
                    on_commit(session, lambda id_=id_: ran.append(id_))
                case Raise():
                    raise Failure
                case BadStatement(swallowed):
                    try:
                        await actions.divide_by_zero(session)
                    except DBAPIError:
                        if not swallowed:
                            raise
                case Block():
                    try:
                        async with (
                            session.begin_nested() if step.plain else get_transaction(session)
                        ):
                            await run(step)
                    except (Failure, DBAPIError, TransactionAbortedError):
                        if not step.caught:
                            raise

    try:
        async with get_transaction(session):
            await run(program)
    except (Failure, DBAPIError, TransactionAbortedError) as error:
        return outcome_of(error)
    return "committed"


async def run_on_plain_session(session: PlainSession, program: Block, ran: list[int]) -> str:
    next_id = 0

    async def run(block: Block) -> None:
        nonlocal next_id
        for step in block.steps:
            match step:
                case Write() | Flush():
                    next_id += 1
                    id_ = next_id
                    session.numbers.add(id_)
                    on_commit(session, lambda id_=id_: ran.append(id_))
                case Raise():
                    raise Failure
                case Block():
                    try:
                        async with get_transaction(session):
                            await run(step)
                    except Failure:
                        if not step.caught:
                            raise

    try:
        async with get_transaction(session):
            await run(program)
    except Failure:
        return "Failure"
    return "committed"


@settings(
    max_examples=examples(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(program=programs(sql=True, plain=True))
def test_postgresql(runner: asyncio.Runner, shared_engine: AsyncEngine, program: Block) -> None:
    """PostgreSQL, through blocks of ours and SQLAlchemy's mixed: an exception undoes exactly its
    own level."""
    model = Model()
    expected = model.outermost(program)
    ran: list[int] = []

    async def run() -> tuple[str, list[int]]:
        async with async_sessionmaker(shared_engine)() as session:
            outcome = await run_on_session(session, program, ran, Actions())
            rows = await session.execute(text("DELETE FROM item RETURNING id"))
            ids = sorted(row.id for row in rows)
            await session.commit()
            return outcome, ids

    outcome, ids = runner.run(run())
    assert (outcome, ids) == (expected, sorted(model.rows))
    assert ran == model.rows
    assert shared_engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@settings(max_examples=examples(120), deadline=None)
@given(program=programs(sql=True, plain=False))
def test_double(program: Block) -> None:
    """The double of `pgtoolset.testing`: the same programs by blocks of ours, errors of statements
    included, end in the same way."""
    model = Model()
    expected = model.outermost(program)
    ran: list[int] = []
    database = MemoryDatabase()

    async def run() -> str:
        async with database.session() as session:
            return await run_on_session(session, program, ran, DoubleActions(database))

    outcome = asyncio.run(run())
    assert (outcome, [row["id"] for row in database.rows(Item)]) == (expected, sorted(model.rows))
    assert ran == model.rows


@settings(max_examples=examples(120), deadline=None)
@given(program=programs(sql=False, plain=False))
def test_plain_session(program: Block) -> None:
    """A session of a user's own: the same semantics, by the protocol alone."""
    model = Model()
    expected = model.outermost(program)
    ran: list[int] = []
    session = PlainSession(set())
    outcome = asyncio.run(run_on_plain_session(session, program, ran))
    assert (outcome, sorted(session.stored)) == (expected, sorted(model.rows))
    assert ran == model.rows
