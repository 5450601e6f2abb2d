"""Which waiters of `wait_for_row_change` poll when: queues, and the share of a pool that they use.

A waiter whose poll is due joins the queue of its engine, model and columns. When it is the queue's
turn, the first waiter takes a connection and polls, in its own task, for as many of the queue as
one statement serves. If that waiter is cancelled, those behind it keep their places. The queues of
a pool take turns, each with one connection, and together use half of the pool at most. So other
users of the pool find a connection, and no waiter overtakes another.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool, Pool, QueuePool

from pgtoolset.watch._batches import BatchPoll, Entry, as_own_error
from pgtoolset.watch._polls import RowQuery

__all__ = ["PollQueue", "joined_queue"]

#: Times within an interval at which waiters poll. Waiters that share a time share a statement.
POLL_TIMES = 10

#: Connections for polls where the pool itself has no limit.
UNLIMITED_POOL_SHARE = 5


@contextmanager
def joined_queue(query: RowQuery) -> Iterator[PollQueue]:
    """Yield the queue for a query over a pool, and keep it while the block runs."""
    assert isinstance(query.bind, Engine)
    share = _share_of(query.bind.pool, asyncio.get_running_loop())
    queue = share.queue(query)
    query.selects = queue.selects
    queue.waiters += 1
    try:
        yield queue
    finally:
        queue.waiters -= 1


class PollQueue:
    """The waiters for rows of one model and the same columns, over one engine, with equal options
    and equal settings.

    Attributes:
        waiters: how many may join again, sleeping ones included.
        selects: the statements of them all.
        options: the execution options of the first.
    """

    def __init__(self, share: PoolShare, first: RowQuery) -> None:
        assert isinstance(first.bind, Engine)
        self.waiters = 0
        self.engine = first.bind
        self.selects = first.selects
        self.options = first.options
        self._share = share
        self._loop = share.loop
        self._origin = self._loop.time()
        self._entries: deque[Entry] = deque()
        self._has_requested_turn = False
        self._leader: Entry | None = None
        self._turn_began_at = -math.inf
        self._problem: Exception | None = None

    def next_poll_at(self, last: float, interval: float) -> float:
        """Return when to poll again: an interval after `last`, or a little earlier with others."""
        step = interval / POLL_TIMES
        # A time that is a multiple of the step already may differ from it by a rounding error.
        return self._origin + math.floor((last + interval - self._origin) / step + 1e-3) * step

    async def poll(self, query: RowQuery, deadline: float) -> Any:
        """Return the row as a detached instance, or `None`, when it is this waiter's turn."""
        now = self._loop.time()
        entry = Entry(query, deadline, now, self._loop.create_future())
        self._entries.append(entry)
        self._request_turn()
        timers: list[asyncio.TimerHandle] = []
        if entry.is_waiting and deadline < math.inf:
            self._give_up_later(entry.give_up_at(now), entry, timers)
        try:
            await entry.woken
            if self._leader is entry:
                await self._lead(entry)
            return entry.result()
        finally:
            for timer in timers:
                timer.cancel()
            if self._leader is entry:
                self._leader = None
                self._request_turn()
                # Later, so that a caller that waits for the pool gets the connection that has just
                # been returned.
                self._loop.call_soon(self._share.end_turn)

    def start_turn(self) -> bool:
        """Have the first waiter lead; return `False` where no waiter is left."""
        self._has_requested_turn = False
        while self._entries:
            entry = self._entries.popleft()
            if entry.is_waiting:
                self._leader, self._turn_began_at = entry, self._loop.time()
                entry.wake()
                return True
        return False

    def take(self, most: int) -> list[Entry]:
        entries: list[Entry] = []
        while self._entries and len(entries) < most:
            entry = self._entries.popleft()
            if entry.is_waiting:
                entries.append(entry)
        return entries

    def put_back(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.is_answered:
                entry.wake()
        self._entries.extendleft(entry for entry in reversed(entries) if entry.is_waiting)

    def progressed(self) -> None:
        self._problem = None
        self._share.progressed_at = self._loop.time()

    def failed(self, error: Exception, began_at: float) -> None:
        self._problem = error
        if isinstance(error, PoolTimeoutError):
            self._share.fail_holders(error, began_at)

    def fail_holders(self, error: PoolTimeoutError, began_at: float) -> None:
        """Fail the waiters whose own sessions hold connections of the exhausted pool."""
        for entry in self._entries:
            waited = entry.is_waiting and entry.joined_at <= began_at
            if waited and entry.query.holds_pool_connection():
                entry.answer(None, copy.copy(error))
                entry.wake()

    def _request_turn(self) -> None:
        if self._entries and self._leader is None and not self._has_requested_turn:
            self._has_requested_turn = True
            self._share.request_turn(self)

    async def _lead(self, entry: Entry) -> None:
        if self.waiters > 1:
            await asyncio.sleep(0)  # so that waiters whose polls are due at the same time join
        await BatchPoll(self, entry).run()

    def _give_up_later(self, at: float, entry: Entry, timers: list[asyncio.TimerHandle]) -> None:
        timers[:] = [self._loop.call_at(at, self._give_up, entry, timers)]

    def _give_up(self, entry: Entry, timers: list[asyncio.TimerHandle]) -> None:
        """End a waiter whose deadline has passed, unless waiters before it make progress."""
        if not entry.is_waiting:
            return
        progressed_at = self._share.progressed_at
        if self._leader is not None:
            # Progress of other queues does not count while this one is stuck in a turn.
            progressed_at = min(progressed_at, self._turn_began_at)
        if self._loop.time() < entry.give_up_at(progressed_at):
            self._give_up_later(entry.give_up_at(progressed_at), entry, timers)
        else:
            problem = self._problem or TimeoutError("no waiter before this one was served")
            entry.answer(None, as_own_error(problem))
            entry.wake()


class PoolShare:
    """The connections of a pool that polls may use at a time, and the queues that take turns.

    There is one for each pool and event loop.

    Attributes:
        progressed_at: when a waiter was last answered.
    """

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = pool
        self.loop = loop
        self.progressed_at = loop.time()
        self._queues: WeakValueDictionary[Any, PollQueue] = WeakValueDictionary()
        self._requests: deque[PollQueue] = deque()
        self._free = _size_of_share(pool)

    def queue(self, query: RowQuery) -> PollQueue:
        """Return the queue of an engine, model, columns, execution options and settings."""
        target = query.target
        options = _hashable(query.options)
        id_ = (query.bind, target.mapper, target.columns, options, query.settings)
        queue = self._queues.get(id_)
        if queue is None:
            queue = self._queues[id_] = PollQueue(self, query)
        return queue

    def request_turn(self, queue: PollQueue) -> None:
        """Start a turn of the queue after the turns that were requested before."""
        self._requests.append(queue)
        self._start_turns()

    def end_turn(self) -> None:
        """Note that a turn has returned its connection to the pool."""
        self._free += 1
        self._start_turns()

    def fail_holders(self, error: PoolTimeoutError, began_at: float) -> None:
        """Fail the waiters that hold connections of the pool: more time cannot help them."""
        for queue in list(self._queues.values()):
            queue.fail_holders(error, began_at)

    def _start_turns(self) -> None:
        while self._free and self._requests:
            if self._requests.popleft().start_turn():
                self._free -= 1


#: By the identities of pool and event loop. A share keeps both alive, its queues keep the share
#: alive, and their waiters keep the queues.
_shares: WeakValueDictionary[tuple[int, int], PoolShare] = WeakValueDictionary()


def _share_of(pool: Pool, loop: asyncio.AbstractEventLoop) -> PoolShare:
    id_ = (id(pool), id(loop))
    share = _shares.get(id_)
    if share is None:
        share = _shares[id_] = PoolShare(pool, loop)
    return share


def _hashable(value: Any) -> Any:
    """Return a key that equal options share. A queue keeps them, so an `id` stays unique."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(each)) for name, each in value.items())
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value


def _size_of_share(pool: Pool) -> int:
    """Return half of the connections that the pool keeps, and at least one."""
    if isinstance(pool, QueuePool):
        return max(1, pool.size() // 2) if pool.size() else UNLIMITED_POOL_SHARE
    return UNLIMITED_POOL_SHARE if isinstance(pool, NullPool) else 1
