"""Checked by mypy and pyright, never run: what satisfies the protocols of locks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

import pgtoolset
from pgtoolset import LockMode, LockWait, RowLockMode
from pgtoolset.protocols import (
    AdvisoryLocker,
    LockObserver,
    RowLocker,
    TableLocker,
    TransactionalSession,
)
from pgtoolset.types import (
    AdvisoryKey,
    Duration,
    LockModeSpelling,
    LockWaitSource,
    PrimaryKeys,
    RowLockModeSpelling,
    TableTarget,
)

S = TypeVar("S", bound=TransactionalSession)
M = TypeVar("M")

table_locker: TableLocker = pgtoolset
advisory_locker: AdvisoryLocker = pgtoolset
row_locker: RowLocker = pgtoolset
observer: LockObserver = pgtoolset


class Double:
    """A double that imports nothing of ours but the values that it takes and returns."""

    @asynccontextmanager
    async def lock_tables(
        self,
        session: S,
        tables: Iterable[Any],
        *,
        mode: LockMode | str = "SHARE",
        timeout: float | timedelta | str | None = None,
        nowait: bool = False,
    ) -> AsyncIterator[S]:
        yield session

    @asynccontextmanager
    async def advisory_lock(
        self,
        session: Any,
        key: int | tuple[int, int] | str,
        *,
        shared: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> AsyncIterator[bool]:
        yield True

    async def lock_rows(
        self,
        session: Any,
        model: type[M],
        pks: Iterable[Any],
        *,
        mode: RowLockMode | str = "UPDATE",
        skip_locked: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> list[M]:
        return []

    async def list_lock_waits(self, connection_or_session: object) -> list[LockWait]:
        return []


class PreciseDouble:
    """A double that has the types of the contract."""

    @asynccontextmanager
    async def lock_tables(
        self,
        session: S,
        tables: Iterable[TableTarget],
        *,
        mode: LockModeSpelling = "SHARE",
        timeout: Duration | None = None,
        nowait: bool = False,
    ) -> AsyncIterator[S]:
        yield session

    @asynccontextmanager
    async def advisory_lock(
        self,
        session: AsyncSession,
        key: AdvisoryKey,
        *,
        shared: bool = False,
        nowait: bool = False,
        timeout: Duration | None = None,
    ) -> AsyncIterator[bool]:
        yield True

    async def lock_rows(
        self,
        session: AsyncSession,
        model: type[M],
        pks: PrimaryKeys,
        *,
        mode: RowLockModeSpelling = "UPDATE",
        skip_locked: bool = False,
        nowait: bool = False,
        timeout: Duration | None = None,
    ) -> Sequence[M]:
        return []

    async def list_lock_waits(self, connection_or_session: LockWaitSource) -> Sequence[LockWait]:
        return []


own_table_locker: TableLocker = Double()
own_advisory_locker: AdvisoryLocker = Double()
own_row_locker: RowLocker = Double()
own_observer: LockObserver = Double()
precise_table_locker: TableLocker = PreciseDouble()
precise_advisory_locker: AdvisoryLocker = PreciseDouble()
precise_row_locker: RowLocker = PreciseDouble()
precise_observer: LockObserver = PreciseDouble()
