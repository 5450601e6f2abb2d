"""The block of `ReadReplicas.read`: one READ ONLY transaction, from its opening to its end."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._record import record_of
from pgtoolset._units import UnitOfWork
from pgtoolset.errors import CommitUnknownError, TransactionStateError
from pgtoolset.replicas._fleet import Fleet, Plan
from pgtoolset.replicas._marks import was_refused
from pgtoolset.replicas._opening import close
from pgtoolset.replicas._standbys import Standby

__all__ = ["ReadBlock"]

logger = logging.getLogger("pgtoolset")

S = TypeVar("S", bound=AsyncSession)


class ReadBlock(AbstractAsyncContextManager[S]):
    """One READ ONLY transaction on one node.

    A class, as all blocks here: one that is dropped in its middle is collected, while the event
    loop would first run a generator to its end.
    """

    __slots__ = ("_fleet", "_plan", "_standby", "_unit")

    def __init__(self, fleet: Fleet[S], plan: Plan) -> None:
        self._fleet = fleet
        self._plan = plan
        self._standby: Standby[Any] | None = None
        self._unit: UnitOfWork[S] | None = None

    @property
    def is_on_standby(self) -> bool:
        """Whether the open block is on a standby."""
        return self._standby is not None

    async def __aenter__(self) -> S:
        if self._unit is not None:
            raise TransactionStateError(
                "this read block is open already; call read() again for a block of its own"
            )
        self._unit, self._standby = await self._fleet.open(self._plan)
        return self._unit.session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unit, self._unit = self._unit, None
        if unit is None:
            return
        try:
            if exc_type is None:
                await _end(unit)
        finally:
            self._leave_standby()
            await close(unit)

    def __del__(self) -> None:
        # A block that was dropped is not open on its standby any more.
        self._leave_standby()

    def _leave_standby(self) -> None:
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.open_blocks -= 1


async def _end(unit: UnitOfWork[Any]) -> None:
    sync = unit.session.sync_session
    if was_refused(sync):
        return  # its one transaction has ended
    has_callbacks = bool(record_of(sync).callbacks)
    try:
        await unit.commit()
    except CommitUnknownError:
        if has_callbacks:
            raise
        # A transaction that has written nothing has nothing to lose.
        logger.debug("the connection of a read block was lost at its end", exc_info=True)
