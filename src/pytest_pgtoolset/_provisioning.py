"""The server, the template and the worker's database of a test run, each made once and early."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

import pytest
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset.errors import EmbeddedServerError, OutsideReferenceError, PgToolsetError
from pgtoolset.testing.server import EmbeddedServer, load_embedded, parse_server_url
from pgtoolset.testing.templates import TemplateDatabase, template_database
from pgtoolset.testing.workers import create_worker_database
from pytest_pgtoolset._broker import ask
from pytest_pgtoolset._given import refusal, try_server
from pytest_pgtoolset._recipes import Recipe, recipe_of

T = TypeVar("T")

#: Seconds for the controller to start the server and answer a worker.
_SERVER_TIMEOUT = 60.0


class Provision:
    """What one process of a test run has on the server, from its first use to `close`.

    Everything asynchronous runs in the event loop of a separate thread, so the loops of the tests
    are not touched.

    Args:
        config: that of the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        #: Where a worker of pytest-xdist asks for the embedded server.
        self._broker: dict[str, Any] | None = getattr(config, "workerinput", {}).get("pgtoolset")
        uid: str = getattr(config, "workerinput", {}).get("testrunuid") or uuid.uuid4().hex
        #: Part of the names of all databases of this run. The caller may have chosen the uid.
        self._run = hashlib.blake2b(uid.encode(), digest_size=6).hexdigest()
        self._server: EmbeddedServer | None = None
        self._url: str | None = None
        self._refusal: pytest.UsageError | None = None
        self._choosing = threading.Lock()
        self._thread = _LoopThread()
        self._database: _Database | None = None
        self._is_used = False

    def start(self) -> None:
        """Begin to make the database in the background.

        A failure is raised by the first call that needs the database.
        """
        with suppress(EmbeddedServerError, pytest.UsageError):
            if self._broker is None and self._given_url() is None:
                load_embedded()
        self._opened(None)

    def server_url(self) -> str:
        """Return the URL of the server; start it where it is an embedded one."""
        with self._choosing:
            if self._refusal is not None:
                raise self._refusal
            if self._url is None:
                given = self._given_url()
                self._url = self._embedded_url() if given is None else self._checked_url(*given)
            return self._url

    def check_given_server(self) -> None:
        """Connect to the server that the run is given, where it is given one.

        Raises:
            pytest.UsageError: it cannot be reached, or its URL is not one of PostgreSQL.
        """
        if self._given_url() is not None:
            self.server_url()

    @contextmanager
    def database(self, server_url: str) -> Iterator[str]:
        """Yield the URL of this worker's database; drop the database at the end of the block."""
        self._is_used = True
        try:
            yield self._opened(server_url).url()
        finally:
            self._is_used = False
            self.drop_unused()

    def drop_unused(self) -> None:
        """Drop the database, unless a block of `database` uses it."""
        if self._database is not None and not self._is_used:
            database, self._database = self._database, None
            database.close()

    def restore(self) -> None:
        """Make the database as it was when it was made, after a test that has committed."""
        assert self._database is not None
        self._database.restore()

    def close(self) -> None:
        """Drop the database and stop the server, if this run has started one."""
        self._is_used = False
        try:
            self.drop_unused()
        finally:
            self._thread.close()
            if self._server is not None:
                self._server.stop()

    def _opened(self, server_url: str | None) -> _Database:
        if self._database is None:
            self._database = _Database(
                self._thread,
                self._run,
                # It imports and reads files, which a tool may forbid in the thread of a loop.
                lambda: (self._recipe(), self._server_of(server_url)),
            )
        return self._database

    def _server_of(self, url: str | None) -> str:
        """Return the URL of the server, which a fixture of the project may have given."""
        driver = self._driver()
        if url is None or driver is None:
            return url or self.server_url()
        return parse_server_url("pg_server_url", url, driver)

    def _recipe(self) -> Recipe:
        return recipe_of(
            metadata=self._config.getini("pg_metadata"),
            migrate=self._config.getini("pg_migrate"),
            files=self._config.getini("pg_migrate_files"),
        )

    def _given_url(self) -> tuple[str, str] | None:
        """Return where the URL of a server comes from, and the URL."""
        sources = {
            "--pg-url": self._config.getoption("pg_url"),
            "the ini option pg_url": self._config.getini("pg_url"),
            "the environment variable DATABASE_URL": os.environ.get("DATABASE_URL"),
        }
        for source, url in sources.items():
            if url:
                try:
                    return source, parse_server_url(source, url, self._driver())
                except ValueError as error:
                    raise pytest.UsageError(str(error)) from None
        return None

    def _checked_url(self, source: str, url: str) -> str:
        try:
            self._thread.run(try_server(url)).result()
        except Exception as error:
            self._refusal = pytest.UsageError(refusal(source, url, error))
            raise self._refusal from None
        return url

    def _version(self) -> Literal[16, 18]:
        match self._config.getoption("pg_version") or self._config.getini("pg_version"):
            case "18":
                return 18
            case "16":
                return 16
            case other:
                raise pytest.UsageError(
                    f"the ini option pg_version = {other}: the embedded PostgreSQL is 18 or 16"
                )

    def _driver(self) -> str | None:
        """Return the driver that the run names; `None` leaves it to the URL."""
        driver = self._config.getoption("pg_driver") or self._config.getini("pg_driver")
        if driver not in ("", "asyncpg", "psycopg"):
            raise pytest.UsageError(
                f"the ini option pg_driver = {driver}: the driver is asyncpg or psycopg"
            )
        return driver or None

    def _embedded_url(self) -> str:
        if self._broker is None:
            tcp = self._config.getoption("pg_tcp") or self._config.getini("pg_tcp")
            server = EmbeddedServer(version=self._version(), tcp=tcp)
            server.start()
            self._server = server
            url = server.url(driver="postgresql")
            return parse_server_url("the embedded server", url, self._driver())
        try:
            answer = ask(self._broker, _SERVER_TIMEOUT)
        except OSError as error:
            raise pytest.UsageError(
                f"the embedded PostgreSQL of the controller cannot be reached ({error}): workers "
                "on other machines need a server that they can reach; set --pg-url, the ini option "
                "pg_url or DATABASE_URL"
            ) from error
        if "url" not in answer:
            raise PgToolsetError(answer.get("error", "the controller has ended"))
        return answer["url"]


class _Database:
    """A worker's database: made in the background from the start, dropped by `close`.

    Args:
        thread: runs everything asynchronous.
        run: names the run.
        find: returns the recipe of the template and the URL of the server; called in a thread
            without an event loop.
    """

    def __init__(
        self, thread: _LoopThread, run: str, find: Callable[[], tuple[Recipe, str]]
    ) -> None:
        self._thread = thread
        self._run = run
        self._find = find
        #: A new future for the URL renews the database, `None` ends it.
        self._requests: asyncio.Queue[Future[str] | None] = asyncio.Queue()
        self._made: Future[str] = Future()
        self._recipe: Recipe | None = None
        self._template: TemplateDatabase | None = None
        self._engine: AsyncEngine | None = None
        self._keeper = thread.run(self._keep(self._made))

    def url(self) -> str:
        """Return the URL once the database is made."""
        return self._made.result()

    def restore(self) -> None:
        """Empty the tables, or copy the template again where that is not enough."""
        # Imported here, because few runs have a test that commits, and all wait for the imports.
        # Not in the thread of the loop, where a tool may forbid to read files.
        from pgtoolset.cleanup import cleanup_tables

        url = self.url()
        metadata = None if self._recipe is None else self._recipe.metadata
        if metadata is None or self._template is None or self._template.has_rows:
            self._renew()
            return
        try:
            self._thread.run(self._clean(url, metadata, cleanup_tables)).result()
        except OutsideReferenceError:
            self._renew()  # the test has made tables of its own
        except PgToolsetError:
            self._renew()
            raise

    def close(self) -> None:
        """Drop the database."""
        self._thread.call(self._requests.put_nowait, None)
        self._keeper.result()

    def _renew(self) -> None:
        renewed: Future[str] = Future()
        self._thread.call(self._requests.put_nowait, renewed)
        renewed.result()

    async def _clean(
        self,
        url: str,
        metadata: MetaData,
        empty: Callable[[AsyncSession, MetaData], Awaitable[object]],
    ) -> None:
        if self._engine is None:
            self._engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True)
        async with AsyncSession(self._engine) as session:
            await empty(session, metadata)

    async def _keep(self, made: Future[str]) -> None:
        """Make the database, and again for each request, until a request ends it."""
        request: Future[str] | None = made
        try:
            recipe, server_url = await asyncio.to_thread(self._find)
            self._recipe = recipe
            async with template_database(
                server_url, recipe.make, run=self._run, version=recipe.version
            ) as self._template:
                while request is not None:
                    async with create_worker_database(
                        server_url,
                        "main",
                        prefix=f"pgtoolset_{self._run}",
                        template=self._template.name,
                    ) as url:
                        request.set_result(url)
                        request = await self._requests.get()
                        if self._engine is not None:
                            await self._engine.dispose()
        except BaseException as error:
            if request is None or request.done():
                raise
            request.set_exception(error)


class _LoopThread:
    """An event loop in a thread of its own, from the first use to `close`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop, soon."""
        self._running().call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """Stop the loop and end the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._live, args=[self._loop], name="pgtoolset", daemon=True
            )
            self._thread.start()
        return self._loop

    @staticmethod
    def _live(loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.get_loop().run_forever()
