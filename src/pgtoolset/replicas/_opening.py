"""Open a read block on a node: connect, wait until it has replayed a position, begin the snapshot.

Everything happens on the connection that the block will use. In READ COMMITTED each statement has a
snapshot of its own, so the wait is a part of the transaction. With any other isolation level the
first statement takes the snapshot, and one that begins while the node is still asked may be too
old: the wait has a transaction of its own then.
"""

from __future__ import annotations

import asyncio
import time
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from pgtoolset._arguments import IsolationLevel, sync_session
from pgtoolset._cancellation import uninterrupted
from pgtoolset._observers import forget_transaction
from pgtoolset._postgres.connections import has_one_backend, is_closed, raw_at
from pgtoolset._postgres.nodes import NodeState, Position, look, look_again
from pgtoolset._units import UnitOfWork
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import SessionFactory
from pgtoolset.replicas._marks import mark, unmark

__all__ = ["Opening", "Verdict", "judge"]

S = TypeVar("S", bound=AsyncSession)

#: Seconds that a node may take to connect, and to answer: then another one is read from.
ANSWER_TIMEOUT = 1.0

#: Seconds after which a node that has not answered is given up, beside the requests.
GIVE_UP = 5.0

#: Seconds for which the last answer of a node on a connection counts. All that it had
#: replayed then is there; but it may be gone.
FRESH = 1.0

#: Seconds between two looks: the first pause, which doubles, and the longest.
FIRST_PAUSE = 0.001
LONGEST_PAUSE = 0.02

#: In the `info` of a connection: the last answer of its node, and when that was.
_SEEN = "pgtoolset.replicas.seen"

_WITH_ONE_SNAPSHOT = ("REPEATABLE READ", "SERIALIZABLE")


class Verdict(Enum):
    """Whether a node can serve a position."""

    READY = auto()
    #: It has not replayed it yet.
    NOT_YET = auto()
    #: It never will: its cluster or its timeline is another one.
    ELSEWHERE = auto()


def judge(state: NodeState, wanted: Position) -> Verdict:
    """Return whether a node can serve a position.

    The timeline of a standby is a lower limit: one that its history passes through. While that
    is older than the wanted one, the same LSN may be in the work of a primary that was lost, and
    says nothing.
    """
    if state.system != wanted.system or state.timeline > wanted.timeline:
        return Verdict.ELSEWHERE
    if state.timeline < wanted.timeline:
        return Verdict.NOT_YET if state.is_standby else Verdict.ELSEWHERE
    return Verdict.READY if state.lsn >= wanted.lsn else Verdict.NOT_YET


class Opening(Generic[S]):
    """One try to open a read block on one node.

    Args:
        session_maker: makes the sessions of the node.
        isolation_level: of the transaction; `None` leaves the server's default.
        wanted: the position that the node must have replayed.
        max_wait: seconds to wait for it, from the node's first answer on.
        looks: whether the node is asked for its state, in any case or in none; `None` asks unless
            its last answer is enough.

    Attributes:
        unit: the unit of work, once it is open.
        state: what the node has said of itself, where it was asked.
    """

    def __init__(
        self,
        session_maker: SessionFactory[S],
        isolation_level: IsolationLevel | None,
        wanted: Position | None = None,
        max_wait: float = 0.0,
        *,
        looks: bool | None = None,
    ) -> None:
        self.unit: UnitOfWork[S] | None = None
        self.state: NodeState | None = None
        self._session_maker = session_maker
        self._options: dict[str, Any] = {"postgresql_readonly": True}
        if isolation_level is not None:
            self._options["isolation_level"] = isolation_level
        self._wanted = wanted
        self._max_wait = max_wait
        self._looks = looks
        self._is_abandoned = False
        self._answer: asyncio.Future[None] | None = None

    async def run(self) -> Verdict:
        """Open the block and return `READY`; whatever else happens, the session is closed."""
        unit = UnitOfWork(self._session_maker)
        sync = sync_session(unit.session)
        try:
            mark(sync)
            await unit.begin()
            verdict = await greenlet_spawn(self._enter, sync)
            if verdict is Verdict.READY and not self._is_abandoned:
                self.unit = unit
        finally:
            if self.unit is None:
                await close(unit)
        return verdict

    async def run_in_time(self) -> Verdict | None:
        """Do the same, with `None` where the node does not answer in time.

        Connecting goes on beside the caller then: so a pool that is empty is filled, and the
        caller need not wait until the server has answered that it need not answer.
        """
        loop = asyncio.get_running_loop()
        self._answer = answer = loop.create_future()
        task = loop.create_task(self._run_and_give_up())
        try:
            await asyncio.wait(
                [task, answer], timeout=ANSWER_TIMEOUT, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done() and not task.done():
                await asyncio.wait([task], timeout=self._max_wait + ANSWER_TIMEOUT)
        except BaseException:
            task.cancel()
            await uninterrupted(self._end(task))
            raise
        if task.done():
            return task.result()
        self._is_abandoned = True
        task.add_done_callback(_forget)
        _abandoned.add(task)
        return None

    async def _run_and_give_up(self) -> Verdict:
        async with asyncio.timeout(GIVE_UP + self._max_wait):
            return await self.run()

    async def _end(self, task: asyncio.Task[Verdict]) -> None:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # or asyncio logs that it was never retrieved
        unit, self.unit = self.unit, None
        if unit is not None:
            await close(unit)

    def _enter(self, sync: Session) -> Verdict:
        if isinstance(sync.get_bind(), Connection):
            raise TransactionStateError(
                "a read block needs sessions that are bound to an engine: this one is bound to a "
                "connection, whose transaction may be another's"
            )
        connection = sync.connection(execution_options=self._options)
        looks = self._looks
        if looks is None:
            looks = not self._is_known_to_be_ready(connection)
        return self._wait(connection) if looks else Verdict.READY

    def _is_known_to_be_ready(self, connection: Connection) -> bool:
        seen = _seen_on(connection)
        if seen is None or is_closed(raw_at(connection.connection)):
            return False
        return self._wanted is None or judge(seen[0], self._wanted) is Verdict.READY

    def _wait(self, connection: Connection) -> Verdict:
        deadline: float | None = None
        pause = FIRST_PAUSE
        ready: str | None = None
        while True:
            state = self._look(connection)
            verdict = Verdict.READY if self._wanted is None else judge(state, self._wanted)
            is_too_early = state.isolation_level in _WITH_ONE_SNAPSHOT and self._wanted is not None
            if verdict is Verdict.READY and (not is_too_early or ready == state.server):
                return verdict
            if verdict is Verdict.ELSEWHERE:
                return verdict
            if is_too_early:
                # The next statement begins another transaction of the same kind.
                forget_transaction(connection.connection.record_info)
                connection.dialect.do_rollback(connection.connection)
            if verdict is Verdict.READY:
                if has_one_backend(connection):
                    return verdict
                # A pooler may pass the next transaction to another server.
                ready = state.server
                continue
            now = time.monotonic()
            deadline = deadline or now + self._max_wait
            if now >= deadline:
                return verdict
            await_only(asyncio.sleep(min(pause, deadline - now)))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _look(self, connection: Connection) -> NodeState:
        seen = None if self._looks else _seen_on(connection)
        if seen is not None and seen[0].is_standby:
            state, looked = look_again(connection, seen[0]), seen[1]
        else:
            state, looked = look(connection), time.monotonic()
        connection.info[_SEEN] = (state, looked)
        self.state = state
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
        return state


def _seen_on(connection: Connection) -> tuple[NodeState, float] | None:
    """Return the last answer of the server of a connection, and when it was asked for everything.

    `None` where that is too long ago. What a server has replayed it keeps, but behind a pooler the
    connection may have another server by now.
    """
    seen: tuple[NodeState, float] | None = connection.info.get(_SEEN)
    if seen is None or seen[1] + FRESH < time.monotonic() or not has_one_backend(connection):
        return None
    return seen


async def close(unit: UnitOfWork[Any]) -> None:
    """Close the session of a read block."""
    try:
        await unit.close()
    finally:
        unmark(sync_session(unit.session))


#: Tries without a waiter. The event loop refers to its tasks weakly.
_abandoned: set[asyncio.Task[Any]] = set()


def _forget(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # the standby is left out already
