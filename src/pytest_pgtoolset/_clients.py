"""Starlette's `TestClient` for sync tests, in the event loop of the sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self

from pgtoolset.testing.lifespans import AsgiApplication, lifespan_of, overridden

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from starlette.testclient import TestClient


class OpenClient(Protocol):
    """What `pg_client` is: a function that opens a client until the end of the test."""

    def __call__(
        self,
        app: AsgiApplication,
        *,
        dependency_overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
        lifespan: bool = True,
        **options: Any,
    ) -> TestClient: ...


@contextmanager
def clients_on(portal: BlockingPortal) -> Iterator[OpenClient]:
    """Yield a function that opens clients, whose applications run in the loop of a portal."""
    from starlette.testclient import TestClient

    class Client(TestClient):
        """Runs on the portal as it is, where `TestClient` would start one, with another loop."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    with ExitStack() as stack:

        def open_client(
            app: AsgiApplication,
            *,
            dependency_overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
            lifespan: bool = True,
            **options: Any,
        ) -> TestClient:
            overrides = {} if dependency_overrides is None else dependency_overrides
            stack.enter_context(overridden(app, overrides))
            block = lifespan_of(app, run=lifespan)
            served = stack.enter_context(portal.wrap_async_context_manager(block))
            client = Client(served, **options)
            stack.callback(client.close)
            client.portal = portal
            return client

        yield open_client
