"""Who holds which lock, who waits for it, and who blocks it: PostgreSQL's rules in memory.

https://www.postgresql.org/docs/current/explicit-locking.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pgtoolset._postgres.locks import CONFLICTS
from pgtoolset.testing.doubles._clock import Clock
from pgtoolset.values import LockMode, RowLockMode

#: An object that can be locked: its kind ("table", "row", "advisory"), and which of them.
Resource: TypeAlias = tuple[Hashable, ...]

_R = RowLockMode
_ROW_CONFLICTS: dict[RowLockMode, frozenset[RowLockMode]] = {
    _R.KEY_SHARE: frozenset({_R.UPDATE}),
    _R.SHARE: frozenset({_R.UPDATE, _R.NO_KEY_UPDATE}),
    _R.NO_KEY_UPDATE: frozenset(_R) - {_R.KEY_SHARE},
    _R.UPDATE: frozenset(_R),
}


class DeadlockError(Exception):
    """To wait would close a circle of sessions that wait for one another."""


@dataclass(eq=False, slots=True)
class Hold:
    """A lock that a session holds.

    Attributes:
        owner: the number of the session.
        depth: the level of the transaction that took it: 0 is the outermost. The rollback of a
            savepoint frees each lock of its depth or deeper.
    """

    owner: int
    resource: Resource
    mode: str
    depth: int


@dataclass(eq=False, slots=True)
class Request(Hold):
    """A session that waits for a lock.

    Attributes:
        since: when it began to wait.
        granted: done when it has the lock, cancelled when its time is up.
    """

    since: float
    granted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Locks:
    """The locks of one database. Waiters receive a lock in the order in which they came."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._holds: dict[Resource, list[Hold]] = {}
        self._queue: list[Request] = []

    @property
    def waiting(self) -> Sequence[Request]:
        """Who waits, the longest first."""
        return [request for request in self._queue if not request.granted.done()]

    async def acquire(
        self, owner: int, resource: Resource, mode: str, depth: int, seconds: float | None
    ) -> list[int]:
        """Take a lock; return the sessions that blocked it when its time was up.

        Args:
            owner: the session.
            resource: what to lock.
            mode: the mode of the lock.
            depth: the level that takes it.
            seconds: how long to wait: 0 not at all, `None` without limit.

        Raises:
            DeadlockError: the lock will never be free.
        """
        holds = self._holds.get(resource, ())
        if any(each.owner == owner and each.mode == mode for each in holds):
            return []
        blockers = self.blockers(owner, resource, mode)
        if not blockers:
            self._holds.setdefault(resource, []).append(Hold(owner, resource, mode, depth))
        if not blockers or seconds == 0:
            return blockers
        request = Request(owner, resource, mode, depth, self._clock.time())
        self._queue.append(request)
        try:
            if self._waits_for(owner, owner, set()):
                raise DeadlockError
            return await self._granted(request, seconds)
        finally:
            if request in self._queue:
                self._queue.remove(request)
                self._serve()

    async def _granted(self, request: Request, seconds: float | None) -> list[int]:
        blockers: list[int] = []

        def expire() -> None:
            blockers.extend(self.blockers(request.owner, request.resource, request.mode))
            request.granted.cancel()

        timer = None if seconds is None else self._clock.call_later(seconds, expire)
        try:
            # The timer cancels the future; a cancellation of the task itself is raised here.
            await asyncio.wait([request.granted])
        finally:
            if timer is not None:
                timer.cancel()
        return blockers

    def blockers(self, owner: int, resource: Resource, mode: str) -> list[int]:
        """The sessions that `owner` would wait for: the holders, then who waits in front of it."""
        holds = self._holds.get(resource, ())
        ahead: Iterator[Hold] = iter(())
        # A session that holds some lock on the resource goes in front of the queue: it would
        # otherwise wait for the sessions that wait for it.
        if not any(each.owner == owner for each in holds):
            ahead = self._ahead_of(owner, resource)
        return list(
            dict.fromkeys(
                each.owner
                for each in (*holds, *ahead)
                if each.owner != owner and _conflict(resource, each.mode, mode)
            )
        )

    def _ahead_of(self, owner: int, resource: Resource) -> Iterator[Hold]:
        for each in self._queue:
            if each.resource == resource:
                if each.owner == owner:
                    return
                yield each

    def release_from(self, owner: int, depth: int) -> None:
        """Free the locks of a session that were taken at `depth` or deeper."""
        for resource, holds in list(self._holds.items()):
            left = [each for each in holds if each.owner != owner or each.depth < depth]
            if left:
                self._holds[resource] = left
            else:
                del self._holds[resource]
        self._serve()

    def move_up(self, owner: int, depth: int) -> None:
        """Give the locks of a released savepoint to the level around it."""
        for holds in self._holds.values():
            for each in holds:
                if each.owner == owner and each.depth >= depth:
                    each.depth = depth - 1

    def _serve(self) -> None:
        for request in self.waiting:
            if not self.blockers(request.owner, request.resource, request.mode):
                self._holds.setdefault(request.resource, []).append(
                    Hold(request.owner, request.resource, request.mode, request.depth)
                )
                self._queue.remove(request)
                request.granted.set_result(None)

    def _waits_for(self, start: int, goal: int, seen: set[int]) -> bool:
        """Whether `start` waits, directly or through others, for `goal`."""
        for request in self._queue:
            if request.owner == start:
                for other in self.blockers(start, request.resource, request.mode):
                    if other == goal:
                        return True
                    if other not in seen:
                        seen.add(other)
                        if self._waits_for(other, goal, seen):
                            return True
        return False


def _conflict(resource: Resource, one: Any, other: Any) -> bool:
    """Whether two sessions cannot hold these modes of one lock together."""
    if resource[0] == "table":
        return other in CONFLICTS[LockMode(one)]
    if resource[0] == "row":
        return other in _ROW_CONFLICTS[RowLockMode(one)]
    return "EXCLUSIVE" in (one, other)
