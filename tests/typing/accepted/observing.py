"""Checked by mypy and pyright, never run: observers, and events that `match` tells apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never, assert_type

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset import protocols
from pgtoolset.observe import (
    CommitResolved,
    Event,
    LockWaited,
    Observer,
    PoolWaited,
    Retried,
    TransactionEnded,
    WatcherLooked,
    subscribe,
)
from pgtoolset.observe.otel import OpenTelemetryObserver


def seconds_of(event: Event) -> float:
    match event:
        case TransactionEnded() | PoolWaited() | LockWaited() | CommitResolved() | WatcherLooked():
            return event.seconds
        case Retried():
            return event.pause
        case _:
            assert_never(event)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: Event, /) -> None:
        self.count += 1


def observe(engine: AsyncEngine, events: list[Event]) -> None:
    assert_type(subscribe(engine, events.append), Callable[[], None])
    subscribe(engine.sync_engine, seconds_of)
    subscribe(engine, Counter())
    subscribe(engine, OpenTelemetryObserver(engine, pool_name="shop"))
    observer: Observer = Counter()
    same: protocols.Observer = observer
    subscribe(engine, same)
    subscribe(engine, 5)  # type: ignore[arg-type]
    subscribe("engine", print)  # type: ignore[arg-type]
