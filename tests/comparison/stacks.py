"""The five ways to get a session that docs/comparison.md compares, behind the same few methods.

Each is used as its own documentation shows. A program asks for an application or a unit, and runs
SQL in it; how the session is made, committed and closed is the stack's.
"""

import asyncio
import importlib.metadata
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

Run = Callable[..., Awaitable[Any]]
Body = Callable[[Run], Awaitable[None]]


class Refused(Exception):
    """An error of the endpoint."""


class Stack:
    """One column of the table."""

    #: The heading of the column.
    heading: str
    #: The distribution, and the package that is searched for what it lacks.
    distribution: str
    package: str
    version: str = ""
    #: A session of SQLAlchemy that is not async.
    is_sync = False

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.engine = self.make_engine(options)

    def make_engine(self, options: dict[str, Any]) -> Any:
        return create_async_engine(self.url, **options)

    @classmethod
    def installed(cls) -> bool:
        if importlib.util.find_spec(cls.package) is None:
            return False
        return importlib.metadata.version(cls.distribution).startswith(cls.version)

    @property
    def dependency(self) -> Callable[..., Any]:
        """What stands in `Depends`."""
        raise NotImplementedError

    def install(self, app: FastAPI) -> None:
        """Prepare an application, as the stack's documentation says."""

    @asynccontextmanager
    async def unit(self) -> AsyncIterator[Any]:
        """A session outside of a request."""
        raise NotImplementedError
        yield

    async def run(self, session: Any, statement: Any, parameters: Any = None) -> Any:
        """Execute a statement; a `str` is SQL."""
        if isinstance(statement, str):
            statement = text(statement)
        return await session.execute(statement, parameters)

    async def finish(self, session: Any) -> None:
        """What an endpoint does at its end; most do nothing."""

    def checked_out(self) -> int:
        """The connections that are out of the pool."""
        return self.engine.pool.checkedout()

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def client(self, app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            yield client

    def application(self, body: Body, *, stream: Body | None = None) -> FastAPI:
        """An application with `POST /do`, which runs the body and answers 201."""
        app = FastAPI()
        self.install(app)
        dependency = self.dependency

        @app.post("/do", status_code=201)
        async def do(session: Annotated[Any, Depends(dependency)]) -> Any:
            async def run(statement: Any, parameters: Any = None) -> Any:
                return await self.run(session, statement, parameters)

            await body(run)
            await self.finish(session)
            if stream is None:
                return None

            async def lines() -> AsyncIterator[str]:
                yield "first\n"
                await stream(run)
                await self.finish(session)
                yield "last\n"

            return StreamingResponse(lines(), status_code=201)

        return app


class ByHand(Stack):
    """The `get_db` that most FastAPI projects have."""

    heading = "by hand"
    distribution = package = "sqlalchemy"

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.session_maker = async_sessionmaker(self.engine, expire_on_commit=False)

    @property
    def dependency(self) -> Callable[..., Any]:
        async def get_db() -> AsyncIterator[AsyncSession]:
            async with self.session_maker() as session:
                try:
                    yield session
                    await session.commit()
                except Exception:
                    await session.rollback()
                    raise

        return get_db

    @asynccontextmanager
    async def unit(self) -> AsyncIterator[AsyncSession]:
        async with self.session_maker() as session, session.begin():
            yield session


class FastapiToolsets(Stack):
    """`Database`, installed on the application."""

    heading = "fastapi-toolsets 6.0.2"
    distribution, package, version = "fastapi-toolsets", "fastapi_toolsets", "6.0.2"

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        from fastapi_toolsets.db import Database

        self.database = Database(engine=self.engine)

    @property
    def dependency(self) -> Callable[..., Any]:
        return self.database

    def install(self, app: FastAPI) -> None:
        from fastapi_toolsets.exceptions import init_exceptions_handlers

        self.database.install(app)
        init_exceptions_handlers(app)

    @asynccontextmanager
    async def unit(self) -> AsyncIterator[AsyncSession]:
        async with self.database.session() as session:
            yield session


class AdvancedAlchemy(Stack):
    """Its FastAPI extension with `commit_mode="autocommit"`."""

    heading = "advanced-alchemy 1.12"
    distribution, package, version = "advanced-alchemy", "advanced_alchemy", "1.12"

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemyAsyncConfig

        self.config = SQLAlchemyAsyncConfig(engine_instance=self.engine, commit_mode="autocommit")
        self.alchemy = AdvancedAlchemy(config=self.config)

    @property
    def dependency(self) -> Callable[..., Any]:
        return self.alchemy.provide_session()

    def install(self, app: FastAPI) -> None:
        self.alchemy.init_app(app)

    @asynccontextmanager
    async def unit(self) -> AsyncIterator[AsyncSession]:
        async with self.config.get_session() as session:
            yield session
            await session.commit()


class SQLModel(Stack):
    """The session of its tutorial: synchronous, committed by the endpoint."""

    heading = "SQLModel's tutorial"
    distribution = package = "sqlmodel"
    is_sync = True

    def make_engine(self, options: dict[str, Any]) -> Engine:
        url = make_url(self.url)
        driver = {"postgresql+asyncpg": "postgresql+psycopg", "sqlite+aiosqlite": "sqlite"}
        return create_engine(url.set(drivername=driver[url.drivername]), **options)

    @property
    def dependency(self) -> Callable[..., Any]:
        from sqlmodel import Session

        def get_session() -> Iterator[Session]:
            with Session(self.engine) as session:
                yield session

        return get_session

    @asynccontextmanager
    async def unit(self) -> AsyncIterator[Session]:
        from sqlmodel import Session

        with Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    async def run(self, session: Any, statement: Any, parameters: Any = None) -> Any:
        if isinstance(statement, str):
            statement = text(statement)
        return session.connection().execute(statement, parameters)

    async def finish(self, session: Any) -> None:
        session.commit()

    async def close(self) -> None:
        self.engine.dispose()


class PgToolset(Stack):
    """`create_db_dependency`."""

    heading = "pgtoolset"
    distribution = package = "pgtoolset"

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        from pgtoolset import create_db_context, create_db_dependency

        self.session_maker = async_sessionmaker(self.engine, expire_on_commit=False)
        self._dependency = create_db_dependency(self.session_maker)
        self._context = create_db_context(self.session_maker)

    @property
    def dependency(self) -> Callable[..., Any]:
        return self._dependency

    def install(self, app: FastAPI) -> None:
        from pgtoolset.fastapi import install_error_handlers

        install_error_handlers(app)

    @asynccontextmanager
    async def unit(self) -> AsyncIterator[AsyncSession]:
        async with self._context() as session:
            yield session


STACKS: tuple[type[Stack], ...] = (ByHand, FastapiToolsets, AdvancedAlchemy, SQLModel, PgToolset)
ASYNC: tuple[type[Stack], ...] = (ByHand, FastapiToolsets, AdvancedAlchemy, PgToolset)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds that no event tells; fail where it does not in time."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@contextmanager
def plain(url: str) -> Iterator[Any]:
    """A connection beside the stack, to look at what is stored."""
    import psycopg

    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as connection:
        yield connection
