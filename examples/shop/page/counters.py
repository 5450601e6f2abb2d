"""Counters of the process: requests and their outcome, transactions, connections, waiters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, ExceptionContext, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The note on a connection that its transaction is being committed.
COMMITS = "shop_commits"


class Counters:
    """What has happened since the start of the application."""

    def __init__(self) -> None:
        self.requests = 0
        self.succeeded = 0
        self.refused = 0
        self.errors = 0
        self.rolled_back = 0
        self.writing = 0
        self.waiters = 0
        self.waiters_served = 0
        self.most_connections = 0
        self._pool: QueuePool | None = None

    def watch_engine(self, engine: AsyncEngine) -> None:
        """Count the rollbacks of an engine, and the connections of its pool."""
        assert isinstance(engine.pool, QueuePool)
        self._pool = engine.pool
        event.listen(engine.sync_engine, "begin", note_begin)
        event.listen(engine.sync_engine, "commit", note_commit)
        event.listen(engine.sync_engine, "rollback", self._note_rollback)
        event.listen(engine.sync_engine, "handle_error", self._note_error)
        event.listen(engine.sync_engine, "checkout", self._note_checkout)

    @contextmanager
    def waiter(self) -> Iterator[None]:
        """Count a waiter of the watcher until the block ends."""
        self.waiters += 1
        self.waiters_served += 1
        try:
            yield
        finally:
            self.waiters -= 1

    def note_answer(self, status: int) -> None:
        """Count a response by its status."""
        if status < 400:
            self.succeeded += 1
        elif status < 500:
            self.refused += 1
        else:
            self.errors += 1

    def as_json(self) -> dict[str, int]:
        """The numbers for the page."""
        pool = self._pool
        return {
            "connections": pool.checkedout() if pool else 0,
            "pool_size": pool.size() if pool else 0,
            "most_connections": self.most_connections,
            "waiters": self.waiters,
            "waiters_served": self.waiters_served,
            "requests": self.requests,
            "succeeded": self.succeeded,
            "refused": self.refused,
            "errors": self.errors,
            "rolled_back": self.rolled_back,
        }

    def _note_rollback(self, connection: Connection) -> None:
        self.rolled_back += 1

    def _note_error(self, context: ExceptionContext) -> None:
        # A COMMIT that fails has rolled back: no ROLLBACK follows it.
        connection = context.connection
        if context.statement is None and connection is not None and not connection.invalidated:
            self.rolled_back += connection.info.get(COMMITS, False)

    def _note_checkout(self, *connection: object) -> None:
        if self._pool is not None:
            self.most_connections = max(self.most_connections, self._pool.checkedout())


def note_begin(connection: Connection) -> None:
    """A transaction of the connection begins."""
    connection.info[COMMITS] = False


def note_commit(connection: Connection) -> None:
    """A COMMIT is about to be sent."""
    connection.info[COMMITS] = True


class Counting:
    """Middleware that counts requests and answers, and announces each write that was answered."""

    def __init__(self, app: ASGIApp, counters: Counters, announce: Callable[[], None]) -> None:
        self._app = app
        self._counters = counters
        self._announce = announce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counters, writes = self._counters, scope["method"] not in ("GET", "HEAD")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                counters.note_answer(message["status"])
            await send(message)

        counters.requests += 1
        counters.writing += writes
        try:
            if writes:
                self._announce()
            await self._app(scope, receive, counted)
        finally:
            counters.writing -= writes
            self._announce()
