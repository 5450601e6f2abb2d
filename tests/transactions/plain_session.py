"""Sessions of a user's own, without SQLAlchemy: what the protocols require, and no more.

`MemorySession` has more than the protocols require; these show that the protocols suffice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Any


class PlainSession:
    """Numbers with transactions: all that `TransactionalSession` requires."""

    def __init__(self, stored: set[int]) -> None:
        self.stored = stored
        self.numbers: set[int] = set()
        self._depth = 0

    def in_transaction(self) -> bool:
        return self._depth > 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        assert self._depth == 0
        async with self.begin_nested():
            yield
        self.stored |= self.numbers
        self.numbers.clear()

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        before = set(self.numbers)
        self._depth += 1
        try:
            yield
        except BaseException:
            self.numbers = before
            raise
        finally:
            self._depth -= 1


class PlainManagedSession(PlainSession):
    """Also committed and closed by its owner: all that `ManagedSession` requires."""

    closed = False

    def begin(self) -> Any:
        return _Started(self)

    async def commit(self) -> None:
        self.stored |= self.numbers
        await self.rollback()

    async def rollback(self) -> None:
        self.numbers.clear()
        self._depth = 0

    async def close(self) -> None:
        await self.rollback()
        self.closed = True


class _Started:
    def __init__(self, session: PlainManagedSession) -> None:
        self._session = session

    def __await__(self) -> Generator[Any, None, None]:
        self._session._depth = 1
        yield from ()

    async def __aenter__(self) -> None:
        await self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await (self._session.commit() if exc_type is None else self._session.rollback())


class PlainHarness:
    """The `TransactionHarness` of either."""

    def __init__(self, class_: type[PlainSession]) -> None:
        self._class = class_
        self._stored: set[int] = set()

    def session(self) -> Any:
        return self._class(self._stored)

    async def write(self, session: Any, number: int) -> None:
        assert session.in_transaction()
        session.numbers.add(number)

    async def stored(self) -> set[int]:
        return set(self._stored)
