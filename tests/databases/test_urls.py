"""URLs as arguments: every form is taken, and no error shows one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import PostgresDsn, SecretStr, TypeAdapter
from sqlalchemy import URL, MetaData, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from pgtoolset import create_database, drop_database
from pgtoolset._arguments import connect_arguments, engine_url, url_of
from pgtoolset._postgres import urls
from pgtoolset.databases import seal_database
from pgtoolset.errors import UnsupportedDriverError
from pgtoolset.testing import create_db_session, create_worker_database, worker_database_url
from tests.support import Base

TEXT = "postgresql+asyncpg://till:se%40cret@host:5432/shop?application_name=till"


class OwnUrl:
    """An object of another library whose `str()` is a URL."""

    def __init__(self, text: str = TEXT) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


class Unprintable:
    """An object that cannot be shown, with a secret in its error."""

    def __str__(self) -> str:
        raise RuntimeError("secret")


@pytest.mark.parametrize(
    "url",
    [TEXT, make_url(TEXT), TypeAdapter(PostgresDsn).validate_python(TEXT), OwnUrl()],
    ids=["str", "URL", "PostgresDsn", "object"],
)
def test_forms(url: Any) -> None:
    """A string, a SQLAlchemy URL, a PostgresDsn and an object whose str() is a URL are the same."""
    parsed = url_of("server_url", url)
    assert isinstance(parsed, URL)
    assert parsed == make_url(TEXT)
    assert parsed.password == "se@cret"


@pytest.mark.parametrize(
    ("text", "drivername"),
    [
        ("postgres://host/x", "postgresql"),
        ("postgresql://host/x", "postgresql"),
        ("postgresql+asyncpg://host/x", "postgresql+asyncpg"),
        ("postgresql+psycopg://host/x", "postgresql+psycopg"),
        ("postgresql+psycopg_async://host/x", "postgresql+psycopg_async"),
    ],
)
def test_drivers(text: str, drivername: str) -> None:
    """Every name of PostgreSQL is taken, and a URL without a driver gets asyncpg."""
    parsed = url_of("server_url", text)
    assert parsed.drivername == drivername
    named = "postgresql+asyncpg" if drivername == "postgresql" else drivername
    assert engine_url(parsed).drivername == named.removesuffix("_async")


@pytest.mark.parametrize("driver", ["psycopg2", "pg8000", "aiopg", "asyncpg_custom"])
def test_other_drivers(driver: str) -> None:
    """A driver that the library does not use is refused by its name, and the URL is not shown."""
    with pytest.raises(UnsupportedDriverError, match=f"^server_url names the driver {driver}") as e:
        url_of("server_url", f"postgresql+{driver}://u:secret@host/x")
    assert "secret" not in str(e.value)
    taken = url_of("server_url", f"postgresql+{driver}://u:secret@host/x", any_driver=True)
    assert taken == make_url("postgresql://u:secret@host/x")


@pytest.mark.parametrize(
    ("installed", "driver"),
    [({"asyncpg", "psycopg"}, "asyncpg"), ({"asyncpg"}, "asyncpg"), ({"psycopg"}, "psycopg")],
)
def test_the_driver_that_is_installed(
    installed: set[str], driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL without a driver gets the one that is installed, asyncpg first; one that names a driver
    gets that."""
    monkeypatch.delitem(sys.modules, "asyncpg")
    monkeypatch.setattr(urls, "_is_found", installed.__contains__)
    assert engine_url(make_url("postgresql://h/x")).get_driver_name() == driver
    for named in ("asyncpg", "psycopg"):
        assert engine_url(make_url(f"postgresql+{named}://h/x")).get_driver_name() == named


def test_sslmode() -> None:
    """libpq's sslmode becomes asyncpg's ssl, and what only a DSN may have travels in one."""
    url = url_of("server_url", "postgresql://host/x?sslmode=require&application_name=till")
    assert dict(engine_url(url).query) == {
        "ssl": "require",
        "dsn": "postgresql://?application_name=till",
    }


BAD = [
    ("sqlite://", ValueError),
    ("mysql://u:secret@h/x", ValueError),
    (make_url("mysql://u:secret@h/x"), ValueError),
    (OwnUrl("mysql://u:secret@h/x"), ValueError),
    ("no URL: secret", ValueError),
    ("", ValueError),
    ("postgresql://u:secret@h:port/x", ValueError),
    ("//u:secret@h/x", ValueError),
    (OwnUrl("secret"), TypeError),
    (OwnUrl("postgresql://u:secret@h:port/x"), TypeError),
    (SecretStr("postgresql://u:secret@h/x"), TypeError),
    (Unprintable(), TypeError),
    (["postgresql://u:secret@h/x"], TypeError),
    (b"postgresql://u:secret@h/x", TypeError),
    (None, TypeError),
    (7, TypeError),
    (str, TypeError),
]


@pytest.mark.parametrize(("url", "error"), BAD, ids=lambda value: type(value).__name__)
async def test_bad_urls(url: Any, error: type[Exception]) -> None:
    """A bad URL is refused by the name of its argument, and no error or context of one shows it."""
    calls = [
        ("server_url", lambda: create_database("fine", server_url=url)),
        ("server_url", lambda: drop_database("fine", server_url=url)),
        ("server_url", lambda: seal_database("fine", server_url=url)),
        ("database_url", lambda: create_worker_database(url).__aenter__()),
        ("database_url", lambda: create_db_session(url, Base).__aenter__()),
    ]
    for name, call in calls:
        with pytest.raises(error, match=rf"^{name}") as raised:
            await call()
        assert "secret" not in "".join(map(str, (raised.value, raised.value.__context__)))
    with pytest.raises(error, match=r"^database_url") as raised:
        worker_database_url(url, "test")
    assert "secret" not in str(raised.value)


async def test_a_url_as_a_name() -> None:
    """A URL that is given as the name of a database is not shown either."""
    url = f"postgresql://u:secret@h/{'x' * 63}"
    with pytest.raises(ValueError, match=r"^db_name") as raised:
        await create_database(url, server_url="postgresql://u:secret@h/x")
    assert "secret" not in str(raised.value)


async def test_create_with_an_object(server_url: str) -> None:
    """A database is created and dropped by the URL of another library."""
    url = OwnUrl(server_url)
    await create_database("pgtoolset databases url", server_url=url)  # type: ignore[arg-type]
    await drop_database("pgtoolset databases url", server_url=url)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg", "postgres"])
async def test_parameters_of_libpq(server_url: str, scheme: str) -> None:
    """libpq's parameters hold in each function that takes a URL, and in a URL that is returned."""
    url = make_url(server_url)
    host = url.query.get("host", url.host)
    given = (
        f"{scheme}://{url.username}@/{url.database}?host=/nowhere,{host}&port=5432"
        "&application_name=a%20till&options=-c%20work_mem%3D77MB&connect_timeout=9"
        "&sslmode=prefer&target_session_attrs=read-write&gssencmode=disable"
    )
    query = text("SELECT current_setting('application_name') || current_setting('work_mem')")
    async with create_worker_database(given, prefix="pgtoolset urls") as worker:
        engine = create_async_engine(worker)
        async with engine.connect() as connection:
            assert await connection.scalar(query) == "a till77MB"
        await engine.dispose()
        own = worker.replace("postgresql+asyncpg", scheme) + "&connect_timeout=9"
        async with create_db_session(own, MetaData()) as session:
            assert await session.scalar(query) == "a till77MB"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("postgresql://u:p@h1:1,h2/d", {"host": "h1,h2", "port": "1,"}),
        ("postgresql://u:p@h1,h2/d?port=7", {"host": "h1,h2", "port": "7"}),
        ("postgresql://u:p@[::1]:1,h2:2/d", {"host": "::1,h2", "port": "1,2"}),
        ("postgresql://u:p@%2Ftmp/d", {"host": "/tmp"}),
        ("host=/tmp user=u password=p dbname=d", {"host": "/tmp"}),
        ("host = h1,h2 user=u password='p' dbname=d", {"host": "h1,h2"}),
        ("postgresql:///?host=/tmp&user=u&password=p&dbname=d", {"host": "/tmp"}),
    ],
)
def test_forms_of_libpq(given: str, parts: dict[str, str]) -> None:
    """Several hosts, a directory as the host, a DSN, and the parts of a URL as parameters."""
    url = url_of("server_url", given)
    assert (url.username, url.password, url.database, url.host) == ("u", "p", "d", None)
    assert dict(url.query) == parts
    again = engine_url(url)
    assert engine_url(again) == again, "a URL that was translated stays as it is"


@pytest.mark.parametrize(
    "query",
    [
        "channel_binding=require",
        "hostaddr=127.0.0.1",
        "require_auth=scram-sha-256",
        "connect_timeout=soon",
    ],
)
def test_parameters_that_cannot_hold(query: str) -> None:
    """What asyncpg cannot do is refused by the name of the argument, and psycopg's URL is not."""
    for scheme in ("postgresql", "postgresql+asyncpg"):
        with pytest.raises(ValueError, match=r"^server_url: "):
            url_of("server_url", f"{scheme}://u:secret@h/d?{query}")
    assert url_of("server_url", f"postgresql+psycopg://u:secret@h/d?{query}").query


def test_the_time_to_connect() -> None:
    """`connect_timeout` is seconds, of which 0 is no limit, and is in no URL for SQLAlchemy."""
    for value, expected in (("9", 9.0), ("0", None), ("-1", None)):
        url = url_of("server_url", f"postgresql://h/d?connect_timeout={value}")
        assert connect_arguments(url) == {"timeout": expected}
        assert not engine_url(url).query
