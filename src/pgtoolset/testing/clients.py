"""An HTTP client on an ASGI application, with its lifespan and without a server."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pgtoolset._arguments import check_flag, check_function, shown
from pgtoolset.testing.lifespans import AsgiApplication, lifespan_of, overridden

if TYPE_CHECKING:
    import httpx

__all__ = ["create_test_client"]


@asynccontextmanager
async def create_test_client(
    app: AsgiApplication,
    *,
    dependency_overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    base_url: str = "http://test",
    lifespan: bool = True,
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the lifespan of an application and yield a client, whose requests the loop itself serves.

    The application runs in the event loop of the caller, so it can use the connections of a test.
    The lifespan runs in a task of its own. The end of the block always shuts the application down,
    after an error or a cancellation too. A request raises the exception that the application does
    not handle, as `httpx.ASGITransport` does by default. See https://www.python-httpx.org/ and
    https://asgi.readthedocs.io/en/latest/specs/lifespan.html

    Args:
        app: any ASGI application.
        dependency_overrides: added to `app.dependency_overrides` of FastAPI for the block. At its
            end that attribute is the same mapping with the same content as before.
        base_url: what relative URLs of requests are relative to.
        lifespan: run startup and shutdown. Requests see the state that the startup has set. An
            application that raises for the scope `lifespan` needs `False`; one that returns at once
            does not.

    Yields:
        The client.

    Raises:
        LifespanError: the application answers that its startup or shutdown has failed. An exception
            that leaves its lifespan is raised itself. Where the block has failed too, that error
            is raised, and the one of the shutdown is a note on it and a warning in the log.
        ImportError: httpx is not installed.
        ValueError, TypeError: an argument is wrong; before the application is called.

    Example:
        >>> get_db = create_db_dependency(session_maker=session_maker)
        >>> overrides = {get_db: lambda: session}
        >>> async with create_test_client(app, dependency_overrides=overrides) as client:
        ...     response = await client.get("/orders/1")
        >>> assert response.status_code == 404
    """
    check_function("app", "an ASGI application", app)
    check_flag("lifespan", lifespan)
    overrides = {} if dependency_overrides is None else dependency_overrides
    with overridden(app, overrides):
        httpx = await asyncio.to_thread(_import_httpx)
        url = _check_base_url(httpx, base_url)
        async with lifespan_of(app, run=lifespan) as served:
            transport = httpx.ASGITransport(served)
            async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                yield client


def _check_base_url(httpx: Any, base_url: object) -> Any:
    try:
        url = httpx.URL(base_url) if isinstance(base_url, str) else None
    except httpx.InvalidURL:
        url = None
    if url is None or url.scheme not in ("http", "https") or not url.host:
        error = ValueError if isinstance(base_url, str) else TypeError
        raise error(f'base_url must be a URL such as "http://test", not {shown(base_url)}')
    return url


def _import_httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ModuleNotFoundError as error:
        raise ImportError(
            "httpx is not installed, and create_test_client needs it: run "
            'pip install "httpx>=0.27" or pip install "pgtoolset[testing]"'
        ) from error
