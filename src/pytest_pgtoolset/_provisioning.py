"""What a test run needs of PostgreSQL: a server, a template and this worker's database, each made
once and in time."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, TypeVar

import pytest
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset._arguments import url_of, with_asyncpg
from pgtoolset.cleanup import cleanup_tables
from pgtoolset.errors import EmbeddedServerError, OutsideReferenceError, PgToolsetError
from pgtoolset.testing.server import EmbeddedServer, load_embedded
from pgtoolset.testing.workers import create_worker_database
from pytest_pgtoolset._broker import ask
from pytest_pgtoolset._recipes import Recipe, recipe_of
from pytest_pgtoolset._templates import Template, template_of

T = TypeVar("T")

#: Seconds that a worker waits for the controller to start the server.
_PATIENCE = 60.0


class Provision:
    """Lives as long as the run. `start` begins what `server_url` and `database_url` then wait for.

    All that is asynchronous happens in the event loop of a thread of its own, so that no loop of a
    test is touched.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        #: Where a worker of pytest-xdist asks for the embedded server.
        self._broker: dict[str, Any] | None = getattr(config, "workerinput", {}).get("pgtoolset")
        #: What the names of the databases of this run have in common.
        self._run = (getattr(config, "workerinput", {}).get("testrunuid") or uuid.uuid4().hex)[:12]
        self._server: EmbeddedServer | None = None
        self._url: str | None = None
        self._choosing = threading.Lock()
        self._thread = _LoopThread()
        self._opened: Future[str] | None = None
        self._keeper: Future[None] | None = None
        self._changes: asyncio.Queue[Future[str] | None] = asyncio.Queue()
        self._recipe: Recipe | None = None
        self._template: Template | None = None
        self._engine: AsyncEngine | None = None

    def start(self) -> None:
        """Begin to make the database, in the background. What goes wrong is told to who asks for
        it."""
        with suppress(EmbeddedServerError, pytest.UsageError):
            if self._broker is None and self._given_url() is None:
                load_embedded()
        self._open(None)

    def server_url(self) -> str:
        """The URL of the server, which is started now where it is an embedded one."""
        with self._choosing:
            if self._url is None:
                self._url = self._given_url() or self._embedded_url()
            return self._url

    def database_url(self, server_url: str) -> str:
        """The URL of this worker's database on the server, made now where that has not begun."""
        return self._open(server_url).result()

    def restore(self) -> None:
        """Make the database as it was when it was made, after a test that has committed."""
        assert self._opened is not None
        url = self._opened.result()
        recipe, template = self._recipe, self._template
        if recipe is None or recipe.metadata is None or template is None or template.has_rows:
            self._renew()
            return
        try:
            self._thread.run(self._clean(url, recipe.metadata)).result()
        except OutsideReferenceError:
            self._renew()  # the test has made tables of its own
        except PgToolsetError:
            self._renew()
            raise

    def _renew(self) -> None:
        """Drop the database and copy the template again."""
        opened: Future[str] = Future()
        self._thread.call(self._changes.put_nowait, opened)
        opened.result()

    async def _clean(self, url: str, metadata: MetaData) -> None:
        if self._engine is None:
            self._engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True)
        async with AsyncSession(self._engine) as session:
            await cleanup_tables(session, metadata)

    def close(self) -> None:
        """Drop the database and stop the server, if they are ours."""
        try:
            if self._keeper is not None:
                self._thread.call(self._changes.put_nowait, None)
                self._keeper.result()
        finally:
            self._thread.close()
            if self._server is not None:
                self._server.stop()

    def _open(self, server_url: str | None) -> Future[str]:
        if self._opened is None:
            self._opened = Future()
            self._keeper = self._thread.run(self._keep(server_url, self._opened))
        return self._opened

    async def _keep(self, server_url: str | None, opened: Future[str]) -> None:
        try:
            # In a thread without a loop: it imports and reads files, and some look for that in
            # loops.
            self._recipe = await asyncio.to_thread(
                recipe_of,
                metadata=self._config.getini("pg_metadata"),
                migrate=self._config.getini("pg_migrate"),
                files=self._config.getini("pg_migrate_files"),
            )
            if server_url is None:
                server_url = await asyncio.to_thread(self.server_url)
            async with template_of(server_url, self._recipe, self._run) as self._template:
                while True:
                    async with create_worker_database(
                        server_url,
                        "main",
                        prefix=f"pgtoolset_{self._run}",
                        template=self._template.name,
                    ) as database_url:
                        opened.set_result(database_url)
                        change = await self._changes.get()
                        if self._engine is not None:
                            await self._engine.dispose()
                    if change is None:
                        return
                    opened = change
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    def _given_url(self) -> str | None:
        sources = {
            "--pg-url": self._config.getoption("pg_url"),
            "the ini option pg_url": self._config.getini("pg_url"),
            "DATABASE_URL": os.environ.get("DATABASE_URL"),
        }
        for source, url in sources.items():
            if url:
                try:
                    parsed = url_of(source, url)
                except ValueError as error:
                    raise pytest.UsageError(str(error)) from None
                return with_asyncpg(parsed).render_as_string(hide_password=False)
        return None

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

    def _embedded_url(self) -> str:
        if self._broker is None:
            server = EmbeddedServer(version=self._version())
            server.start()
            self._server = server
            return server.url()
        try:
            answer = ask(self._broker, _PATIENCE)
        except OSError as error:
            raise pytest.UsageError(
                f"the embedded PostgreSQL of the controller cannot be reached ({error}): workers on other machines "
                "need a server that they can reach: set --pg-url, the ini option pg_url or DATABASE_URL"
            ) from error
        if "url" not in answer:
            raise PgToolsetError(answer.get("error", "the controller has ended"))
        return answer["url"]


class _LoopThread:
    """An event loop in a thread, from the first use to `close`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def call(self, function: Any, *arguments: Any) -> None:
        self._running().call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
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
