"""One poll for many waiters: a waiter of a queue answers for itself and for those behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, Engine

from pgtoolset._text import safe
from pgtoolset.watch._polls import PollTimeout, RowQuery, is_lost, poll_on_pool

__all__ = ["LAST_POLL_TIMEOUT", "BatchPoll", "Entry", "EntrySource", "as_own_error"]

#: Seconds that the last poll may take after the deadline of its waiter.
LAST_POLL_TIMEOUT = 1.0

#: Waiters that poll over one connection before it returns to the pool.
BATCH_SIZE = 128


class Entry:
    """A waiter in a queue, whose poll is due.

    Attributes:
        deadline: the time of the event loop at which the waiter's timeout passes.
        joined_at: when it joined the queue.
        woken: done when the waiter has to go on, because it leads or because it has its answer.
    """

    def __init__(
        self, query: RowQuery, deadline: float, now: float, woken: asyncio.Future[None]
    ) -> None:
        self.query = query
        self.deadline = deadline
        self.joined_at = now
        self.woken = woken
        self.is_answered = False
        self._row: Any = None
        self._error: Exception | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the waiter is still there, and has not been woken."""
        return not self.woken.done()

    def give_up_at(self, now: float) -> float:
        """Return when a poll that begins `now` has taken too long."""
        return max(now, self.deadline) + LAST_POLL_TIMEOUT

    def answer(self, row: Any, error: Exception | None = None) -> None:
        """Keep the answer for `result`."""
        self.is_answered, self._row, self._error = True, row, error

    def wake(self) -> None:
        if self.is_waiting:
            self.woken.set_result(None)

    def result(self) -> Any:
        """Return the row, or raise the error that answered the poll."""
        if self._error is not None:
            raise self._error
        return self._row


class EntrySource(Protocol):
    """The queue whose waiters a batch serves."""

    engine: Engine

    def take(self, most: int) -> list[Entry]:
        """Remove entries from the front."""
        ...

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Wake the entries that have an answer, and return the others to the front."""
        ...

    def progressed(self) -> None:
        """Note that a waiter was answered."""
        ...

    def failed(self, error: Exception, began_at: float) -> None:
        """Note that a poll that began at that time got no connection."""
        ...


class BatchPoll:
    """A poll by the first waiter of a queue, for itself and others. Satisfies `Batch`."""

    def __init__(self, queue: EntrySource, leader: Entry) -> None:
        self._queue = queue
        self._leader = leader
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        give_up_at = leader.give_up_at(self._began_at)
        self._timeout = PollTimeout(give_up_at, leader.query.pool_timeout)
        self._entries: dict[RowQuery, Entry] = {}

    async def run(self) -> None:
        """Poll; the answers are in the entries afterwards, an error of the whole poll included."""
        try:
            await self._timeout.run(poll_on_pool, self._queue.engine, self)
        except Exception as error:
            self._failed(error)
        finally:
            self._queue.put_back(list(self._entries.values()))

    def connected(self) -> Sequence[RowQuery]:
        entries = (self._leader, *self._queue.take(BATCH_SIZE - 1))
        self._entries = {entry.query: entry for entry in entries}
        return list(self._entries)

    def sending(self, connection: Connection) -> None:
        now = self._loop.time()
        for query, entry in self._entries.items():
            if not entry.is_answered:
                query.sent_at = now
        self._timeout.sending(connection)

    def answered(self, query: RowQuery, row: Any, error: Exception | None = None) -> None:
        self._entries[query].answer(row, error)
        self._queue.progressed()

    def _failed(self, error: Exception) -> None:
        if not self._leader.is_answered:
            self._leader.answer(None, error)
        if not self._entries:
            self._queue.failed(error, self._began_at)
        elif is_lost(error) and self._loop.time() < self._timeout.give_up_at:
            # The others poll again for themselves. At the leader's own deadline the connection was
            # ended for its sake, so they only return to the queue.
            for entry in self._entries.values():
                if not entry.is_answered:
                    entry.answer(None, as_own_error(error))


def as_own_error(error: Exception) -> Exception:
    """Return an error for one more task.

    One exception that is raised in many tasks would collect the tracebacks of all.
    """
    own = ConnectionError(safe(f"{type(error).__name__}: {error}"))
    own.__cause__ = error
    return own
