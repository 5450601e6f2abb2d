"""URLs of servers and databases. No message shows one: it may carry a password."""

from __future__ import annotations

import re
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote

from sqlalchemy import URL, make_url

from pgtoolset._arguments.shown import shown
from pgtoolset._postgres.urls import (
    connect_arguments,
    is_supported_url,
    unsupported_parameter,
    uses_asyncpg,
)
from pgtoolset._text import may_hold_password, printable
from pgtoolset.errors import UnsupportedDriverError

_EXAMPLE = "postgresql+asyncpg://user@host/database"


class UrlObject(Protocol):
    """A URL of another library whose `str()` is the URL, such as pydantic's `PostgresDsn`."""

    def unicode_string(self) -> str: ...


#: The forms in which a URL is taken.
DatabaseUrl: TypeAlias = str | URL | UrlObject

#: Parameters that name what to connect to. A DSN has at least one of them.
_NAMES = ("host", "port", "dbname", "user", "password", "service", "hostaddr", "passfile")

#: A pair of a DSN: `name=value`, or `name = 'a value with \\' in it'`.
_PAIR = re.compile(
    r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?:\s+|$)", re.DOTALL
)

#: Parts of a libpq URL whose hosts SQLAlchemy does not read: several, or percent-encoded.
_HOSTS = re.compile(r"([\w+]+://(?:[^/?#]*@)?)([^/?#@]*[,%][^/?#@]*)((?:[/?].*)?)", re.DOTALL)
_HOST = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]*)(?::(\d*))?")


def url_of(name: str, value: object, *, any_driver: bool = False) -> URL:
    """Return the URL of a PostgreSQL server that is given as a string or an object.

    A URL may have libpq's forms and parameters, and a string may be a DSN (`host=... dbname=...`).

    Args:
        name: the argument, for messages.
        value: what the caller gave: a string, a SQLAlchemy `URL`, or an object whose `str()` is a
            URL.
        any_driver: whether a URL that names a driver which the library does not use is taken for
            one without a driver.

    Raises:
        UnsupportedDriverError: the URL names such a driver.
        ValueError, TypeError: it is not the URL of a PostgreSQL server.
    """
    parsed = value if isinstance(value, URL) else _parsed(value)
    if parsed is None and isinstance(value, str):
        raise ValueError(f"{name} is not a URL that can be read; it must look like {_EXAMPLE}")
    if parsed is None:
        raise TypeError(f"{name} must be a URL such as {_EXAMPLE}, not {shown(value)}")
    backend = parsed.get_backend_name()
    if backend == "postgres":
        parsed = parsed.set(drivername="postgresql")
    elif backend != "postgresql":
        raise ValueError(f"{name} must be the URL of a PostgreSQL server, such as {_EXAMPLE}")
    if not is_supported_url(parsed):
        if not any_driver:
            raise UnsupportedDriverError(
                f"{name} names the driver {printable(parsed.get_driver_name())}, which pgtoolset "
                "does not use: write postgresql+asyncpg, postgresql+psycopg or postgresql"
            )
        parsed = parsed.set(drivername="postgresql")
    _check(name, parsed)
    return _with_libpq_names(parsed)


def is_connection_string(text: str) -> bool:
    """Whether a text is meant as a URL or a DSN, well-formed or not, and not as a name."""
    return "://" in text or _pairs(text) is not None or may_hold_password(text)


def _check(name: str, url: URL) -> None:
    if url.host is not None and "@" in url.host:
        raise ValueError(f"{name}: a password must be percent-encoded in a URL (%40 for @)")
    if url.port is not None and not 0 < url.port < 2**16:
        raise ValueError(f"{name}: the port of the URL must be from 1 to 65535")
    if not uses_asyncpg(url):
        return
    lacking = unsupported_parameter(url)
    if lacking is not None:
        raise ValueError(
            f"{name}: asyncpg cannot do what the parameter {printable(lacking)} of the URL asks "
            "for: remove it"
        )
    try:
        connect_arguments(url)
    except ValueError:
        wrong = "the time to connect in the URL must be a whole number of seconds"
    else:
        return
    raise ValueError(f"{name}: {wrong}")


def _with_libpq_names(url: URL) -> URL:
    """Move what libpq takes as a parameter to the part of the URL that holds it.

    SQLAlchemy hides the password of a URL, but not one in its parameters.
    """
    parts: dict[str, Any] = {}
    query = dict(url.query)
    for name, part in (("user", "username"), ("password", "password"), ("dbname", "database")):
        if name in query:
            value = query.pop(name)
            parts[part] = value if isinstance(value, str) else value[-1]
    return url.set(query=query, **parts)


def _parsed(value: object) -> URL | None:
    """The URL in a text or in an object's `str()`; `None` for anything else.

    Errors are dropped here, whether SQLAlchemy's or those of the caller's `__str__`: their words
    may show a password.
    """
    if isinstance(value, type | bytes):
        return None
    try:
        text = str(value)
        if "://" in text.partition("=")[0]:
            return _with_hosts(text) or make_url(text)
        return _of_dsn(text) if isinstance(value, str) else None
    except Exception:
        return None


def _with_hosts(text: str) -> URL | None:
    """Return a URL whose hosts SQLAlchemy does not read; `None` for any other."""
    found = _HOSTS.fullmatch(text)
    hosts = [_HOST.fullmatch(each) for each in found[2].split(",")] if found else []
    if found is None or not all(hosts):
        return None
    names = [unquote(each[1].strip("[]")) for each in hosts if each]
    ports = [each[2] or "" for each in hosts if each]
    url = make_url(found[1] + found[3])
    if len(names) == 1 and ports[0]:
        return url.set(port=int(ports[0])).update_query_dict({"host": names[0]})
    known = {"host": ",".join(names)} | ({"port": ",".join(ports)} if any(ports) else {})
    return url.update_query_dict({**known, **url.query})


def _of_dsn(text: str) -> URL | None:
    pairs = _pairs(text)
    if pairs is None:
        return None
    username, password, database = (
        pairs.pop(each, None) for each in ("user", "password", "dbname")
    )
    host, port = pairs.get("host"), pairs.get("port")
    is_plain = host is not None and not host.startswith("/") and "," not in host
    if is_plain:
        pairs = {name: value for name, value in pairs.items() if name not in ("host", "port")}
    return URL.create(
        "postgresql",
        username=username,
        password=password,
        host=host if is_plain else None,
        port=int(port) if is_plain and port else None,
        database=database,
        query=pairs,
    )


def _pairs(text: str) -> dict[str, str] | None:
    """Return the parameters of a DSN of libpq, `None` for another text."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        if pair is None:
            return None
        found[pair[1]] = re.sub(r"\\(.)", r"\1", pair[2] if pair[3] is None else pair[3])
        at = pair.end()
    return found if any(name in found for name in _NAMES) else None
