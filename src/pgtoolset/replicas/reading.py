"""ReadReplicas: read blocks on standbys, and tokens that say how far one must have replayed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    IsolationLevel,
    TransactionOptions,
    check_begun,
    check_http_name,
    check_session_maker,
    check_session_makers,
    check_work,
    refuse_read_block,
    seconds,
    shown,
    sync_session,
)
from pgtoolset._compatibility import connections_of
from pgtoolset._postgres.nodes import NotCommitted, NotPrimary, Position, written_position
from pgtoolset._postgres.sqlstates import READ_ONLY_SQL_TRANSACTION, sqlstate_of
from pgtoolset._retries import Retries
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import SessionFactory
from pgtoolset.replicas._blocks import ReadBlock
from pgtoolset.replicas._fleet import Fleet, Plan
from pgtoolset.replicas._responses import CommitToken, Scope, TokenMiddleware
from pgtoolset.replicas._tokens import format_token, parse_token
from pgtoolset.types import CommitObserver, Duration

__all__ = ["ReadReplicas"]

S = TypeVar("S", bound=AsyncSession)
R = TypeVar("R")


class ReadReplicas(Generic[S]):
    """Read on standbys, and never less than the reader has written.

    A standby of PostgreSQL replays what the primary has committed a moment later. A reader that has
    just written takes a token of that from the primary (`position`), and reads after it (`read`):
    on a standby that has replayed it, or, where none has in time, on the primary.

    Each `read` block is one READ ONLY transaction on one node. The standby is the one with the
    fewest open read blocks of this process, in turn where several have. One that cannot be reached
    or does not answer within a second is left out for 1, 2, 4, ... 30 seconds, and asked beside the
    requests whether it is back. Where all are away, the primary serves.

    Args:
        primary: makes sessions on the primary: an `async_sessionmaker`, or any factory of
            `AsyncSession`.
        standbys: one such factory for each standby, each on an engine of its own.
        max_wait: how long a block waits until a standby has replayed its token, in seconds, as a
            `timedelta` or as a string such as `"100ms"`. Then it opens on the primary.
        header: the header that carries the token in requests and responses.
        cookie: the name of a cookie that carries it in place of the header.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> replicas = ReadReplicas(
        ...     async_sessionmaker(primary_engine), [async_sessionmaker(standby_engine)]
        ... )
        >>> async with db_context() as session:
        ...     session.add(Order(customer="Ada"))
        ...     await session.commit()
        ...     token = await replicas.position(session)
        >>> async with replicas.read(after=token) as session:
        ...     orders = await session.scalars(select(Order))

    See https://www.postgresql.org/docs/current/hot-standby.html
    """

    def __init__(
        self,
        primary: SessionFactory[S],
        standbys: Sequence[SessionFactory[S]],
        *,
        max_wait: Duration = 0.1,
        header: str = "X-Read-Token",
        cookie: str | None = None,
    ) -> None:
        check_session_maker(primary, "primary")
        check_session_makers("standbys", standbys)
        self._fleet = Fleet(primary, standbys, seconds("max_wait", max_wait))
        self._header = check_http_name("header", header)
        self._cookie = None if cookie is None else check_http_name("cookie", cookie)
        #: Of the scope of a request, for its `ResponseTokens`.
        self._key = f"pgtoolset.replicas.{id(self):x}"

    def read(
        self, after: str | None = None, *, isolation_level: IsolationLevel | None = None
    ) -> AbstractAsyncContextManager[S]:
        """Open one READ ONLY transaction on one node that has replayed `after`.

        The end of the block commits, an error rolls back, and the session is closed. `commit()` or
        `rollback()` in the block end its transaction, and it has no other. A write is PostgreSQL's
        error 25006. `lock_tables`, `lock_rows`, `advisory_lock`, the functions `m2m_*` and
        `cleanup_tables` refuse the session.

        Args:
            after: a token of `position`; `None` reads on any standby. A token that cannot be read,
                or is of another cluster or timeline, means the primary.
            isolation_level: `"READ COMMITTED"` or `"REPEATABLE READ"`; `None` leaves the server's
                default. `"SERIALIZABLE"` means the primary: no standby has it.

        Returns:
            An async context manager that yields a session.

        Raises:
            TypeError: `after` is not a `str`, or the factory makes something else than an
                `AsyncSession`. Nothing was sent.
            ValueError: `isolation_level` is not a level. Nothing was sent.
            TransactionStateError: no primary could be found for a token.

        A conflict with recovery (40001), or a standby that goes away, inside the block is an error
        of its statements: see `run`.
        """
        return ReadBlock(self._fleet, self._plan(after, isolation_level))

    async def run(
        self,
        work: Callable[[S], Awaitable[R]],
        *,
        after: str | None = None,
        isolation_level: IsolationLevel | None = None,
    ) -> R:
        """Return `await work(session)` in a read block, once more on the primary where need be.

        A standby cancels a query that delays its replay (40001 "conflict with
        recovery"), and its connection may be lost. Then `work` runs again, on the primary. An error
        there, and any other error, propagates.

        Args:
            work: an async function of one session. It may run twice.
            after: as in `read`.
            isolation_level: as in `read`.

        Returns:
            The result of `work`.

        Raises:
            TypeError, ValueError: as in `read`; also where `work` is no async function.

        Example:
            >>> async def count_orders(session: AsyncSession) -> int | None:
            ...     return await session.scalar(select(func.count()).select_from(Order))
            >>> count = await replicas.run(count_orders, after=token)

        See https://www.postgresql.org/docs/current/hot-standby.html#HOT-STANDBY-CONFLICT
        """
        check_work(work)
        plan = self._plan(after, isolation_level)
        block = ReadBlock(self._fleet, plan)
        is_on_standby = False
        try:
            async with block as session:
                is_on_standby = block.is_on_standby
                return await _called(work, session)
        except Exception as error:
            is_write = sqlstate_of(error) == READ_ONLY_SQL_TRANSACTION
            if not is_on_standby or is_write or not Retries().allow(error):
                raise
        on_primary = Plan(plan.isolation_level, plan.has_token, plan.wanted, on_primary=True)
        async with ReadBlock(self._fleet, on_primary) as session:
            return await _called(work, session)

    async def position(self, session: AsyncSession) -> str:
        """Return a token of all that the session has committed.

        Call it after a commit, in the session that has committed, on the primary. The token covers
        also everything else that was durable when it was taken. It is short, has only letters,
        digits, dots and dashes, and is no secret: it says how far the server has written.

        Whatever `synchronous_commit` the session had, its work is on the disk of the primary then:
        where some of the write-ahead log is not there yet, one more round trip flushes it.

        Args:
            session: an `AsyncSession` on the primary. Its transaction may be open, but must not
                have written yet.

        Returns:
            A token for `read` and `run`.

        Raises:
            TransactionStateError: the session has written and not committed, it is that of a read
                block, or its server is a standby by now.
            TypeError: `session` is not an `AsyncSession`. Nothing was sent.

        See https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
        """
        sync = sync_session(session)
        refuse_read_block(sync, "position")
        try:
            position = await greenlet_spawn(_position_of, sync)
        except NotCommitted:
            raise TransactionStateError(
                "the session has written in its open transaction, which no token covers before it "
                "is committed; call position() after the commit"
            ) from None
        except NotPrimary:
            raise TransactionStateError(
                "the server of the session is a standby, which writes nothing; call position() "
                "with a session of the primary"
            ) from None
        self._fleet.learn(position)
        return format_token(position)

    def install(self, app: Any) -> None:
        """Let responses of a FastAPI application carry tokens, as `create_db_dependency(...,
        replicas=replicas)` makes them.

        It adds a pure ASGI middleware. Call it once, before the application starts. A browser on
        another origin sees the header only where `Access-Control-Expose-Headers` names it:
        `CORSMiddleware(expose_headers=["X-Read-Token"])`.

        Args:
            app: a FastAPI or Starlette application.

        Raises:
            TypeError: `app` has no `add_middleware`.
            RuntimeError: the application has started.

        See https://www.starlette.io/middleware/#pure-asgi-middleware
        """
        add = getattr(app, "add_middleware", None)
        if isinstance(app, type) or not callable(add):
            raise TypeError(f"app must be a FastAPI application, not {shown(app)}")
        add(TokenMiddleware, key=self._key, headers=self._with_token)

    def observer_of(self, scope: Scope) -> CommitObserver | None:
        """Return what observes the commits of a request. See `pgtoolset.types.ReadTokens`."""
        if scope["type"] != "http":
            return None  # a websocket has no response to put a token into
        tokens = scope.get(self._key)
        if tokens is None:
            raise TransactionStateError(
                "create_db_dependency(replicas=...) needs the middleware that puts the token into "
                f"the response of {scope.get('path')!r}: call replicas.install(app) once, with the "
                "application that serves it"
            )
        return CommitToken(tokens, self._fleet.learn)

    def token_of(self, connection: Any) -> str | None:
        """Return the token of a request or websocket of Starlette; `None` without one.

        Two headers of a request are no token, and mean the primary.
        """
        if self._cookie is not None:
            token: str | None = connection.cookies.get(self._cookie)
            return token
        sent = connection.headers.getlist(self._header)
        return ", ".join(sent) if sent else None

    def _plan(self, after: object, isolation_level: IsolationLevel | None) -> Plan:
        TransactionOptions(isolation_level=isolation_level)  # checks it
        if after is None:
            wanted, on_primary = None, False
        else:
            wanted = parse_token(after)
            on_primary = wanted is None or self._fleet.is_past(wanted)
        return Plan(
            isolation_level=isolation_level,
            has_token=after is not None,
            wanted=wanted,
            on_primary=on_primary or isolation_level == "SERIALIZABLE",
        )

    def _with_token(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], token: str
    ) -> list[tuple[bytes, bytes]]:
        if self._cookie is None:
            name = self._header.lower().encode("ascii")
            others = [each for each in headers if each[0].lower() != name]
            return [*others, (name, token.encode("ascii"))]
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{self._cookie}={token}; Path=/; HttpOnly; SameSite=Lax{secure}"
        return [*headers, (b"set-cookie", cookie.encode("ascii"))]


def _position_of(sync: Session) -> Position:
    """Ask for the position of a session, in SQLAlchemy's greenlet."""
    bind = sync.get_bind()
    if connections_of(sync.get_transaction()):
        # A transaction of its own would be needed for a flush. A standby has the rest soon.
        return written_position(sync.connection(), flushes=False)
    if isinstance(bind, Connection):
        was_in_transaction = bind.in_transaction()
        try:
            return written_position(bind, flushes=False)
        finally:
            if not was_in_transaction:
                bind.rollback()
    with bind.connect() as connection:
        return written_position(
            connection.execution_options(isolation_level="AUTOCOMMIT"), flushes=True
        )


async def _called(work: Callable[[S], Awaitable[R]], session: S) -> R:
    result = work(session)
    check_begun(work, result)
    return await result
