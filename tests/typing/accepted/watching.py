"""Checked by mypy and pyright, never run: what the watching functions are typed as."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import ExecutableDDLElement

import pgtoolset
from pgtoolset import RowChange, RowWatcher, row_change_trigger, wait_for_row_change
from pgtoolset._native import row_comparator
from pgtoolset.protocols import ChangeWaiter, RowComparator, Watcher
from pgtoolset.watch import RowChanges


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]


waiter: ChangeWaiter = pgtoolset
comparator: RowComparator = row_comparator


async def use(session: AsyncSession, engine: AsyncEngine) -> None:
    assert_type(
        await wait_for_row_change(
            session,
            Order,
            1,
            columns=[Order.status, "id"],
            until=lambda order: order.status == "paid",
        ),
        Order,
    )
    assert_type(await wait_for_row_change(session, Order, (1,), baseline={"status": "new"}), Order)
    async with RowWatcher(engine, interval=1, notify=True) as watcher:
        assert_type(watcher, RowWatcher)
        double: Watcher = watcher
        assert_type(await watcher.wait(Order, 1, timeout=3), RowChange[Order])
        assert_type(watcher.changes(Order, 1), RowChanges[Order])
        async with double as entered:
            assert_type(await entered.wait(Order, 1), RowChange[Order])
        iterator: AsyncIterator[RowChange[Order]] = double.changes(Order, 1)
        async for change in iterator:
            assert_type(change.model, type[Order])
    assert_type(row_change_trigger(Order), Sequence[ExecutableDDLElement])


async def wrong(session: AsyncSession, engine: AsyncEngine, anything: Any) -> None:
    await wait_for_row_change(session, Order, 1, interval=b"1s")  # type: ignore[arg-type]
    await wait_for_row_change(engine, Order, 1)  # type: ignore[arg-type]
    await wait_for_row_change(session, Order, 1, columns=3)  # type: ignore[arg-type]
    RowWatcher(session)  # type: ignore[arg-type]
    row_change_trigger(Order(id=1))  # type: ignore[arg-type]
