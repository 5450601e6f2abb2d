"""Who holds which lock, who waits for it, and who is in the way: PostgreSQL's rules, without
PostgreSQL.

https://www.postgresql.org/docs/current/explicit-locking.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pgtoolset._postgres.locks import CONFLICTS
from pgtoolset._postgres.sqlstates import DEADLOCK_DETECTED
from pgtoolset.testing.doubles._clock import Clock
from pgtoolset.testing.doubles._refusals import refusal
from pgtoolset.values import LockMode, RowLockMode

__all__ = ["ALONE", "TOGETHER", "Hold", "Locks", "Request", "Resource"]

#: What is locked: its kind ("table", "row", "key", "advisory"), and which of them.
Resource: TypeAlias = tuple[Hashable, ...]

ALONE = "EXCLUSIVE"
TOGETHER = "SHARE"

_R = RowLockMode
_ROW_CONFLICTS: dict[RowLockMode, frozenset[RowLockMode]] = {
    _R.KEY_SHARE: frozenset({_R.UPDATE}),
    _R.SHARE: frozenset({_R.UPDATE, _R.NO_KEY_UPDATE}),
    _R.NO_KEY_UPDATE: frozenset(_R) - {_R.KEY_SHARE},
    _R.UPDATE: frozenset(_R),
}


@dataclass(eq=False, slots=True)
class Hold:
    """A lock that a session has.

    Attributes:
        owner: the number of the session.
        depth: the level of the transaction that it was taken in: 0 for the outermost, which nothing
            but its own end frees; a savepoint that rolls back frees what is at its depth.
    """

    owner: int
    resource: Resource
    mode: str
    depth: int


@dataclass(eq=False, slots=True)
class Request:
    """A session that waits for a lock."""

    owner: int
    resource: Resource
    mode: str
    depth: int
    since: float
    #: Who was in the way when the time was up.
    blockers: list[int] = field(default_factory=list)
    granted: asyncio.Future[Hold] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Locks:
    """The table of locks of one database. A lock is given to those who wait in the order in which
    they came."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._holds: dict[Resource, list[Hold]] = {}
        self.queue: list[Request] = []

    def take(self, owner: int, resource: Resource, mode: str, depth: int) -> Hold | None:
        """The lock, where it is free for `owner`; `None` where somebody is in the way."""
        if self.in_the_way(owner, resource, mode):
            return None
        hold = Hold(owner, resource, mode, depth)
        self._holds.setdefault(resource, []).append(hold)
        return hold

    def on(self, resource: Resource) -> Sequence[Hold]:
        """Who holds it."""
        return self._holds.get(resource, ())

    async def wait(
        self, owner: int, resource: Resource, mode: str, depth: int, seconds: float | None
    ) -> Hold | list[int]:
        """The lock, as soon as it is free; who was in the way, where it was not within so many
        seconds."""
        request = Request(owner, resource, mode, depth, self._clock.time())
        self.queue.append(request)
        timer = None

        def expire() -> None:
            request.blockers = self.in_the_way(owner, resource, mode)
            request.granted.cancel()

        try:
            if self._reaches(owner, owner, set()):
                raise refusal(
                    DEADLOCK_DETECTED, "deadlock detected", f"lock {resource[0]} in {mode} mode"
                )
            if seconds is not None:
                timer = self._clock.call_later(seconds, expire)
            return await self._granted(request)
        finally:
            if timer is not None:
                timer.cancel()
            if request in self.queue:
                self.queue.remove(request)
                self._serve()

    async def _granted(self, request: Request) -> Hold | list[int]:
        # The timer cancels the future and not the task, so a cancellation of the task is told from
        # it.
        await asyncio.wait([request.granted])
        return request.blockers if request.granted.cancelled() else request.granted.result()

    def in_the_way(self, owner: int, resource: Resource, mode: str) -> list[int]:
        """The sessions that `owner` would have to wait for: who holds the lock first, then who
        waits for it already."""
        holders = [
            each.owner
            for each in self.on(resource)
            if each.owner != owner and conflict(each.resource, each.mode, mode)
        ]
        ahead: list[int] = []
        # Who has some lock on it already goes in front of the queue, or it would wait for those who
        # wait for it.
        if not any(each.owner == owner for each in self.on(resource)):
            ahead = [
                each.owner
                for each in self._in_front(owner, resource)
                if each.owner != owner and conflict(each.resource, each.mode, mode)
            ]
        return list(dict.fromkeys([*holders, *ahead]))

    def _in_front(self, owner: int, resource: Resource) -> Iterator[Request]:
        for each in self.queue:
            if each.resource == resource:
                if each.owner == owner:
                    return
                yield each

    def release(self, hold: Hold) -> None:
        """Give one lock back. One that has been given back already is no error."""
        if hold in self.on(hold.resource):
            self._holds[hold.resource].remove(hold)
            self._serve()

    def release_from(self, owner: int, depth: int) -> None:
        """Give back what was taken at `depth` or deeper."""
        for resource, holds in list(self._holds.items()):
            left = [each for each in holds if each.owner != owner or each.depth < depth]
            if left:
                self._holds[resource] = left
            else:
                del self._holds[resource]
        self._serve()

    def move_up(self, owner: int, depth: int) -> None:
        """A savepoint was released: what it has taken belongs to the level around it."""
        for each in self.of(owner):
            if each.depth >= depth:
                each.depth = depth - 1

    def of(self, owner: int) -> Sequence[Hold]:
        return [each for holds in self._holds.values() for each in holds if each.owner == owner]

    def _serve(self) -> None:
        for request in list(self.queue):
            if not request.granted.done():
                hold = self.take(request.owner, request.resource, request.mode, request.depth)
                if hold is not None:
                    self.queue.remove(request)
                    request.granted.set_result(hold)

    def _reaches(self, start: int, goal: int, seen: set[int]) -> bool:
        """Whether `start` waits, directly or through others, for `goal`."""
        for request in self.queue:
            if request.owner == start:
                for other in self.in_the_way(start, request.resource, request.mode):
                    if other == goal:
                        return True
                    if other not in seen:
                        seen.add(other)
                        if self._reaches(other, goal, seen):
                            return True
        return False


def conflict(resource: Resource, one: Any, other: Any) -> bool:
    """Whether two sessions cannot have these modes of one lock together."""
    if resource[0] == "table":
        return other in CONFLICTS[LockMode(one)]
    if resource[0] == "row":
        return other in _ROW_CONFLICTS[RowLockMode(one)]
    return ALONE in (one, other)
