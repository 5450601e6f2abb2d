"""The primary and its standbys: the choice of a node, and what this process learns about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import IsolationLevel
from pgtoolset._postgres.discards import replace_pool
from pgtoolset._postgres.nodes import NodeState, Position
from pgtoolset._postgres.sqlstates import RETRYABLE, breaks_connection, sqlstate_of
from pgtoolset._units import UnitOfWork
from pgtoolset.errors import DeadlineExceededError, TransactionStateError
from pgtoolset.protocols import SessionFactory
from pgtoolset.replicas._opening import FRESH, Opening, Verdict, close, judge
from pgtoolset.replicas._standbys import Standby, choose

__all__ = ["Fleet", "Plan"]

S = TypeVar("S", bound=AsyncSession)

#: Connections to the primary for one block. The second may have been opened shortly before the
#: move, when another block had the pool replaced already.
_MOST_TRIES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What a read block asks for.

    Attributes:
        isolation_level: of the transaction; `None` leaves the server's default.
        has_token: whether the reader has given a token.
        wanted: its position; `None` without one, and where the text is no token.
        on_primary: whether no standby will do.
    """

    isolation_level: IsolationLevel | None
    has_token: bool
    wanted: Position | None
    on_primary: bool


class Fleet(Generic[S]):
    """The nodes of a `ReadReplicas`."""

    def __init__(
        self,
        primary: SessionFactory[S],
        standbys: Sequence[SessionFactory[S]],
        max_wait: float,
    ) -> None:
        self._primary = primary
        self._standbys = [
            Standby(f"standbys[{number}]", each) for number, each in enumerate(standbys)
        ]
        self._max_wait = max_wait
        self._turn = 0
        self._newest: Position | None = None
        self._learned = float("-inf")

    def learn(self, position: Position) -> None:
        """Note a position that a primary has shown: its cluster, and its timeline."""
        self._learned = time.monotonic()
        newest = self._newest
        if newest is None or newest.system != position.system:
            self._newest = position
        elif position.timeline > newest.timeline:
            self._newest = position

    def is_past(self, position: Position) -> bool:
        """Whether a position is not on the timeline of the primary, as far as that is known."""
        newest = self._newest
        return newest is not None and (
            position.system != newest.system or position.timeline < newest.timeline
        )

    async def open(self, plan: Plan) -> tuple[UnitOfWork[S], Standby[S] | None]:
        """Return an open unit of work, and its standby, whose open block is counted.

        Without a standby it is on the primary.
        """
        behind: Standby[S] | None = None
        if not plan.on_primary:
            self._probe()
            tried: set[Standby[S]] = set()
            while behind is None and (standby := self._choice(plan.wanted, tried)) is not None:
                tried.add(standby)
                unit, verdict = await self._open_on(standby, plan)
                if unit is not None:
                    return unit, standby
                if verdict is Verdict.NOT_YET:
                    behind = standby  # the time is up
        return await self._open_on_primary(plan, behind), None

    async def _open_on(
        self, standby: Standby[S], plan: Plan
    ) -> tuple[UnitOfWork[S] | None, Verdict | None]:
        opening = Opening(standby.session_maker, plan.isolation_level, plan.wanted, self._max_wait)
        standby.open_blocks += 1
        try:
            verdict = await self._try(standby, opening)
            if opening.unit is not None and not standby.shows_timeline:
                await self._check(plan, opening)
            return opening.unit, verdict
        finally:
            if opening.unit is None:
                standby.open_blocks -= 1

    async def _check(self, plan: Plan, opening: Opening[S]) -> None:
        """Close an open block on a standby where the token is not of the timeline of the primary.

        Nothing read there would be stale: the standby has all of that timeline that was not lost.
        But whose token it is reads on the primary. Where a standby hides its stream, the
        primary is asked for its timeline, once a second.
        """
        if plan.wanted is None:
            return
        unit, opening.unit = opening.unit, None
        assert unit is not None
        try:
            if self._learned + FRESH < time.monotonic():
                await self._ask_primary()
            if not self.is_past(plan.wanted):
                opening.unit = unit
        finally:
            if opening.unit is None:
                await close(unit)

    async def _ask_primary(self) -> None:
        opening = Opening(self._primary, None, looks=True)
        try:
            await opening.run_in_time()
        except Exception as error:
            if not _is_of_database(error):
                raise
        if opening.unit is not None:
            await close(opening.unit)
        state = opening.state
        if state is not None and not state.is_standby:
            self.learn(state.position)

    async def _open_on_primary(self, plan: Plan, behind: Standby[S] | None) -> UnitOfWork[S]:
        """Open on the primary.

        A connection may be older than a switchover, and reach a standby by now. So the node of a
        reader with a token is asked, and the pool replaces older connections.
        """
        for _ in range(_MOST_TRIES):
            opening = Opening(self._primary, plan.isolation_level, looks=plan.has_token)
            await opening.run()
            unit, state = opening.unit, opening.state
            assert unit is not None
            if state is None:
                return unit
            has_it = plan.wanted is not None and judge(state, plan.wanted) is Verdict.READY
            if not state.is_standby:
                self.learn(state.position)
                # Otherwise it is from the future, or of another timeline: no standby can have it.
                if behind is not None and has_it:
                    behind.note_behind()
                return unit
            if has_it:
                return unit
            await _replace(unit)
        raise TransactionStateError(
            "the primary of ReadReplicas is a standby, which has not replayed what the token says; "
            "make its engine with the address of the primary, such as a URL of several hosts with "
            "target_session_attrs"
        )

    def _choice(self, wanted: Position | None, tried: set[Standby[S]]) -> Standby[S] | None:
        self._turn += 1

        def is_suitable(standby: Standby[Any]) -> bool:
            return standby not in tried and (wanted is None or standby.may_have(wanted))

        return choose(self._standbys, self._turn, is_suitable) if self._standbys else None

    async def _try(self, standby: Standby[S], opening: Opening[S]) -> Verdict | None:
        """Open on a standby; `None` where it could not be asked, or was interrupted."""
        began = time.monotonic()
        failure: BaseException | None = None
        verdict: Verdict | None = None
        try:
            verdict = await opening.run_in_time()
        except Exception as error:
            if not _is_of_database(error):
                raise
            if sqlstate_of(error) in RETRYABLE:
                return None  # a conflict with recovery
            failure = error
        if opening.state is not None:
            self._note(standby, opening.state)
        # Where others have had answers meanwhile, its pool is exhausted, and it is not away.
        if verdict is None and standby.answered < began:
            standby.note_away(failure)
        elif verdict is Verdict.READY:
            standby.note_replayed()
        return verdict

    def _note(self, standby: Standby[Any], state: NodeState) -> None:
        position = state.position
        standby.note_present(position)
        standby.shows_timeline = state.is_newest
        newest = self._newest
        if newest is not None and newest.system == position.system:
            if newest.timeline < position.timeline:
                self._newest = position

    def _probe(self) -> None:
        """Ask the standbys that are away, beside the request, where their time has come."""
        for standby in self._standbys:
            if standby.wants_probe:
                standby.probe(self._ask(standby))

    async def _ask(self, standby: Standby[S]) -> None:
        opening = Opening(standby.session_maker, None, looks=True)
        try:
            await opening.run_in_time()
        except Exception as error:
            standby.note_away(error)
            return
        if opening.unit is not None:
            await close(opening.unit)
        if opening.state is not None:
            self._note(standby, opening.state)
        else:
            standby.note_away(None)


async def _replace(unit: UnitOfWork[Any]) -> None:
    """Close a unit of work; the pool replaces its connection, and all that are as old."""
    try:
        connection = await unit.session.connection()
        await connection.run_sync(replace_pool)
        await connection.invalidate()
    finally:
        await close(unit)


def _is_of_database(error: Exception) -> bool:
    """Whether an error says that a node cannot be used, not a fault of the program."""
    if isinstance(error, DeadlineExceededError):
        return False  # of the caller
    if isinstance(error, OSError | DBAPIError | PoolTimeoutError):  # a TimeoutError is an OSError
        return True
    own = type(error).__name__ == "InterfaceError" or breaks_connection(error)
    return own or sqlstate_of(error) is not None
