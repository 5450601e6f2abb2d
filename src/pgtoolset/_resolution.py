"""The outcome of a COMMIT whose answer was lost, found out by asking PostgreSQL; never guessed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._cancellation import Requests, uninterrupted
from pgtoolset._postgres.commit_status import Trace, confirm, end_backend, look
from pgtoolset._postgres.connections import terminate
from pgtoolset._postgres.outside import outside_connection
from pgtoolset._postgres.sqlstates import driver_error, refuses_commit

logger = logging.getLogger("pgtoolset")

#: Seconds between two questions: the first pause, which doubles up to the last.
_PAUSES = (0.02, 0.5)


class Verdict(Enum):
    """What became of a transaction."""

    STORED = auto()
    LOST = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Resolution:
    """What became of a transaction, and where that is unknown, why."""

    verdict: Verdict
    reason: str = ""


_STORED = Resolution(Verdict.STORED)
_LOST = Resolution(Verdict.LOST)


def _unknown(reason: str) -> Resolution:
    return Resolution(Verdict.UNKNOWN, reason)


async def resolve(engine: Engine, trace: Trace, timeout: float) -> Resolution:
    """Ask PostgreSQL what became of a transaction, whatever cancels the caller meanwhile.

    Args:
        engine: the engine of the connection that was lost.
        trace: the notes that were made before the COMMIT.
        timeout: seconds.
    """
    if trace.xid is None:
        return _STORED  # it has written nothing, so there was nothing to lose
    if trace.refused is not None:
        return _unknown(f"the role may not call {trace.refused}")
    try:
        return await uninterrupted(_Inquiry(engine, trace, timeout).run())
    except asyncio.CancelledError:  # of the task inside: the event loop is being closed
        return _unknown("the program ends")


class _Inquiry:
    """Asks over connections of its own, made as the engine makes them, until one can answer.

    Attributes:
        reason: why there is no answer yet.
    """

    def __init__(self, engine: Engine, trace: Trace, timeout: float) -> None:
        self._engine = engine
        self._trace = trace
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self.reason = "no server has answered"

    async def run(self) -> Resolution:
        loop = asyncio.get_running_loop()
        requests = Requests()
        for pause in _pauses():
            try:
                async with asyncio.timeout_at(self._deadline):
                    found = await self._connect_and_ask()
                if found is not None:
                    return found
            except Exception as error:
                if loop.time() >= self._deadline:
                    break
                self._note(error)
                if refuses_commit(error):  # an answer, which will be the same again
                    return _unknown(self.reason)
            if loop.time() + pause >= self._deadline:
                break
            await asyncio.sleep(pause)
            requests.raise_swallowed()
        return _unknown(f"{self.reason} within {self._timeout:g} s")

    def _note(self, error: Exception) -> None:
        # Without its traceback, whose lines may hold a password.
        failure = driver_error(error)
        reason = f"the server did not answer ({type(failure).__name__})"
        if reason != self.reason:
            logger.warning(
                "asking for the outcome of a COMMIT has failed: %s: %s",
                type(failure).__name__,
                failure,
            )
        self.reason = reason

    async def _connect_and_ask(self) -> Resolution | None:
        """Ask over a new connection; `None` where another one may know more."""
        async with outside_connection(self._engine) as connection:
            # A connection that is closed in time does not wait for a frozen server.
            sync = connection.sync_connection
            assert sync is not None  # it is open
            timer = asyncio.get_running_loop().call_at(self._deadline, terminate, sync)
            try:
                return await self._ask(connection)
            finally:
                timer.cancel()

    async def _ask(self, connection: AsyncConnection) -> Resolution | None:
        has_waited = False
        for pause in _pauses():
            seen = await look(connection, self._trace)
            if seen.difference is not None:
                return _unknown(seen.difference)
            if seen.is_standby:
                self.reason = "only a standby has answered"
                return None
            if seen.status == "committed":
                if seen.has_standbys and self._trace.waits_for_standbys:
                    await self._confirm(connection)
                return _STORED
            if seen.status == "aborted":
                return _LOST
            if seen.status != "in progress":
                return _unknown("the server does not remember that transaction any more")
            self.reason = "the COMMIT has not ended"
            if has_waited:  # at the first look it may be ending already
                await self._end_backend(connection)
            has_waited = True
            await asyncio.sleep(pause)
        raise AssertionError

    async def _confirm(self, connection: AsyncConnection) -> None:
        """Wait for the synchronous standbys, as the COMMIT did whose answer was lost."""
        self.reason = "no synchronous standby has confirmed the COMMIT"
        await confirm(connection, self._trace)

    async def _end_backend(self, connection: AsyncConnection) -> None:
        """End the backend, whose COMMIT could still happen; where that is refused, it is waited
        for.
        """
        try:
            await end_backend(connection, self._trace)
        except DBAPIError as error:
            if connection.invalidated:
                raise
            logger.warning(
                "the backend of a COMMIT whose answer was lost cannot be ended: %s",
                driver_error(error),
            )


def _pauses() -> Iterator[float]:
    pause, longest = _PAUSES
    while True:
        yield pause
        pause = min(longest, 2 * pause)
