"""What the contract classes need of an implementation: sessions, writes, and the stored rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, Protocol

from sqlalchemy import text

from pgtoolset._compatibility import execute_of
from pgtoolset._lifecycle import close
from pgtoolset.protocols import ManagedSession, SessionFactory
from pgtoolset.testing.contracts._values import Attribute, column_and_values
from pgtoolset.testing.doubles import MemoryDatabase

__all__ = [
    "Fail",
    "MappedRows",
    "MemoryRows",
    "RowsHarness",
    "TransactionHarness",
    "Undone",
    "opened",
    "until",
]

#: Makes a statement of a session fail with a SQLSTATE.
Fail = Callable[[Any, str], Awaitable[object]]

#: Seconds after which an event that should happen at once counts as missing.
EVENT_TIMEOUT = 10.0


class Undone(Exception):
    """Leaves a block that is to be undone."""


class TransactionHarness(Protocol):
    """For the contracts of sessions: three methods that sessions of any kind can have."""

    def session(self) -> Any:
        """Return a new session, whose writes are stored where `stored` looks."""
        ...

    async def write(self, session: Any, number: int) -> None:
        """Write a new row that is known by its number, in the session's transaction."""
        ...

    async def stored(self) -> set[int]:
        """Return the numbers of the rows that are committed."""
        ...


class RowsHarness(TransactionHarness, Protocol):
    """For the contracts of locks and watching: rows of one mapped class with one value.

    Attributes:
        model: the mapped class, whose primary key is an integer.
        key: the attribute of its primary key.
        values: three different values for `attribute`; a new row has the first.
    """

    model: type[Any]
    key: str
    values: tuple[Any, Any, Any]

    @property
    def attribute(self) -> str:
        """The attribute that a test changes."""
        ...

    async def change(self, session: Any, number: int, value: Any) -> None:
        """Change the value of a row, in the session's transaction."""
        ...

    async def seen(self, session: Any) -> set[int]:
        """Return the numbers of the rows that the session sees."""
        ...

    async def statement(self, session: Any) -> None:
        """Send a statement that succeeds."""
        ...

    async def fail(self, session: Any, sqlstate: str) -> None:
        """Send a statement that fails with a SQLSTATE."""
        ...

    async def insert(self, *numbers: int) -> None:
        """Commit new rows, in another session."""
        ...

    async def update(self, number: int, value: Any) -> None:
        """Commit another value of a row, in another session."""
        ...

    async def delete(self, number: int) -> None:
        """Commit the deletion of a row, in another session."""
        ...

    async def value_of(self, number: int) -> Any:
        """Return the committed value of a row."""
        ...


class MappedRows:
    """The `RowsHarness` of every kind of `AsyncSession`.

    Args:
        session_maker: an `async_sessionmaker`, with `expire_on_commit=False`.
        model: the mapped class. Its table is empty when a test begins.
        key: the attribute that is its primary key, an integer that the application chooses:
            `Order.id`, or its name.
        value: an attribute that a test can change: `Order.status`, or its name.
        values: three values for it, different from each other; without them three of the type of
            its column, where that is a text, a number, a date or time, a UUID or an enumeration.
        fail: makes a statement of a session fail with a SQLSTATE; without it the session executes a
            PL/pgSQL block that raises it.
        make: makes an instance of the class for a number, where it needs more than a key.
    """

    def __init__(
        self,
        session_maker: SessionFactory[Any],
        model: type[Any],
        *,
        key: Attribute = "id",
        value: Attribute | None = None,
        values: tuple[Any, Any, Any] | None = None,
        fail: Fail | None = None,
        make: Callable[[int], Any] | None = None,
    ) -> None:
        self.session_maker = session_maker
        self.model = model
        self.key: str
        self.value: str | None
        self.values: tuple[Any, Any, Any]
        self.key, self.value, self.values = column_and_values(model, key, value, values)
        self._fail: Fail = _raise_in_postgresql if fail is None else fail
        self._make = make
        self._written: set[int] = set()

    def session(self) -> Any:
        return self.session_maker()

    def make(self, number: int) -> Any:
        """Return a new instance."""
        self._written.add(number)
        instance = self.model(**{self.key: number}) if self._make is None else self._make(number)
        if self.value is not None:
            setattr(instance, self.value, self.values[0])
        return instance

    @property
    def attribute(self) -> str:
        return _given(self.value)

    async def write(self, session: Any, number: int) -> None:
        session.add(self.make(number))
        await session.flush()

    async def change(self, session: Any, number: int, value: Any) -> None:
        setattr(await session.get_one(self.model, number), self.attribute, value)
        await session.flush()

    async def seen(self, session: Any) -> set[int]:
        get = session.get
        return {each for each in self._written if await get(self.model, each) is not None}

    async def statement(self, session: Any) -> None:
        await execute_of(session)(text("SELECT 1"))

    async def fail(self, session: Any, sqlstate: str) -> None:
        await self._fail(session, sqlstate)

    async def stored(self) -> set[int]:
        async with opened(self) as session:
            return await self.seen(session)

    async def insert(self, *numbers: int) -> None:
        async with opened(self) as session:
            session.add_all([self.make(number) for number in numbers])
            await session.commit()

    async def update(self, number: int, value: Any) -> None:
        async with opened(self) as session:
            await self.change(session, number, value)
            await session.commit()

    async def delete(self, number: int) -> None:
        async with opened(self) as session:
            await session.delete(await session.get_one(self.model, number))
            await session.commit()

    async def value_of(self, number: int) -> Any:
        async with opened(self) as session:
            return getattr(await session.get_one(self.model, number), self.attribute)


class MemoryRows:
    """The `RowsHarness` of the sessions of a `MemoryDatabase`.

    Args:
        database: the sessions' database.
        model: a mapped class.
        key: the attribute that is its primary key, or its name.
        value: an attribute that a test can change, or its name.
        values: three values for it, different from each other; without them three of the type of
            its column.
    """

    def __init__(
        self,
        database: MemoryDatabase,
        model: type[Any],
        *,
        key: Attribute = "id",
        value: Attribute | None = None,
        values: tuple[Any, Any, Any] | None = None,
    ) -> None:
        self.database = database
        self.model = model
        self.key: str
        self.value: str | None
        self.values: tuple[Any, Any, Any]
        self.key, self.value, self.values = column_and_values(model, key, value, values)

    def session(self) -> Any:
        return self.database.session()

    @property
    def attribute(self) -> str:
        return _given(self.value)

    async def write(self, session: Any, number: int) -> None:
        values = {} if self.value is None else {self.value: self.values[0]}
        await session.put(self.model, number, values)

    async def change(self, session: Any, number: int, value: Any) -> None:
        await session.put(self.model, number, {self.attribute: value})

    async def seen(self, session: Any) -> set[int]:
        return {row[self.key] for row in session.rows(self.model)}

    async def statement(self, session: Any) -> None:
        await session.execute(text("SELECT 1"))

    async def fail(self, session: Any, sqlstate: str) -> None:
        self.database.fail_next("STATEMENT", sqlstate)
        await self.statement(session)

    async def stored(self) -> set[int]:
        return await self.seen(self.database)

    async def insert(self, *numbers: int) -> None:
        async with opened(self) as session:
            for number in numbers:
                await self.write(session, number)
            await session.commit()

    async def update(self, number: int, value: Any) -> None:
        async with opened(self) as session:
            await self.change(session, number, value)
            await session.commit()

    async def delete(self, number: int) -> None:
        async with opened(self) as session:
            await session.remove(self.model, number)
            await session.commit()

    async def value_of(self, number: int) -> Any:
        rows = self.database.rows(self.model)
        return next(row[self.attribute] for row in rows if row[self.key] == number)


def _given(value: str | None) -> str:
    if value is None:
        raise ValueError(
            "value: this contract changes rows, so its harness needs an attribute, value='status'"
        )
    return value


@asynccontextmanager
async def opened(harness: TransactionHarness) -> AsyncIterator[Any]:
    """Open a session and close it at the end; a block that hangs is an error in time."""
    session: ManagedSession = harness.session()
    try:
        async with asyncio.timeout(EVENT_TIMEOUT):
            yield session
    finally:
        if callable(getattr(session, "close", None)):
            await close(session)


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    """Wait until a condition holds; fail where it does not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + EVENT_TIMEOUT
    while not await condition():
        assert loop.time() < deadline, f"the condition did not hold within {EVENT_TIMEOUT} s"
        await asyncio.sleep(0.01)


async def _raise_in_postgresql(session: Any, sqlstate: str) -> None:
    await execute_of(session)(
        text(f"DO $$ BEGIN RAISE EXCEPTION 'as asked' USING ERRCODE = '{sqlstate}'; END $$")
    )


def missing(name: str, what: str) -> NoReturn:
    """Raise the error of a fixture that a subclass of a contract does not override."""
    raise NotImplementedError(f"override the fixture `{name}`: {what}")
