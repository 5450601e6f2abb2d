"""What the contract classes need to know of what they test: how to get a session, how to write,
what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn, Protocol

from sqlalchemy import text

from pgtoolset._lifecycle import close
from pgtoolset.protocols import ManagedSession, SessionFactory
from pgtoolset.testing.doubles.session import MemorySession

__all__ = ["Fail", "MappedRows", "TransactionHarness", "opened", "until"]

#: Makes a statement of a session fail with a SQLSTATE.
Fail = Callable[[Any, str], Awaitable[object]]

#: Seconds after which something that should happen at once is taken not to happen.
PATIENCE = 10.0


class TransactionHarness(Protocol):
    """For the contracts of sessions. `MappedRows` is one for every kind of `AsyncSession`."""

    def session(self) -> Any:
        """A new session; what it writes is stored where `stored` looks."""
        ...

    async def write(self, session: Any, number: int) -> None:
        """Write something that is known by a number, in the session's transaction."""
        ...

    async def stored(self) -> set[int]:
        """The numbers of what was written and is committed."""
        ...


class MappedRows:
    """Rows of one mapped class, whose key is an integer that the application chooses.

    Args:
        session_maker: a factory of `AsyncSession`: an `async_sessionmaker`, or
            `MemoryDatabase.session`. With `expire_on_commit=False`.
        model: the mapped class. Its table is empty when a test begins.
        key: the attribute that is its primary key.
        value: an attribute that a test can change.
        values: three values for it, different from each other.
        fail: makes a statement of a session fail with a SQLSTATE; without it a `MemorySession` is
            asked to, and any other session executes a PL/pgSQL block that raises it.
        make: makes an instance of the class for a number, where it needs more than a key.
    """

    def __init__(
        self,
        session_maker: SessionFactory[Any],
        model: type[Any],
        *,
        key: str = "id",
        value: str | None = None,
        values: tuple[Any, Any, Any] = ("one", "two", "three"),
        fail: Fail | None = None,
        make: Callable[[int], Any] | None = None,
    ) -> None:
        self.session_maker = session_maker
        self.model = model
        self.key = key
        self.value = value
        self.values = values
        self.fail: Fail = _fail if fail is None else fail
        self._make = make
        self._written: set[int] = set()

    def session(self) -> Any:
        return self.session_maker()

    def make(self, number: int) -> Any:
        """A new instance."""
        self._written.add(number)
        instance = self.model(**{self.key: number}) if self._make is None else self._make(number)
        if self.value is not None:
            setattr(instance, self.value, self.values[0])
        return instance

    async def write(self, session: Any, number: int) -> None:
        session.add(self.make(number))
        await session.flush()

    async def stored(self) -> set[int]:
        async with opened(self) as session:
            return {
                number
                for number in self._written
                if await session.get(self.model, number) is not None
            }

    # Committed changes, for those who look on

    async def insert(self, *numbers: int) -> None:
        async with opened(self) as session:
            session.add_all([self.make(number) for number in numbers])
            await session.commit()

    async def update(self, number: int, value: Any) -> None:
        async with opened(self) as session:
            setattr(await session.get_one(self.model, number), self.attribute, value)
            await session.commit()

    async def delete(self, number: int) -> None:
        async with opened(self) as session:
            await session.delete(await session.get_one(self.model, number))
            await session.commit()

    async def value_of(self, number: int) -> Any:
        async with opened(self) as session:
            return getattr(await session.get_one(self.model, number), self.attribute)

    @property
    def attribute(self) -> str:
        if self.value is None:
            raise ValueError(
                "this contract changes rows: give MappedRows the name of an attribute, value='status'"
            )
        return self.value


@asynccontextmanager
async def opened(harness: TransactionHarness) -> AsyncIterator[Any]:
    """A session, closed at the end. What waits in the block for ever is an error in time."""
    session: ManagedSession = harness.session()
    try:
        async with asyncio.timeout(PATIENCE):
            yield session
    finally:
        if callable(getattr(session, "close", None)):
            await close(session)


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    """Wait until something holds; fail where it does not."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while not await condition():
        assert loop.time() < deadline, f"did not come about within {PATIENCE} s"
        await asyncio.sleep(0.01)


async def _fail(session: Any, sqlstate: str) -> None:
    if isinstance(session, MemorySession):
        await session.fail(sqlstate)
    await session.execute(
        text(f"DO $$ BEGIN RAISE EXCEPTION 'as asked' USING ERRCODE = '{sqlstate}'; END $$")
    )


def missing(name: str, what: str) -> NoReturn:
    raise NotImplementedError(f"override the fixture `{name}`: {what}")
