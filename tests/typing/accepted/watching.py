"""Checked by mypy and pyright, never run: what satisfies the protocols of watching."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar, assert_type

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import ExecutableDDLElement

import pgtoolset
from pgtoolset import RowChange, RowWatcher, row_change_trigger
from pgtoolset._native import comparator, row_comparator
from pgtoolset.protocols import ChangeStream, ChangeWaiter, RowComparator, Watcher
from pgtoolset.types import Duration
from pgtoolset.watch import RowChanges

M = TypeVar("M")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]


waiter: ChangeWaiter = pgtoolset
chosen: RowComparator = row_comparator
interpreted: RowComparator = comparator


async def use(engine: AsyncEngine, duration: Duration) -> None:
    async with RowWatcher(engine, interval=1, notify=True) as watcher:
        assert_type(watcher, RowWatcher)
        as_protocol: Watcher = watcher
        assert_type(watcher.changes(Order, 1), RowChanges[Order])
        stream: ChangeStream[Order] = watcher.changes(Order, 1)
        wider: ChangeStream[Base] = stream
        iterator: AsyncIterator[RowChange[Order]] = stream
    RowWatcher(engine, interval="500ms")
    RowWatcher(engine, interval=timedelta(seconds=1))
    RowWatcher(engine, interval=duration)
    assert_type(row_change_trigger(Order), Sequence[ExecutableDDLElement])
    _ = (as_protocol, wider, iterator)


async def wrong(session: AsyncSession, engine: AsyncEngine) -> None:
    RowWatcher(session)  # type: ignore[arg-type]
    RowWatcher(engine, interval=b"1s")  # type: ignore[arg-type]
    RowWatcher(engine, interval=None)  # type: ignore[arg-type]
    row_change_trigger(Order(id=1))  # type: ignore[arg-type]


class Changes(Generic[M]):
    """A stream of changes that imports nothing of ours but the value that it gives."""

    current: Mapping[str, Any] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RowChange[M]:
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None: ...

    async def aclose(self) -> None: ...


class Double:
    """A double of the watcher and of the function."""

    async def __aenter__(self) -> Double:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object, /) -> None: ...

    async def close(self) -> None: ...

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        timeout: float | timedelta | str | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> RowChange[M]:
        return RowChange(model, pk_value, None, None)

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = None
    ) -> Changes[M]:
        return Changes()

    async def wait_for_row_change(
        self,
        session: Any,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        interval: float | timedelta | str = 1,
        timeout: float | timedelta | str | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> M:
        return model()


own_watcher: Watcher = Double()
own_waiter: ChangeWaiter = Double()
