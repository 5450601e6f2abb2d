"""A session of ours that owes nothing to SQLAlchemy: all that `TransactionalSession` asks for, in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MemorySession:
    """A set of ids with transactions. The log says what was done."""

    def __init__(self, shared: set[int] | None = None) -> None:
        self.shared: set[int] = set() if shared is None else shared
        self.rows = set(self.shared)
        self.log: list[str] = []
        self._depth = 0

    def in_transaction(self) -> bool:
        return self._depth > 0

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        assert self._depth == 0
        self.rows = set(self.shared)
        async with self._level("BEGIN", "COMMIT", "ROLLBACK"):
            yield
        self.shared.clear()
        self.shared.update(self.rows)

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        assert self._depth > 0
        async with self._level("SAVEPOINT", "RELEASE", "ROLLBACK TO"):
            yield

    @asynccontextmanager
    async def _level(self, begin: str, commit: str, rollback: str) -> AsyncIterator[None]:
        before = set(self.rows)
        self.log.append(begin)
        self._depth += 1
        try:
            yield
        except BaseException:
            self.rows = before
            self.log.append(rollback)
            raise
        else:
            self.log.append(commit)
        finally:
            self._depth -= 1


class MemoryManagedSession(MemorySession):
    """Also ended and closed from outside: all that `ManagedSession` asks for."""

    def __init__(self, shared: set[int] | None = None) -> None:
        super().__init__(shared)
        self.closed = False

    def begin(self) -> _Started:
        return _Started(self)

    async def commit(self) -> None:
        self.log.append("COMMIT")
        self.shared.clear()
        self.shared.update(self.rows)
        self._depth = 0

    async def rollback(self) -> None:
        self.log.append("ROLLBACK")
        self._depth = 0

    async def close(self) -> None:
        self.log.append("CLOSE")
        self.closed = True


class _Started:
    def __init__(self, session: MemoryManagedSession) -> None:
        self._session = session

    def __await__(self):
        self._session.log.append("BEGIN")
        self._session.rows = set(self._session.shared)
        self._session._depth = 1
        return iter(())

    async def __aenter__(self) -> None:
        await self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await (self._session.commit() if exc_type is None else self._session.rollback())
