"""A session without a database: SQLAlchemy's own states of instances and transactions, over rows in
memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, cast

from sqlalchemy import event, inspect
from sqlalchemy.engine.util import TransactionalContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Mapper, Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn, safe_reraise

from pgtoolset._record import aborted_by, record_of
from pgtoolset.errors import NoDatabaseError
from pgtoolset.testing.doubles import _loading as loading
from pgtoolset.testing.doubles._constraints import check_deferred
from pgtoolset.testing.doubles._refusals import refusal
from pgtoolset.testing.doubles._store import Store, Work
from pgtoolset.testing.doubles._unit_of_work import Flush
from pgtoolset.values import LockMode, RowLockMode

__all__ = ["MemorySession", "MemorySyncSession"]


class MemorySyncSession(Session):
    """The `Session` inside a `MemorySession`; `run_sync` hands it out.

    Attributes:
        work: its transaction.
    """

    def __init__(self, bind: Any = None, *, store: Store, **options: Any) -> None:
        super().__init__(bind=None, **options)
        self.work: Work = Work(store, store.next_session())
        record_of(
            self
        )  # now, because it registers listeners, and inside of an event that is not possible

    def get_bind(self, *args: Any, **options: Any) -> NoReturn:
        raise NoDatabaseError(
            "a MemorySession has no SQL: it knows add, delete, get, refresh, flush, merge and transactions, and loads "
            "nothing by itself. Read an expired or unloaded attribute after `await session.refresh(instance, [name])`; "
            "test code that runs statements on PostgreSQL"
        )

    def flush(self, objects: Any = None) -> None:
        if self._flushing:
            raise InvalidRequestError("Session is already flushing")
        if self._is_clean():
            return
        # A flush is a part of the transaction of its own, as in SQLAlchemy: where it fails, the
        # level is over.
        TransactionalContext._trans_ctx_check(self)
        transaction = self._autobegin_t()._begin()
        self._flushing = True
        try:
            flush = Flush(self.work, self.new, self.dirty, self.deleted)
            self.work.store.fail_if_asked("FLUSH")
            flush.run()
            self._remove_newly_deleted([inspect(each) for each in flush.deleted])
            self._register_persistent({inspect(each) for each in flush.written})
            transaction.commit()
        except BaseException as error:
            if isinstance(error, DBAPIError):
                self.work.aborted = True
                record_of(self).note_error(error)
            with safe_reraise():
                transaction.rollback(_capture_exception=True)
        finally:
            self._flushing = False

    def statement(self, what: str, *, writes: bool = False) -> None:
        """Begin a statement: a transaction where there is none, an error where it is aborted."""
        if not self.in_transaction():
            self.begin()
        # What SQLAlchemy does before it gives a statement its connection: in a block whose
        # transaction has ended, and after a failed flush, it refuses.
        TransactionalContext._trans_ctx_check(self)
        level = self.get_nested_transaction() or self.get_transaction()
        if level is not None and not level.is_active:
            self._autobegin_t()._begin()  # raises PendingRollbackError
        try:
            self.work.statement(what, writes=writes)
        except DBAPIError as error:
            record_of(self).note_error(error)
            raise

    def refused(self, error: DBAPIError) -> NoReturn:
        """The statement has failed: the transaction is aborted, as PostgreSQL has it."""
        record_of(self).note_error(error)
        self.work.abort(error)

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        mapper: Any = inspect(entity, raiseerr=False)
        if not isinstance(mapper, Mapper):
            raise InvalidRequestError(f"entity must be a mapped class, not {entity!r}")
        identity = loading.identity_from(mapper, ident)
        instance = self.identity_map.get(mapper.identity_key_from_primary_key(identity))
        for_update = options.get("with_for_update")
        populate = bool(
            options.get("populate_existing")
            or (options.get("execution_options") or {}).get("populate_existing")
        )
        if (
            instance is not None
            and not populate
            and not for_update
            and not inspect(instance).expired
        ):
            return instance if isinstance(instance, mapper.class_) else None
        self._autoflush()
        self.statement(f"SELECT {mapper.class_.__name__} {identity!r}")
        table = mapper.base_mapper.local_table
        self.work.lock(
            ("table", table), LockMode.ROW_SHARE if for_update else LockMode.ACCESS_SHARE
        )
        if for_update:
            loading.lock_row(self.work, mapper, identity, row_lock_mode(for_update))
            populate = True
        return loading.load(self, mapper, identity, populate_existing=populate)

    def refresh(
        self, instance: object, attribute_names: Any = None, with_for_update: Any = None
    ) -> None:
        state: Any = inspect(instance)
        if state.key is None or state.session is not self:
            raise InvalidRequestError(
                f"Instance {instance!r} is not persistent within this Session"
            )
        self.expire(instance, attribute_names)
        self._autoflush()
        self.statement(f"SELECT {type(instance).__name__} {tuple(state.identity)!r}")
        if with_for_update:
            loading.lock_row(
                self.work, state.mapper, tuple(state.identity), row_lock_mode(with_for_update)
            )
        loading.refresh(self, instance, None if attribute_names is None else list(attribute_names))

    def delete(self, instance: object) -> None:
        state: Any = inspect(instance)
        for relationship in state.mapper.relationships:
            if (
                relationship.cascade.delete
                and state.key is not None
                and relationship.key not in state.dict
            ):
                self.refresh(instance, [relationship.key])
        super().delete(instance)


def row_lock_mode(for_update: Any) -> RowLockMode:
    options: Mapping[str, Any] = for_update if isinstance(for_update, Mapping) else {}
    if options.get("read"):
        return RowLockMode.KEY_SHARE if options.get("key_share") else RowLockMode.SHARE
    return RowLockMode.NO_KEY_UPDATE if options.get("key_share") else RowLockMode.UPDATE


class MemorySession(AsyncSession):
    """A session over rows in memory. `MemoryDatabase.session` makes one.

    It is an `AsyncSession`, so that code which asks for one takes it: `add`, `add_all`, `delete`,
    `get`, `get_one`, `refresh`, `merge`, `expire`, `expunge`, `flush`, `begin`, `begin_nested`,
    `commit`, `rollback`, `close`, with `get_transaction`, `on_commit` and `run_transaction`.
    Constraints are checked as PostgreSQL does, an error aborts the transaction until the savepoint
    around it is rolled back, and rows are locked against other sessions.

    What takes SQL raises `NoDatabaseError`: `execute`, `scalars`, lazy loads.

    Attributes:
        number: of the session, as in the database's log.
    """

    sync_session_class: type[Session] = MemorySyncSession

    def __init__(self, store: Store, **options: Any) -> None:
        super().__init__(store=store, **options)

    @property
    def _sync(self) -> MemorySyncSession:
        sync = self.sync_session
        assert isinstance(sync, MemorySyncSession)
        return sync

    @property
    def number(self) -> int:
        return self._sync.work.number

    @property
    def log(self) -> list[str]:
        """What this session has done, in order."""
        return [event.what for event in self._sync.work.store.log if event.session == self.number]

    async def connection(
        self,
        bind_arguments: Any = None,
        execution_options: Any = None,
        **options: Any,
    ) -> AsyncConnection:
        """Notes the options of a transaction; there is no connection, and using what is returned is
        an error."""
        if execution_options is None:
            self._sync.get_bind()
        await greenlet_spawn(self._sync.statement, "SET TRANSACTION")
        for name, value in execution_options.items():
            self._sync.work.log(f"SET {name} = {value!r}")
        self._sync.work.read_only = bool(execution_options.get("postgresql_readonly"))
        return cast("AsyncConnection", _NoConnection(self._sync))

    async def fail(
        self, sqlstate: str = "XX000", message: str = "the test has asked for an error"
    ) -> NoReturn:
        """Behave as if a statement had failed: raise a `DBAPIError` (23...: an `IntegrityError`)
        and abort the transaction, until the savepoint around it is rolled back.

        Args:
            sqlstate: the code, `"40001"` for a serialization failure.
            message: the words of the server.
        """
        await greenlet_spawn(self._sync.statement, "a statement that fails")
        self._sync.refused(refusal(sqlstate, message, "a statement that fails"))


class _NoConnection:
    def __init__(self, session: MemorySyncSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        self._session.get_bind()


class _Undo:
    """What `undo_failed_release` finds where a connection would be."""

    def __init__(self, work: Work) -> None:
        self._work = work

    @property
    def dialect(self) -> _Undo:
        return self

    def do_rollback_to_savepoint(self, connection: object, name: str) -> None:
        self._work.aborted = False


def _after_transaction_create(session: MemorySyncSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None or transaction.nested:
        session.work.begin(transaction)


def _before_commit(session: MemorySyncSession) -> None:
    work, record = session.work, record_of(session)
    level = work.levels[-1]
    if work.aborted and not session.in_nested_transaction() and record.needs_verified_commit:
        raise aborted_by(record.error)
    session.flush()
    if session.in_nested_transaction():
        if work.aborted and level.touched:
            level.refused = True
            record.releasing = (cast("Any", _Undo(work)), "")
            work.statement("RELEASE SAVEPOINT")
    elif not work.aborted:
        work.store.fail_if_asked("COMMIT")
        check_deferred(work)


def _after_commit(session: MemorySyncSession) -> None:
    session.work.commit()


def _after_rollback(session: MemorySyncSession) -> None:
    # A savepoint that was never sent is not rolled back to, so an error from before it is still
    # there.
    if len(session.work.levels) == 1 or session.work.levels[-1].touched:
        record_of(session).forget_error()
    session.work.roll_back()


def _after_transaction_end(session: MemorySyncSession, transaction: SessionTransaction) -> None:
    session.work.end(transaction)


event.listen(MemorySyncSession, "after_transaction_create", _after_transaction_create)
event.listen(MemorySyncSession, "before_commit", _before_commit)
event.listen(MemorySyncSession, "after_commit", _after_commit)
event.listen(MemorySyncSession, "after_rollback", _after_rollback)
event.listen(MemorySyncSession, "after_transaction_end", _after_transaction_end)
