"""`create_read_dependency`: read blocks for FastAPI, with the token of the request."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import shown
from pgtoolset._requests import http_connection_type, take_connection
from pgtoolset.protocols import DatabaseDependency
from pgtoolset.replicas.reading import ReadReplicas

__all__ = ["create_read_dependency"]

S = TypeVar("S", bound=AsyncSession)


def create_read_dependency(replicas: ReadReplicas[S]) -> DatabaseDependency[S]:
    """Make a FastAPI dependency that reads on a standby which has what the client has written.

    Use it as a plain `Depends(get_reader)`. The session is that of `replicas.read(after=token)`,
    with the token that the client has sent in the header or the cookie of `replicas`; without one,
    on any standby. The block ends after the response, so a streaming response can read;
    `Depends(get_reader, scope="function")` ends it before the response.

    Without FastAPI, `async for session in get_reader(): ...` and `asynccontextmanager(get_reader)`
    give a read block without a token.

    Args:
        replicas: the nodes. It need not be installed in the application for this.

    Returns:
        An async generator function of one session, typed as the sessions of `replicas`.

    Raises:
        TypeError: `replicas` is no `ReadReplicas`.

    Example:
        >>> get_reader = create_read_dependency(replicas)
        >>> @app.get("/orders/{id}")
        ... async def read_order(
        ...     id: int, session: Annotated[AsyncSession, Depends(get_reader)]
        ... ) -> OrderOut: ...

    See https://www.postgresql.org/docs/current/hot-standby.html
    """
    if not isinstance(replicas, ReadReplicas):
        raise TypeError(f"replicas must be a ReadReplicas, not {shown(replicas)}")

    async def get_reader(*, connection: Any = None) -> AsyncGenerator[S, None]:
        token = None if connection is None else replicas.token_of(connection)
        async with replicas.read(after=token) as session:
            yield session

    connection_type = http_connection_type()
    if connection_type is not None:
        take_connection(get_reader, connection_type)
    return get_reader
