"""The server of `create_database` and `drop_database`: each form of a URL finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL, make_url

from pgtoolset import create_database, drop_database
from pgtoolset.databases import seal_database
from tests.databases.making import PREFIX, exists

pytestmark = pytest.mark.usefixtures("databases_gone")


@pytest.mark.parametrize(
    "database", ["postgres", "template1", None, "pgtoolset databases that is not there"]
)
@pytest.mark.parametrize(
    "driver", ["postgresql+asyncpg", "postgresql", "postgres", "postgresql+psycopg"]
)
async def test_any_url(
    server_url: str, other: asyncpg.Connection, driver: str, database: str | None
) -> None:
    """A URL of any form, with any database or none in it, finds the server."""
    url = make_url(server_url).set(drivername=driver)
    url = URL.create(driver, url.username, url.password, url.host, url.port, database, url.query)
    name = f"{PREFIX} url"
    await create_database(name, server_url=url)
    assert await exists(other, name)
    await drop_database(name, server_url=url.render_as_string(hide_password=False))
    assert not await exists(other, name)


async def test_url_of_the_database_itself(server_url: str, other: asyncpg.Connection) -> None:
    """The URL may name the very database that is made or dropped."""
    name = f"{PREFIX} itself"
    url = make_url(server_url).set(database=name)
    await create_database(name, server_url=url)
    await drop_database(name, server_url=url)
    assert not await exists(other, name)


async def test_arguments_of_the_url(server_url: str, other: asyncpg.Connection) -> None:
    """Parameters of SQLAlchemy's dialect and of libpq in the URL are understood."""
    url = make_url(server_url)
    with_cache = url.update_query_dict({"prepared_statement_cache_size": "0"})
    await create_database(f"{PREFIX} 1", server_url=with_cache)
    with_libpq = url.set(drivername="postgresql").update_query_dict(
        {"application_name": "x", "sslmode": "disable"}
    )
    await create_database(f"{PREFIX} 2", server_url=with_libpq)
    assert await exists(other, f"{PREFIX} 1")
    assert await exists(other, f"{PREFIX} 2")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("sqlite://", ValueError),
        ("mysql://u:secret@h/x", ValueError),
        ("no URL: secret", ValueError),
        ("postgresql://u:secret@h:port/x", ValueError),
        (None, TypeError),
        (7, TypeError),
    ],
)
async def test_bad_urls(url: Any, error: type[Exception]) -> None:
    """A URL that leads to no PostgreSQL is refused, and the error does not show its password."""
    for call in (create_database, drop_database, seal_database):
        with pytest.raises(error, match="server_url") as raised:
            await call("fine", server_url=url)
        assert "secret" not in str(raised.value)


async def test_maintenance_database_is_closed(
    server_url: str, other: asyncpg.Connection, connect_to: Callable[..., Any]
) -> None:
    """Where `postgres` refuses connections, the database of the URL is used."""
    name = f"{PREFIX} door"
    await create_database(name, server_url=server_url)
    url = make_url(server_url).set(database=name)
    await other.execute("ALTER DATABASE postgres WITH ALLOW_CONNECTIONS false")
    try:
        await create_database(f"{PREFIX} house", server_url=url)
        assert await exists(other, f"{PREFIX} house")
        await create_database(
            f"{PREFIX} other", server_url=url.set(database="postgres")
        )  # through template1
        assert await exists(other, f"{PREFIX} other")
    finally:
        await other.execute("ALTER DATABASE postgres WITH ALLOW_CONNECTIONS true")


async def test_no_server() -> None:
    """A server that cannot be reached is the driver's own error, at once."""
    with pytest.raises(OSError):
        await create_database("fine", server_url="postgresql+asyncpg://nobody@127.0.0.1:1/x")
