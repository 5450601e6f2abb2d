"""The server that a run is given: tried once, before the tests, and described where that fails."""

from __future__ import annotations

import asyncio
from urllib.parse import quote, quote_plus

from sqlalchemy import make_url

from pgtoolset.testing.server import try_connection

#: Seconds for a connection: a firewall may drop the packets without an answer.
_TIMEOUT = 15.0


async def try_server(url: str) -> None:
    """Connect to the server and leave it."""
    async with asyncio.timeout(_TIMEOUT):
        await try_connection(url)


def refusal(source: str, url: str, error: Exception) -> str:
    """Return what to tell the user, without the password.

    Args:
        source: where the URL comes from.
        url: the URL.
        error: what the connection has failed with.
    """
    parsed = make_url(url)
    hosts = parsed.host or parsed.query.get("host") or "the default socket or localhost"
    port = parsed.port or parsed.query.get("port") or 5432
    user = parsed.username or parsed.query.get("user")
    tried = f"{_text(hosts)}, port {_text(port)}" + (f", as {_text(user)}" if user else "")
    reason = str(error) or f"no answer within {_TIMEOUT:g} s"
    for secret in {parsed.password, *_texts(parsed.query.get("password"))}:
        for form in {secret, quote(secret or ""), quote_plus(secret or "")}:
            reason = reason.replace(form, "***") if form else reason
    return (
        f"the PostgreSQL server of {source} cannot be reached: {tried}: {type(error).__name__}: "
        f"{_printable(reason)}. Start that server or correct the URL. Without {source} the run "
        "uses the next of --pg-url, pg_url and DATABASE_URL that is set, or an embedded server"
    )


def _texts(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, tuple) else ()


def _text(value: object) -> str:
    return _printable(", ".join(_texts(value)) or str(value))


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)
