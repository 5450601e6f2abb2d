"""URLs of servers and databases. No message shows one: it may carry a password."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from sqlalchemy import URL, make_url

from pgtoolset._arguments.shown import shown

_ASYNCPG = "postgresql+asyncpg"
_EXAMPLE = f"{_ASYNCPG}://user@host/database"


class UrlObject(Protocol):
    """A URL of another library whose `str()` is the URL, such as pydantic's `PostgresDsn`."""

    def unicode_string(self) -> str: ...


#: The forms in which a URL is taken.
DatabaseUrl: TypeAlias = str | URL | UrlObject


def url_of(name: str, value: object) -> URL:
    """Return the URL of a PostgreSQL server that is given as a string or an object.

    Args:
        name: the argument, for messages.
        value: what the caller gave: a string, a SQLAlchemy `URL`, or an object whose `str()` is a
            URL.
    """
    parsed = value if isinstance(value, URL) else _parsed(value)
    if parsed is None and isinstance(value, str):
        raise ValueError(f"{name} is not a URL that can be read; it must look like {_EXAMPLE}")
    if parsed is None:
        raise TypeError(f"{name} must be a URL such as {_EXAMPLE}, not {shown(value)}")
    backend = parsed.get_backend_name()
    if backend == "postgres":
        return parsed.set(drivername="postgresql")
    if backend != "postgresql":
        raise ValueError(f"{name} must be the URL of a PostgreSQL server, such as {_EXAMPLE}")
    return parsed


def asyncpg_url(url: URL) -> URL:
    """Return the URL for `create_async_engine`: one that names no driver gets asyncpg."""
    return with_asyncpg(url) if url.drivername == "postgresql" else url


def with_asyncpg(url: URL) -> URL:
    """Return the URL for `create_async_engine` with asyncpg, whatever driver it names."""
    # libpq's name for this parameter is sslmode, asyncpg's is ssl, and SQLAlchemy hands it on.
    query = {("ssl" if name == "sslmode" else name): each for name, each in url.query.items()}
    return url.set(drivername=_ASYNCPG, query=query)


def _parsed(value: object) -> URL | None:
    """The URL in a text or in an object's `str()`; `None` for anything else.

    Errors are dropped here, whether SQLAlchemy's or those of the caller's `__str__`: their words
    may show a password.
    """
    if isinstance(value, type | bytes):
        return None
    try:
        text = str(value)
        return make_url(text) if "://" in text else None
    except Exception:
        return None
