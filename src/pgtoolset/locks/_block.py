"""The block of `lock_tables` and `advisory_lock`: a transaction that begins with its locks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import sync_session
from pgtoolset._postgres.locks import refuse_autocommit
from pgtoolset._postgres.lookout import FindHolders, Lookout
from pgtoolset.transactions import get_transaction

R = TypeVar("R")


class LockedBlock(AbstractAsyncContextManager[R]):
    """A `get_transaction` block that takes locks at its start and yields what `take` returns.

    The locks belong to the transaction, so PostgreSQL releases them: outermost at the end of the
    block, nested with the outermost transaction or with the rollback of this level. Where the
    session has pending changes, which the block's savepoint flushes, the locks come before both:
    the rollback of the level around releases them then.

    A class, as the block inside: where it is dropped in its middle the event loop would run a
    generator to its end, and roll back whatever the session is doing by then.

    Args:
        session: the caller's session.
        connect: returns the connection of the session, in SQLAlchemy's greenlet.
        take: asks for the locks over it, likewise. It calls `Lookout.watch` first.
        timeout: in seconds; 0 where `take` does not wait, `None` without a limit.
        holders: see `Lookout`.
        limits_statement: see `Lookout`.
    """

    def __init__(
        self,
        session: AsyncSession | Any,
        connect: Callable[[], Connection],
        take: Callable[[Lookout, Connection], R],
        timeout: float | None,
        *,
        holders: FindHolders | None = None,
        limits_statement: bool = False,
    ) -> None:
        self._sync = sync_session(session)
        self._block = get_transaction(session)
        self._connect = connect
        self._take_on = take
        self._timeout = timeout
        self._holders = holders
        self._limits_statement = limits_statement

    async def __aenter__(self) -> R:
        if self._has_pending_changes():
            # The savepoint of the block flushes them, and other sessions would wait for those rows
            # while this one waits for its lock.
            taken = await self._wait(self._take_in_savepoint)
            await self._block.__aenter__()
            return taken
        await self._block.__aenter__()
        try:
            return await self._wait(self._take)
        except BaseException as error:
            await self._block.__aexit__(type(error), error, error.__traceback__)
            raise

    def _has_pending_changes(self) -> bool:
        sync = self._sync
        return sync.in_transaction() and bool(sync.new or sync.dirty or sync.deleted)

    async def _wait(self, take: Callable[[Lookout], R]) -> R:
        async with Lookout(
            self._timeout, holders=self._holders, limits_statement=self._limits_statement
        ) as lookout:
            return await greenlet_spawn(take, lookout)

    def _take_in_savepoint(self, lookout: Lookout) -> R:
        """Take the locks before the block, in a savepoint of the connection, which flushes nothing.

        They outlive that savepoint.
        """
        connection = self._connect()
        refuse_autocommit(connection)
        with connection.begin_nested():
            return self._take_on(lookout, connection)

    def _take(self, lookout: Lookout) -> R:
        connection = self._connect()
        refuse_autocommit(connection)
        return self._take_on(lookout, connection)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._block.__aexit__(exc_type, exc, traceback)
