"""The looks of a watcher at its rows, reported to the observers of its engine."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._observers import observers_of
from pgtoolset.events import WatcherLooked
from pgtoolset.watch._registry import Groups

__all__ = ["Look", "Looks"]


class Looks:
    """The looks of one watcher, by the time of its event loop.

    Attributes:
        observers: of the engine.
        groups: of the watcher.
        good_at: when the last look at all rows that has succeeded began; or when the first waiter
            came.
    """

    def __init__(self, engine: AsyncEngine, groups: Groups) -> None:
        self.observers = observers_of(engine.dialect)
        self.groups = groups
        self.good_at = asyncio.get_running_loop().time()

    def rest(self) -> None:
        """Count from now on: the first waiter comes, and no row was watched before."""
        self.good_at = asyncio.get_running_loop().time()

    def begin(self, planned: float | None = None) -> Look:
        """Begin a look: a block.

        Args:
            planned: the time for which a look at all rows was planned; `None` where only some rows
                are looked at.
        """
        return Look(self, planned)


class Look(AbstractContextManager["Look"]):
    """One look.

    Attributes:
        count: the groups that were looked at.
        has_failed: whether a group could not be looked at.
        has_skipped: whether a group was left out, because it could not be looked at before.
    """

    __slots__ = (
        *("_began_at", "_looks", "_planned", "_waiters"),
        *("count", "has_failed", "has_skipped"),
    )

    def __init__(self, looks: Looks, planned: float | None) -> None:
        self._looks = looks
        self._planned = planned
        self.count = 0
        self.has_failed = False
        self.has_skipped = False

    def __enter__(self) -> Self:
        looks = self._looks
        self._began_at = asyncio.get_running_loop().time()
        self._waiters = 0
        if looks.observers:
            self._waiters = sum(group.count for group in looks.groups.all())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        looks, began_at = self._looks, self._began_at
        if exc_type is not None and not issubclass(exc_type, Exception):
            return  # the watcher is closed
        has_failed = self.has_failed or exc_type is not None
        if looks.observers and (self.count or has_failed):
            now = asyncio.get_running_loop().time()
            # While nothing is watched no look is late.
            planned = began_at if self._planned is None else max(self._planned, looks.good_at)
            looks.observers.tell(
                WatcherLooked(
                    seconds=now - began_at,
                    waiters=self._waiters,
                    groups=self.count,
                    late=max(0.0, began_at - planned),
                    lag=now - looks.good_at,
                    failed=has_failed,
                )
            )
        if self._planned is not None and not (has_failed or self.has_skipped):
            looks.good_at = began_at
