"""Tokens in responses: observe the commits of a request, and send their position to the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only, greenlet_spawn

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.discards import discard, is_open
from pgtoolset._postgres.nodes import (
    Position,
    asked_before_commit,
    flush_position,
    flushed_position,
)
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, sqlstate_of
from pgtoolset.replicas._opening import ANSWER_TIMEOUT
from pgtoolset.replicas._tokens import PRIMARY, format_token

__all__ = ["CommitToken", "ResponseTokens", "TokenMiddleware"]

logger = logging.getLogger("pgtoolset")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class ResponseTokens:
    """The token of one response.

    Attributes:
        token: the token; `None` where no unit of the request has written.
    """

    __slots__ = ("_position", "token")

    def __init__(self) -> None:
        self.token: str | None = None
        self._position: Position | None = None

    def put(self, position: Position | None) -> None:
        """Put the position of a commit into the response; `None` where it is not known.

        Of several units, perhaps at once, the furthest position covers the others.
        """
        last = self._position
        if position is None:
            self.token, self._position = PRIMARY, None
        elif (
            last is None
            or (last.system, last.timeline) != (position.system, position.timeline)
            or position.lsn > last.lsn
        ):
            self.token, self._position = format_token(position), position


class CommitToken:
    """Observes the commits of one unit of work. See `pgtoolset.types.CommitObserver`."""

    __slots__ = ("_has_written", "_is_flushed", "_learn", "_tokens")

    def __init__(self, tokens: ResponseTokens, learn: Callable[[Position], None]) -> None:
        self._tokens = tokens
        self._learn = learn
        self._forget()

    def _forget(self) -> None:
        # Before COMMIT PREPARED nothing can be asked, and it always flushes.
        self._has_written = True
        self._is_flushed = True

    def before_commit(self, connection: Connection) -> None:
        """Ask what only the open transaction knows: after the COMMIT nothing tells whether it was
        waited for."""
        try:
            self._has_written, self._is_flushed = asked_before_commit(connection)
        except DBAPIError as error:
            if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
                raise
            self._has_written = False  # PostgreSQL answers this COMMIT with ROLLBACK

    def after_commit(self, connection: Connection) -> None:
        """Ask for the position on the same connection, before it returns to the pool.

        The work is stored, so nothing that happens here is an error of the commit, and a
        cancellation waits. A token that cannot be had in time sends the reader to the primary.
        """
        if self._has_written:
            await_only(uninterrupted(self._ask(connection)))
        self._forget()

    async def _ask(self, connection: Connection) -> None:
        position: Position | None = None
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                position = await greenlet_spawn(self._position, connection)
            self._learn(position)
        except Exception:
            logger.warning(
                "the position of a commit could not be asked for; its token means the primary",
                exc_info=True,
            )
            if is_open(connection):
                await greenlet_spawn(discard, connection.connection)
        self._tokens.put(position)

    def _position(self, connection: Connection) -> Position:
        # Outside of a transaction, which would be two more round trips.
        adapter: Any = connection.connection.dbapi_connection
        adapter.autocommit = True
        try:
            return (flushed_position if self._is_flushed else flush_position)(connection)
        finally:
            if is_open(connection):
                adapter.autocommit = False


class TokenMiddleware:
    """Pure ASGI middleware that sends the token of a request at the start of its response.

    Args:
        app: the application.
        key: the key of the scope where the units of the request find their `ResponseTokens`.
        headers: returns the headers of a response with those of its token.
    """

    def __init__(
        self,
        app: Application,
        key: str,
        headers: Callable[[Scope, list[tuple[bytes, bytes]], str], list[tuple[bytes, bytes]]],
    ) -> None:
        self._app = app
        self._key = key
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._key in scope:
            await self._app(scope, receive, send)
            return
        tokens = scope[self._key] = ResponseTokens()

        async def send_with_token(message: Message) -> None:
            if message["type"] == "http.response.start" and tokens.token is not None:
                headers = [(name, value) for name, value in message.get("headers", ())]
                message = {**message, "headers": self._headers(scope, headers, tokens.token)}
            await send(message)

        await self._app(scope, receive, send_with_token)
