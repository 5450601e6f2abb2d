"""The block of `lock_tables` and `advisory_lock`: a transaction that begins with its locks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn

from pgtoolset._postgres.lookout import FindHolders, Lookout
from pgtoolset.transactions import get_transaction

R = TypeVar("R")


class LockedBlock(AbstractAsyncContextManager[R]):
    """A `get_transaction` block that takes locks at its start and yields what `take` returns.

    The locks belong to the transaction, so PostgreSQL releases them: outermost at the end of the
    block, nested with the outermost transaction or with the rollback of this level.

    A class, as the block inside: where it is dropped in its middle the event loop would run a
    generator to its end, and roll back whatever the session is doing by then.

    Args:
        session: the caller's session.
        take: asks for the locks, in SQLAlchemy's greenlet. It calls `Lookout.watch` first.
        timeout: in seconds; 0 where `take` does not wait, `None` without a limit.
        holders: see `Lookout`.
    """

    def __init__(
        self,
        session: AsyncSession | Any,
        take: Callable[[Lookout], R],
        timeout: float | None,
        *,
        holders: FindHolders | None = None,
    ) -> None:
        self._block = get_transaction(session)
        self._take = take
        self._timeout = timeout
        self._holders = holders

    async def __aenter__(self) -> R:
        await self._block.__aenter__()
        try:
            async with Lookout(self._timeout, holders=self._holders) as lookout:
                return await greenlet_spawn(self._take, lookout)
        except BaseException as error:
            await self._block.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._block.__aexit__(exc_type, exc, traceback)
