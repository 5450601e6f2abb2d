"""Whose turn it is to look: the polls of a pool stand in lines, go a few at a time, and take others
along.

A waiter whose poll is due takes its place in the line of its engine, model and columns. When the
line has its turn, the waiter in front takes a connection and looks, in its own task, for as many of
the line as one statement looks at. If it is cancelled, those behind it keep their places. The lines
of a pool have their turns in order, one connection each, and together never more than half of the
pool's; so whoever else wants a connection finds one, and no waiter is overtaken.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool, Pool, QueuePool

from pgtoolset.watch._looks import Look, Patience, is_lost, look_together
from pgtoolset.watch.targets import Target

__all__ = ["GRACE", "Line", "in_line"]

#: Seconds that the last look may take, past the deadline.
GRACE = 1.0

#: Waiters who look over one connection before it is given back.
BATCH = 128

#: Moments of an interval at which waiters look; those who share one share a statement.
MOMENTS = 10

#: Connections for polls, where the pool sets no limit to anybody.
UNLIMITED = 5


@contextmanager
def in_line(look: Look) -> Iterator[Line]:
    """The line for a look at what the pool's connections show, for as long as somebody waits
    there."""
    assert isinstance(look.bind, Engine)
    turns = _turns_of(look.bind.pool, asyncio.get_running_loop())
    line = turns.line(look.bind, look.target)
    line.waiters += 1
    try:
        yield line
    finally:
        line.waiters -= 1


class Place:
    """A waiter's place in a line. Its future is done when it is told: to lead, or that it has its
    answer."""

    def __init__(self, look: Look, deadline: float, now: float, told: asyncio.Future[None]) -> None:
        self.look = look
        self.deadline = deadline
        self.since = now
        self.told = told
        self.is_answered = False
        self._row: Any = None
        self._error: Exception | None = None

    @property
    def is_taken(self) -> bool:
        """Whether somebody still stands here, and has not been told anything."""
        return not self.told.done()

    def over(self, now: float) -> float:
        """When a look that begins now is given up."""
        return max(now, self.deadline) + GRACE

    def answer(self, row: Any, error: Exception | None = None) -> None:
        self.is_answered, self._row, self._error = True, row, error

    def tell(self) -> None:
        if self.is_taken:
            self.told.set_result(None)

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._row


class Line:
    """Those who wait for rows of one model, and of the same columns."""

    def __init__(self, turns: Turns, bind: Engine) -> None:
        self.waiters = 0
        self.bind = bind
        self._turns = turns
        self._loop = turns.loop
        self._origin = self._loop.time()
        self._queue: deque[Place] = deque()
        self._is_standing = False
        self._leader: Place | None = None
        self._began = -math.inf
        self._trouble: Exception | None = None

    def next_moment(self, after: float, interval: float) -> float:
        """When to look again: one interval after `after`, or a little earlier, when others look
        too."""
        moment = interval / MOMENTS
        # What stands at a moment already comes out a tiny fraction beside it.
        return self._origin + math.floor((after + interval - self._origin) / moment + 1e-3) * moment

    async def look(self, look: Look, deadline: float) -> Any:
        """The row as a detached instance, or `None`."""
        now = self._loop.time()
        place = Place(look, deadline, now, self._loop.create_future())
        self._queue.append(place)
        self._stand()
        alarm: list[asyncio.TimerHandle] = []
        if place.is_taken and deadline < math.inf:
            self._expire_at(place.over(now), place, alarm)
        try:
            await place.told
            if self._leader is place:
                await self._lead(place)
            return place.result()
        finally:
            for handle in alarm:
                handle.cancel()
            if self._leader is place:
                self._leader = None
                self._stand()
                # Not before whoever else waits for the connection that was just given back has
                # taken it.
                self._loop.call_soon(self._turns.give_back)

    def start(self) -> bool:
        """It is this line's turn: have the waiter in front lead. False where nobody stands here any
        more."""
        self._is_standing = False
        while self._queue:
            place = self._queue.popleft()
            if place.is_taken:
                self._leader, self._began = place, self._loop.time()
                place.tell()
                return True
        return False

    def take(self, most: int) -> list[Place]:
        """Those in front, who are looked for now."""
        places: list[Place] = []
        while self._queue and len(places) < most:
            place = self._queue.popleft()
            if place.is_taken:
                places.append(place)
        return places

    def put_back(self, places: Sequence[Place]) -> None:
        """Give those their places back who have no answer, and tell the others."""
        for place in places:
            if place.is_answered:
                place.tell()
        self._queue.extendleft(place for place in reversed(places) if place.is_taken)

    def moved(self) -> None:
        self._trouble = None
        self._turns.moved = self._loop.time()

    def failed(self, error: Exception, began: float) -> None:
        """There was no connection for a turn that began at that time."""
        self._trouble = error
        if isinstance(error, PoolTimeoutError):
            self._turns.is_exhausted(error, began)

    def tell_who_are_in_their_own_way(self, error: PoolTimeoutError, began: float) -> None:
        for place in self._queue:
            if place.is_taken and place.since <= began and place.look.is_in_its_own_way():
                place.answer(None, copy.copy(error))
                place.tell()

    def _stand(self) -> None:
        if self._queue and self._leader is None and not self._is_standing:
            self._is_standing = True
            self._turns.stand(self)

    async def _lead(self, place: Place) -> None:
        if self.waiters > 1:
            await asyncio.sleep(0)  # those whose polls are due at the same moment come along
        await Turn(self, place).run()

    def _expire_at(self, over: float, place: Place, alarm: list[asyncio.TimerHandle]) -> None:
        alarm[:] = [self._loop.call_at(over, self._expire, place, alarm)]

    def _expire(self, place: Place, alarm: list[asyncio.TimerHandle]) -> None:
        """The time of `place` is up, unless others are being looked for and its turn is still to
        come."""
        if not place.is_taken:
            return
        moved = self._turns.moved if self._leader is None else min(self._turns.moved, self._began)
        if self._loop.time() < place.over(moved):
            self._expire_at(place.over(moved), place, alarm)
        else:
            place.answer(None, _told_to_others(self._trouble or TimeoutError("nobody's turn came")))
            place.tell()


class Turn:
    """A waiter who looks for itself and for others of its line. Satisfies `Round`."""

    def __init__(self, line: Line, place: Place) -> None:
        self._line = line
        self._leader = place
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._patience = Patience(place.over(self._began), place.look.pool_timeout)
        self._places: dict[Look, Place] = {}

    async def run(self) -> None:
        try:
            await self._patience.spawn(look_together, self._line.bind, self)
        except Exception as error:
            if not self._leader.is_answered:
                self._leader.answer(None, error)
            if not self._places:
                self._line.failed(error, self._began)
            elif is_lost(error) and self._loop.time() < self._patience.over:
                for place in self._places.values():
                    if not place.is_answered:
                        place.answer(None, _told_to_others(error))
        finally:
            self._line.put_back(list(self._places.values()))

    def connected(self) -> Sequence[Look]:
        self._places = {place.look: place for place in (self._leader, *self._line.take(BATCH - 1))}
        return list(self._places)

    def asking(self, connection: Connection) -> None:
        now = self._loop.time()
        for look, place in self._places.items():
            if not place.is_answered:
                look.at = now
        self._patience.asking(connection)

    def answered(self, look: Look, row: Any, error: Exception | None = None) -> None:
        self._places[look].answer(row, error)
        self._line.moved()


class Turns:
    """The connections of a pool that polls may have at a time, in one event loop, and the lines in
    turn."""

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = pool
        self.loop = loop
        self.moved = loop.time()
        self._lines: WeakValueDictionary[Any, Line] = WeakValueDictionary()
        self._standing: deque[Line] = deque()
        self._free = _share_of(pool)

    def line(self, bind: Engine, target: Target[Any]) -> Line:
        id_ = (bind, target.mapper, target.columns)
        line = self._lines.get(id_)
        if line is None:
            line = self._lines[id_] = Line(self, bind)
        return line

    def stand(self, line: Line) -> None:
        self._standing.append(line)
        self._go_on()

    def give_back(self) -> None:
        self._free += 1
        self._go_on()

    def is_exhausted(self, error: PoolTimeoutError, began: float) -> None:
        """The pool has no connection left: those who hold one themselves cannot be helped by
        waiting."""
        for line in list(self._lines.values()):
            line.tell_who_are_in_their_own_way(error, began)

    def _go_on(self) -> None:
        while self._free and self._standing:
            if self._standing.popleft().start():
                self._free -= 1


#: By the identities of pool and event loop, which are kept alive by what stands here, and that by
#: those who wait.
_all: WeakValueDictionary[tuple[int, int], Turns] = WeakValueDictionary()


def _turns_of(pool: Pool, loop: asyncio.AbstractEventLoop) -> Turns:
    id_ = (id(pool), id(loop))
    turns = _all.get(id_)
    if turns is None:
        turns = _all[id_] = Turns(pool, loop)
    return turns


def _share_of(pool: Pool) -> int:
    """Half of the connections that the pool keeps; one at least."""
    if isinstance(pool, QueuePool):
        return max(1, pool.size() // 2) if pool.size() else UNLIMITED
    return UNLIMITED if isinstance(pool, NullPool) else 1


def _told_to_others(error: Exception) -> Exception:
    """An error for one more task: one exception raised in many would collect the tracebacks of
    all."""
    told = ConnectionError(f"{type(error).__name__}: {error}")
    told.__cause__ = error
    return told
