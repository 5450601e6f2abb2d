"""The block of `get_transaction`: a transaction, a savepoint, or a block of a session of another
kind than SQLAlchemy's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, ClassVar, TypeVar
from weakref import ref

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    AUTOCOMMIT,
    NO_OPTIONS,
    Settings,
    TransactionOptions,
    check_atomic,
    check_bind,
    shown,
    sync_session_of,
)
from pgtoolset._callbacks import Callback, run_callbacks
from pgtoolset._cancellation import uninterrupted
from pgtoolset._commits import (
    commit_at_end,
    rolled_back_by_flush,
    stop_verifying,
    undo_failed_release,
    verify_commits,
)
from pgtoolset._compatibility import execute_of
from pgtoolset._lifecycle import abandon
from pgtoolset._listeners import checkout_of, listen_to_errors
from pgtoolset._outcomes import aborted_by, unknown_again
from pgtoolset._postgres.discards import discard, is_autocommit, is_open
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, sqlstate_of
from pgtoolset._record import SettingsLevel, innermost, note_driver_error, record_of
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import TransactionalSession

logger = logging.getLogger("pgtoolset")

S = TypeVar("S", bound=TransactionalSession)


class TransactionBlock(AbstractAsyncContextManager[S]):
    """Finds out on entering whether it is a transaction or a savepoint."""

    __slots__ = ("_block", "_options", "_session")

    _block: AbstractAsyncContextManager[Any]

    def __init__(self, session: S, options: TransactionOptions = NO_OPTIONS) -> None:
        self._session = session
        self._options = options

    async def __aenter__(self) -> S:
        self._block = _block_of(self._session, self._options)
        await self._block.__aenter__()
        return self._session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._block.__aexit__(exc_type, exc, traceback)


def _block_of(session: Any, options: TransactionOptions) -> AbstractAsyncContextManager[Any]:
    sync = sync_session_of(session)
    nested: bool = session.in_transaction()
    if options is not NO_OPTIONS:
        _check_applicable(options, session, sync, nested)
    if sync is None:
        return _ForeignBlock(session, nested)
    if nested:
        return _Savepoint(session, sync, options.settings)
    return _Transaction(session, sync, options)


def _check_applicable(
    options: TransactionOptions, session: object, sync: Session | None, nested: bool
) -> None:
    """Raise where the block cannot have the options that were given, before any SQL."""
    names = options.names()
    if nested and names:
        raise TransactionStateError(
            f"{', '.join(names)}: only an outermost transaction can have that, and the session is "
            "already in a transaction; end that transaction first, or open another session"
        )
    others = [name for name in names if name != "durable"]
    others += ["settings"] * (options.settings is not None)
    if sync is None and others:
        raise TypeError(
            f"{', '.join(others)}: only an AsyncSession can have that, and the session is "
            f"{shown(session)}"
        )


class _Transaction(AbstractAsyncContextManager[None]):
    """An outermost block of an `AsyncSession`.

    A class, as all blocks here: one that is dropped in its middle is collected, while the event
    loop would first run a generator to its end.
    """

    __slots__ = ("_is_verifying", "_options", "_outer", "_session", "_sync")

    def __init__(self, session: Any, sync: Session, options: TransactionOptions) -> None:
        self._session = session
        self._sync = sync
        self._options = options
        self._is_verifying = False
        #: `resolve_commit` and `settings` of a unit of work around this block, whose transaction
        #: has ended.
        self._outer: tuple[float | None, Settings | None] = (None, None)

    async def __aenter__(self) -> None:
        check_atomic(self._sync)
        listen_to_errors(self._sync.bind)
        # False where a unit of work around this block verifies the commits of the session already.
        self._is_verifying = verify_commits(self._sync)
        if self._options is not NO_OPTIONS:
            self._take_options()
        try:
            # The half of `AsyncSession.begin()` that does no I/O, so it needs no greenlet.
            self._sync.begin()
            if self._options is not NO_OPTIONS:
                await _send_options(self._session, self._options)
        except BaseException:
            await self._abandon()
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            note_driver_error(self._sync, exc)
            await self._abandon()
            return
        try:
            await commit_at_end(self._session, self._sync)
        except BaseException:
            await self._abandon()
            raise
        self._stop_verifying()

    async def _abandon(self) -> None:
        try:
            await abandon(self._session)
        finally:
            self._stop_verifying()

    def _take_options(self) -> None:
        record = record_of(self._sync)
        self._outer = (record.resolve_commit, record.settings)
        record.resolve_commit = self._options.resolve_seconds or record.resolve_commit
        settings = self._options.settings
        if settings is not None:
            outer = record.settings
            record.take_settings(self._sync, settings if outer is None else outer.updated(settings))

    def _stop_verifying(self) -> None:
        if self._is_verifying:
            stop_verifying(self._sync)
        elif self._options is not NO_OPTIONS:
            record = record_of(self._sync)
            record.resolve_commit, record.settings = self._outer


async def _send_options(session: Any, options: TransactionOptions) -> None:
    """Give the transaction its options, so that the next one of the same connection has none."""
    modes = options.modes()
    if not modes:
        return
    bind = session.sync_session.get_bind()
    check_bind(bind)
    if isinstance(bind, Connection):
        # Its execution options would stay with it, and the next transaction would have them.
        _refuse_joined(options, bind)
    else:
        # The pool takes them off again. They travel with the BEGIN.
        modes = options.remaining_modes()
        execution_options = options.execution_options()
        if execution_options:
            await session.connection(
                bind_arguments={"bind": bind}, execution_options=execution_options
            )
    if modes:
        await execute_of(session)(
            text(f"SET TRANSACTION {', '.join(modes)}"), bind_arguments={"bind": bind}
        )
    if options.read_only and isinstance(bind, Connection):
        checkout_of(bind).is_read_only = True


def _refuse_joined(options: TransactionOptions, connection: Connection) -> None:
    """Raise where the transaction belongs to the caller, who would get the options with it."""
    if connection.in_transaction():
        names = [name for name in options.names() if name not in ("durable", "resolve_commit")]
        raise TransactionStateError(
            f"{', '.join(names)}: only an outermost transaction can have that, and the session is "
            "bound to a connection that is in a transaction already; give the options to that "
            "transaction, or use another session"
        )


class _Savepoint(AbstractAsyncContextManager[None]):
    """A nested block of an `AsyncSession`."""

    __slots__ = ("_block", "_level", "_record", "_settings", "_sync")

    _level: SessionTransaction | None

    def __init__(self, session: Any, sync: Session, settings: Settings | None = None) -> None:
        self._sync = sync
        self._record = record_of(sync)
        self._block = session.begin_nested()
        self._settings = None if settings is None else SettingsLevel(settings)

    async def __aenter__(self) -> None:
        record = self._record
        if not record.verifies_commits and not record.is_atomic:
            check_atomic(self._sync)
            if any(is_autocommit(connection) for connection in record.connections):
                raise TransactionStateError(AUTOCOMMIT)
            record.is_atomic = bool(record.checkouts)
        await self._block.__aenter__()
        self._level = innermost(self._sync)
        if self._settings is not None:
            self._settings.level = self._level
            self._record.levels.append(self._settings)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._settings is not None:
            await self._end_with_settings(self._settings, exc_type, exc, traceback)
        else:
            await self._end(exc_type, exc, traceback)

    async def _end_with_settings(
        self,
        settings: SettingsLevel,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._end(exc_type, exc, traceback)
        finally:
            if settings in self._record.levels:
                self._record.levels.remove(settings)
        if exc_type is None:
            # A RELEASE keeps what was set inside.
            await uninterrupted(greenlet_spawn(settings.undo))

    async def _end(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            await self._roll_back(exc_type, exc, traceback)
        elif self._record.unknown is not None:
            await self._fail(unknown_again(self._record.unknown))
        elif self._is_rolled_back():
            await self._fail(rolled_back_by_flush(self._sync))
        else:
            await self._release()

    async def _roll_back(
        self,
        exc_type: type[BaseException],
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._block.__aexit__(exc_type, exc, traceback)
        except Exception:
            # A commit of the transaction around it would store what this level has written.
            logger.warning(
                "a rollback to a savepoint failed; its connection is discarded", exc_info=True
            )
            for connection in self._record.connections:
                if is_open(connection):
                    await greenlet_spawn(discard, connection.connection)

    def _is_rolled_back(self) -> bool:
        """Whether a flush has failed, so that SQLAlchemy is back at the savepoint already."""
        level = self._level
        return level is not None and not level.is_active and level is innermost(self._sync)

    async def _fail(self, failure: Exception) -> None:
        await self._block.__aexit__(type(failure), failure, None)
        raise failure

    async def _release(self) -> None:
        swallowed = self._record.error
        try:
            await self._block.__aexit__(None, None, None)
        except DBAPIError as error:
            if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
                raise
            # The block has swallowed the error that aborted the transaction. SQLAlchemy takes the
            # savepoint for ended, but PostgreSQL still has it.
            await greenlet_spawn(undo_failed_release, self._record)
            raise aborted_by(swallowed or error) from (swallowed or error)


# Sessions without SQLAlchemy's events: the blocks themselves run the callbacks.


class _ForeignBlock(AbstractAsyncContextManager[None]):
    """A block of a session of another kind."""

    __slots__ = ("_block", "_callbacks", "_open_blocks")

    def __init__(self, session: TransactionalSession, nested: bool) -> None:
        # A nested block in a transaction that is not ours has no callbacks: its commit is not seen.
        self._open_blocks = _OpenBlocks.of(session) if nested else _OpenBlocks(session)
        self._callbacks: list[Callback] = []
        self._block: AbstractAsyncContextManager[Any] = (
            session.begin_nested() if nested else session.begin()
        )

    async def __aenter__(self) -> None:
        if self._open_blocks is not None:
            self._open_blocks.enter(self._callbacks)
        try:
            await self._block.__aenter__()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            suppressed = await self._block.__aexit__(exc_type, exc, traceback)
        finally:
            enclosing = self._leave()
        if exc_type is None and enclosing is not None:
            enclosing.extend(self._callbacks)
        elif exc_type is None and self._callbacks:
            await uninterrupted(run_callbacks(self._callbacks))
        return suppressed

    def _leave(self) -> list[Callback] | None:
        """Close this block; return the callbacks of the block around it, where there is one."""
        if self._open_blocks is None:
            return None
        self._open_blocks.leave(self._callbacks)
        return self._open_blocks.innermost


class _OpenBlocks:
    """The open blocks of one session of another kind, each with its callbacks."""

    #: By the id of the session, because its class need not be hashable.
    _by_id: ClassVar[dict[int, _OpenBlocks]] = {}

    __slots__ = ("_blocks", "_key", "_session")

    def __init__(self, session: object) -> None:
        self._key = id(session)
        self._session = self._reference(session)
        self._blocks: list[list[Callback]] = []

    @classmethod
    def of(cls, session: object) -> _OpenBlocks | None:
        """Return the open blocks of a session, `None` outside of them."""
        found = cls._by_id.get(id(session))
        return found if found is not None and found._session() is session else None

    @property
    def innermost(self) -> list[Callback] | None:
        """The callbacks of the innermost block."""
        return self._blocks[-1] if self._blocks else None

    def enter(self, callbacks: list[Callback]) -> None:
        self._by_id[self._key] = self
        self._blocks.append(callbacks)

    def leave(self, callbacks: list[Callback]) -> None:
        self._blocks[:] = [block for block in self._blocks if block is not callbacks]
        if not self._blocks and self._by_id.get(self._key) is self:
            del self._by_id[self._key]

    def _reference(self, session: object) -> Callable[[], object]:
        """Refer to the session, and forget its blocks when it is collected in the middle of one.

        Otherwise a later session at the same address would take them for its own.
        """
        by_id, key = self._by_id, self._key
        try:
            return ref(session, lambda _: by_id.pop(key, None))
        except TypeError:
            # A class with `__slots__` may allow no weak reference. The session then lives as long
            # as its block, and no other has its address.
            return lambda: session


def foreign_callbacks(session: object) -> list[Callback] | None:
    """Return the callbacks of the innermost block of a session, `None` outside of any."""
    blocks = _OpenBlocks.of(session)
    return None if blocks is None else blocks.innermost
