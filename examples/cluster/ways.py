"""The ways of an application to the cluster: its engines, and their options."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from uuid import uuid4

import asyncpg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from examples.cluster.cluster import Cluster
from examples.cluster.network import HOST
from examples.cluster.node import DATABASE, ROLE

Driver: TypeAlias = Literal["asyncpg", "psycopg"]
Maker: TypeAlias = async_sessionmaker[AsyncSession]

#: Multi-host URL, HAProxy, PgBouncer before HAProxy.
WAYS = ("hosts", "haproxy", "pgbouncer")

#: Seconds that an answer may take before the client gives the connection up. A machine that
#: freezes closes nothing, so without it a client waits until the machine is back.
PATIENCE = 4


@dataclass(frozen=True)
class Way:
    """A way to the cluster.

    Attributes:
        name: its name.
        engine: reaches the primary.
        standbys: engines that reach standbys.
    """

    name: str
    engine: AsyncEngine
    standbys: tuple[AsyncEngine, ...]

    @property
    def maker(self) -> Maker:
        """Make sessions on the primary."""
        return async_sessionmaker(self.engine, expire_on_commit=False)

    @property
    def standby_makers(self) -> list[Maker]:
        """Make sessions on standbys."""
        return [async_sessionmaker(engine, expire_on_commit=False) for engine in self.standbys]


class PrimaryOf:
    """Connects to the primary, trying one node after the other, the last one that was it first.

    asyncpg does so itself where a URL has several hosts, but within one timeout for all: a node
    that is frozen uses it up, and those behind it are not tried. psycopg has one for each.

    Args:
        urls: the URLs of the nodes, for SQLAlchemy.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = [make_url(url) for url in urls]

    async def __call__(self) -> asyncpg.Connection:
        failure: Exception | None = None
        for url in tuple(self._urls):
            try:
                connection = await asyncpg.connect(
                    host=url.host,
                    port=url.port,
                    user=url.username,
                    password=url.password,
                    database=url.database,
                    timeout=1,
                    command_timeout=PATIENCE,
                    target_session_attrs="read-write",
                )
            except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
                failure = error
            else:
                self._urls.sort(key=lambda each: each != url)
                return connection
        assert failure is not None
        raise failure


@asynccontextmanager
async def opened_way(
    name: str, cluster: Cluster, driver: Driver, *, label: str | None = None, **options: Any
) -> AsyncIterator[Way]:
    """Make the engines of a way, and dispose of them at the end of the block.

    Args:
        name: one of `WAYS`.
        cluster: where it leads.
        driver: the driver of the engines.
        label: what the way is called, where that is not its name.
        options: more options of the engine.
    """
    scheme = f"postgresql+{driver}"
    url = cluster.urls(scheme)[name]
    if name == "hosts":
        standbys = [node.url(scheme) for node in cluster.nodes]
    else:
        login = f"{scheme}://{ROLE}:{cluster.plan.password}"
        standbys = [f"{login}@{HOST}:{cluster.haproxy.standbys}/{DATABASE}"]
    options |= _options(driver, pooled=name == "pgbouncer")
    if name == "hosts" and driver == "asyncpg":
        options["async_creator"] = PrimaryOf(standbys)
    engines = [
        create_async_engine(url, **options),
        *(create_async_engine(each, **_options(driver)) for each in standbys),
    ]
    try:
        yield Way(label or name, engines[0], tuple(engines[1:]))
    finally:
        for engine in engines:
            await engine.dispose()


def _options(driver: Driver, *, pooled: bool = False) -> dict[str, Any]:
    arguments: dict[str, Any]
    if driver == "asyncpg":
        arguments = {"timeout": 2, "command_timeout": PATIENCE}
        if pooled:
            # Behind a pooler no prepared statement outlives its transaction.
            arguments |= {
                "statement_cache_size": 0,
                "prepared_statement_cache_size": 0,
                "prepared_statement_name_func": lambda: f"s_{uuid4()}",
            }
    else:
        arguments = {"connect_timeout": 2}
        if pooled:
            arguments["prepare_threshold"] = None
    return {
        "pool_size": 6,
        "max_overflow": 4,
        "pool_timeout": 2,
        "pool_use_lifo": True,
        "connect_args": arguments,
    }
