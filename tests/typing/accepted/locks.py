"""Checked by mypy and pyright, never run: what the functions of locks are typed as."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import assert_type

from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase

import pgtoolset
from pgtoolset import (
    LockMode,
    LockWait,
    RowLockMode,
    advisory_lock,
    list_lock_waits,
    lock_rows,
    lock_tables,
)
from pgtoolset.protocols import AdvisoryLocker, LockObserver, RowLocker, TableLocker

table_locker: TableLocker = pgtoolset
advisory_locker: AdvisoryLocker = pgtoolset
row_locker: RowLocker = pgtoolset
observer: LockObserver = pgtoolset


class MySession(AsyncSession):
    pass


class Account:
    balance: int


class Base(DeclarativeBase):
    pass


class Order(Base):
    __table__ = Table("order", Base.metadata, Column("id", Integer, primary_key=True))


TABLES = [Account, Order]


async def use(session: MySession, connection: AsyncConnection, engine: AsyncEngine) -> None:
    assert_type(lock_tables(session, [Account]), AbstractAsyncContextManager[MySession])
    async with lock_tables(
        session=session, tables=[Account], mode="EXCLUSIVE", timeout=timedelta(seconds=1)
    ) as same:
        assert_type(same, MySession)
    async with lock_tables(session, [Account], mode=LockMode.SHARE, timeout=None, nowait=True):
        pass
    async with advisory_lock(session, "key", shared=True, nowait=True) as held:
        assert_type(held, bool)
    assert_type(
        await lock_rows(session, Account, [1, 2], mode=RowLockMode.SHARE, timeout="1s"),
        Sequence[Account],
    )
    assert_type(await list_lock_waits(connection), Sequence[LockWait])
    assert_type(await list_lock_waits(session), Sequence[LockWait])
    assert_type(await list_lock_waits(engine), Sequence[LockWait])
    async with table_locker.lock_tables(session, [Account]) as through_the_protocol:
        assert_type(through_the_protocol, MySession)


def tables(session: MySession, metadata: MetaData) -> None:
    lock_tables(session, [Account, metadata.tables["order"], Order.__table__])
    lock_tables(session, TABLES)
    lock_tables(session, metadata.sorted_tables)
    lock_tables(session, metadata.tables.values())


async def wrong(session: AsyncSession) -> None:
    lock_tables(object(), [Account])  # type: ignore[type-var]
    lock_tables(session, [Account], "EXCLUSIVE")  # type: ignore[call-arg]
    lock_tables(session, [Account], timeout=b"5s")  # type: ignore[arg-type]
    advisory_lock(session, 1.5)  # type: ignore[arg-type]
    advisory_lock(session, (1, 2, 3))  # type: ignore[arg-type]
    await lock_rows(session, Account, 1)  # type: ignore[arg-type]
