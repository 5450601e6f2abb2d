"""The request that FastAPI serves: how it reaches a dependency, and its exit stacks."""

from __future__ import annotations

import asyncio
import inspect
import sys
from contextlib import AsyncExitStack
from typing import Any

from pgtoolset._compatibility import unsupported

#: The keys of the ASGI scope where FastAPI, from 0.121 on, keeps two exit stacks: it unwinds the
#: first between the endpoint and the response, the second after the response. FastAPI does not
#: document them; see docs/compatibility.md.
_FUNCTION_STACK = "fastapi_function_astack"
_REQUEST_STACK = "fastapi_inner_astack"


def http_connection_type() -> type | None:
    """Return the base class of requests and websockets; `None` where FastAPI is not installed."""
    try:
        from starlette.requests import HTTPConnection  # FastAPI re-exports it, but imports more
    except ModuleNotFoundError:
        return None
    return HTTPConnection


def make_injectable(get_db: Any, connection_type: type) -> None:
    """Let FastAPI call `get_db` with the request or websocket, and await the result.

    FastAPI passes the connection to a parameter of this type. It has a default and is not part of
    the declared type, so that `get_db()` can be called without FastAPI.

    For an async generator function FastAPI would make a context manager, a cancel scope and two
    more coroutines in each request: 50 us, more than all the rest of this module.
    """
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(get_db)
    else:
        get_db._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    parameter = inspect.Parameter(
        "connection", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=connection_type
    )
    get_db.__signature__ = inspect.Signature([parameter])


def exit_stacks(connection: Any) -> tuple[AsyncExitStack, AsyncExitStack]:
    """Return FastAPI's exit stacks before and after the response."""
    before_response = connection.scope.get(_FUNCTION_STACK)
    after_response = connection.scope.get(_REQUEST_STACK)
    if isinstance(before_response, AsyncExitStack) and isinstance(after_response, AsyncExitStack):
        return before_response, after_response
    raise unsupported(
        "fastapi",
        f"exit stacks {_FUNCTION_STACK!r} and {_REQUEST_STACK!r} in the scope of the request",
        "Depends(get_db) cannot commit before the response",
        "Use FastAPI 0.121 or newer.",
    )
