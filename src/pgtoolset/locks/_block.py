"""The block of `lock_tables` and `advisory_lock`: a transaction that begins with its locks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn

from pgtoolset._postgres.lookout import FindHolders, Lookout
from pgtoolset.transactions import get_transaction

R = TypeVar("R")


@asynccontextmanager
async def locked_block(
    session: AsyncSession | Any,
    take: Callable[[Lookout], R],
    timeout: float | None,
    *,
    holders: FindHolders | None = None,
) -> AsyncIterator[R]:
    """Open a `get_transaction` block, take the locks in it and yield what `take` returns.

    The locks belong to the transaction, so PostgreSQL releases them: outermost at the end of the
    block, nested with the outermost transaction or with the rollback of this level.

    Args:
        session: the caller's session.
        take: asks for the locks, in SQLAlchemy's greenlet. It calls `Lookout.watch` first.
        timeout: in seconds; 0 where `take` does not wait, `None` without a limit.
        holders: see `Lookout`.
    """
    async with get_transaction(session):
        async with Lookout(timeout, holders=holders) as lookout:
            result = await greenlet_spawn(take, lookout)
        yield result
