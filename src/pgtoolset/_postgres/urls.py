"""The driver and the parameters of a URL: libpq's, in the form that SQLAlchemy and the driver take.

psycopg takes libpq's parameters as they are. With asyncpg, SQLAlchemy hands each parameter of a URL
to `asyncpg.connect` as a keyword, and asyncpg has few of libpq's names as keywords. It knows the
others in a DSN of its own, so they travel in one, as the parameter `dsn`.
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS and
https://docs.sqlalchemy.org/en/20/core/engines.html#custom-dbapi-args
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import URL

__all__ = [
    "connect_arguments",
    "driver_named",
    "engine_url",
    "is_supported_url",
    "unsupported_parameter",
    "uses_asyncpg",
    "with_asyncpg",
]

_ASYNCPG = "postgresql+asyncpg"
_PSYCOPG = "postgresql+psycopg"

#: The drivers that a URL may name; the first is SQLAlchemy's name for a server without a driver.
_NAMED = {"postgresql": None, _ASYNCPG: "asyncpg", _PSYCOPG: "psycopg"}
_NAMED[f"{_PSYCOPG}_async"] = "psycopg"

#: What the driver or SQLAlchemy's adapter takes by this name.
_KEYWORDS = frozenset(
    {
        *("host", "port", "ssl", "passfile", "servicefile", "direct_tls", "target_session_attrs"),
        *("krbsrvname", "gsslib", "command_timeout", "statement_cache_size", "dsn"),
        *("max_cached_statement_lifetime", "max_cacheable_statement_size", "async_fallback"),
        *("prepared_statement_cache_size", "prepared_statement_name_func"),
    }
)

#: The time to connect: seconds, which a URL cannot hold as the number that asyncpg needs.
_TIMEOUTS = ("connect_timeout", "timeout")

#: What libpq does and asyncpg does not, with the values that ask for nothing of it.
_LACKING = {
    "channel_binding": {"disable", "prefer"},
    "gssdelegation": {"0"},
    "gssencmode": {"disable", "prefer"},
    "hostaddr": set(),
    "keepalives": {"1"},
    "keepalives_count": {"0"},
    "keepalives_idle": {"0"},
    "keepalives_interval": {"0"},
    "load_balance_hosts": {"disable"},
    "replication": {"false", "off", "no", "0"},
    "require_auth": set(),
    "requirepeer": set(),
    "sslcertmode": {"allow"},
    "sslcompression": {"0"},
    "sslsni": {"1"},
    "tcp_user_timeout": {"0"},
}


def is_supported_url(url: URL) -> bool:
    """Whether a URL names one of the drivers, or none."""
    return url.drivername in _NAMED


def driver_named(url: URL) -> str:
    """Return the driver for a URL: the one that it names, or the first that is installed."""
    return _NAMED.get(url.drivername) or ("asyncpg" if _has_asyncpg() else "psycopg")


def uses_asyncpg(url: URL) -> bool:
    """Whether asyncpg connects to what a URL names."""
    return driver_named(url) == "asyncpg"


@cache
def _is_found(name: str) -> bool:
    return find_spec(name) is not None


def _has_asyncpg() -> bool:
    """Whether asyncpg is installed, or psycopg is not. Nothing is imported."""
    if "asyncpg" in sys.modules:
        return sys.modules["asyncpg"] is not None
    return _is_found("asyncpg") or not _is_found("psycopg")


def engine_url(url: URL) -> URL:
    """Return the URL for `create_async_engine`, with the driver of `driver_named`."""
    if uses_asyncpg(url):
        return with_asyncpg(url)
    return url.set(drivername=_PSYCOPG, query=_with_ports(dict(url.query)))


def with_asyncpg(url: URL) -> URL:
    """Return the URL for `create_async_engine` with asyncpg, whatever driver it names.

    What `connect_arguments` returns is not in it.
    """
    query: dict[str, Any] = {}
    for_dsn: dict[str, str] = {}
    for name, value in url.query.items():
        if name in _TIMEOUTS or name in _LACKING:
            continue
        if name == "sslmode":
            query["ssl"] = _last(value)
        elif name in _KEYWORDS:
            query[name] = value
        else:
            for_dsn[name] = _last(value)
    fallback = for_dsn.pop("fallback_application_name", None)
    if fallback is not None:
        for_dsn.setdefault("application_name", fallback)
    if for_dsn:
        dsn = _last(query.get("dsn", "postgresql://"))
        query["dsn"] = f"{dsn}{'&' if '?' in dsn else '?'}{urlencode(for_dsn)}"
    return url.set(drivername=_ASYNCPG, query=_with_ports(query))


def connect_arguments(url: URL) -> dict[str, Any]:
    """Return the arguments of `asyncpg.connect` that a URL cannot hold, for `connect_args`.

    psycopg takes no such arguments.

    Raises:
        ValueError: a time is not a whole number, as libpq has it.
    """
    if not uses_asyncpg(url):
        return {}
    for name in _TIMEOUTS:
        if name in url.query:
            seconds = int(_last(url.query[name]))
            return {"timeout": float(seconds) if seconds > 0 else None}
    return {}


def unsupported_parameter(url: URL) -> str | None:
    """Return the name of a parameter that asks for what asyncpg cannot do."""
    for name, value in url.query.items():
        if name in _LACKING and _last(value).lower() not in _LACKING[name]:
            return name
    return None


def _with_ports(query: dict[str, Any]) -> dict[str, Any]:
    """Give each of several hosts a port, which SQLAlchemy asks for."""
    hosts = query.get("host", "")
    if isinstance(hosts, str):
        names, ports = hosts.split(","), _list(query.get("port", ""))
    else:  # SQLAlchemy's own form, host=one:5432&host=two:5433
        names = [each.partition(":")[0] for each in hosts]
        ports = [each.partition(":")[2] for each in hosts]
    if len(names) < 2:
        return query
    ports = ports * len(names) if len(ports) == 1 else ports  # as libpq has it
    return {**query, "host": ",".join(names), "port": ",".join(each or "5432" for each in ports)}


def _list(value: str | Sequence[str]) -> list[str]:
    return value.split(",") if isinstance(value, str) else list(value)


def _last(value: str | Sequence[str]) -> str:
    """Return the value of a parameter: libpq takes the last of several."""
    return value if isinstance(value, str) else value[-1]
