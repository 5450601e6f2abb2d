"""The request that FastAPI serves: its session, and the exit stacks that commit and close it."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, NoReturn, TypeVar
from weakref import ref

from pgtoolset._arguments import is_async, is_generator, sync_session
from pgtoolset._compatibility import unsupported
from pgtoolset._record import record_of
from pgtoolset._units import NO_UNIT_OPTIONS, NOT_GIVEN, UnitOfWork, UnitOptions
from pgtoolset.errors import TransactionAbortedError, TransactionStateError
from pgtoolset.protocols import ManagedSession, SessionFactory
from pgtoolset.types import CommitObserver, ReadTokens

S = TypeVar("S", bound=ManagedSession)
T = TypeVar("T")

#: The keys of the ASGI scope where FastAPI, from 0.121 on, keeps two exit stacks: it unwinds the
#: first between the endpoint and the response, the second after the response. FastAPI does not
#: document them; see docs/compatibility.md.
_FUNCTION_STACK = "fastapi_function_astack"
_REQUEST_STACK = "fastapi_inner_astack"

#: The attribute of FastAPI's exit stacks that keeps the units of work of the request. A stack is
#: made for one request, while a scope may be copied and handed on.
_UNITS = "_pgtoolset_units"


def http_connection_type() -> type | None:
    """Return the base class of requests and websockets; `None` where FastAPI is not installed."""
    try:
        from starlette.requests import HTTPConnection  # FastAPI re-exports it, but imports more
    except ModuleNotFoundError:
        return None
    return HTTPConnection


def as_dependency(settings: Any) -> Any | None:
    """Return what FastAPI calls in each request for the settings; `None` for a plain mapping, and
    for a plain function without parameters, for which FastAPI would use a thread.
    """
    for each in (settings, *getattr(settings, "__metadata__", ())):  # of Annotated[...]
        if _is_depends(each):
            return each
    if isinstance(settings, Mapping) or not callable(settings):
        return None
    try:
        parameters = inspect.signature(settings).parameters
    except (TypeError, ValueError):
        return None  # a function of C that does not say
    if not parameters and not is_async(settings) and not is_generator(settings):
        return None
    from fastapi import Depends

    return Depends(settings)


def _is_depends(value: object) -> bool:
    kind = type(value)
    return kind.__module__ == "fastapi.params" and kind.__name__ in ("Depends", "Security")


def raise_settings_by_hand() -> NoReturn:
    """Raise for `get_db()` whose settings only FastAPI can resolve."""
    raise TypeError(
        "settings is a dependency of FastAPI, and get_db() was called without FastAPI: write "
        "create_db_context(session_maker, settings=...) with a mapping, or a function without "
        "parameters, for use outside of a request"
    )


def make_injectable(get_db: Any, connection_type: type, settings: Any = None) -> None:
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
    take_connection(get_db, connection_type, settings)


def take_connection(dependency: Any, connection_type: type, settings: Any = None) -> None:
    """Let FastAPI pass the request or websocket to a dependency, as its argument `connection`; and
    what another dependency gives as `settings`.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("connection", keyword, default=None, annotation=connection_type)
    ]
    if settings is not None:
        parameters.append(inspect.Parameter("settings", keyword, default=settings, annotation=Any))
    dependency.__signature__ = inspect.Signature(parameters)


def raise_called_by_hand() -> NoReturn:
    """Raise for `get_db(request)`: only FastAPI knows when the response of a request starts."""
    raise TypeError(
        "get_db() takes no arguments: in a FastAPI endpoint write Depends(get_db), and FastAPI "
        "passes the request. In a Starlette route, a middleware or an exception handler write "
        "`async with db_context() as session`, with the function of create_db_context()."
    )


async def session_of_request(
    connection: Any,
    key: object,
    session_maker: SessionFactory[S],
    options: UnitOptions = NO_UNIT_OPTIONS,
    replicas: ReadTokens | None = None,
    settings: object = NOT_GIVEN,
) -> S:
    """Return the session of a request: the first call for `key` makes it, and each later one finds
    it, however FastAPI came to call again (`use_cache=False`, another scope, `Security`).
    """
    before_response, after_response = _exit_stacks(connection)
    units: RequestUnits | None = vars(after_response).get(_UNITS)
    if units is None:
        units = RequestUnits(before_response)
        _watch(before_response, EndpointStack, units)
        _watch(after_response, ResponseStack, units)
    unit: RequestUnit[S] | None = units.open.get(key)
    if unit is None:
        observer = None if replicas is None else replicas.observer_of(connection.scope)
        unit = RequestUnit(session_maker, units, options, observer, settings)
        after_response.push_async_exit(unit.finish)
        await unit.begin()
        before_response.push_async_exit(unit.commit_unless_failed)
        units.open[key] = unit
    return unit.session


def session_of_request_in_thread(
    connection: Any,
    key: object,
    session_maker: SessionFactory[S],
    options: UnitOptions = NO_UNIT_OPTIONS,
    replicas: ReadTokens | None = None,
    settings: object = NOT_GIVEN,
) -> S:
    """Return the session of a request where FastAPI has called the dependency in a thread.

    FastAPI 0.121 takes `partial(get_db)` for a function that is not a coroutine function.
    """
    from anyio import from_thread

    return from_thread.run(
        session_of_request, connection, key, session_maker, options, replicas, settings
    )


class RequestUnits:
    """The units of work of one request, and the exception that has left its endpoint.

    Attributes:
        open: one unit for each dependency of `create_db_dependency` that the request has used.
        failure: the type of the exception because of which none of them commits any more.
    """

    __slots__ = ("_before_response", "_has_left_endpoint", "failure", "open")

    def __init__(self, before_response: AsyncExitStack) -> None:
        self.open: dict[object, RequestUnit[Any]] = {}
        self.failure: type[BaseException] | None = None
        self._has_left_endpoint = False
        self._before_response = ref(before_response)  # which keeps these units

    def note_endpoint(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Note how the endpoint ended: the first exit of the stack before the response sees it.

        The later ones see exceptions of the exit code of dependencies too. One that a dependency
        handles does not undo the endpoint, whose response goes out.
        """
        if not self._has_left_endpoint:
            self._has_left_endpoint = True
            self.failure = exc_type

    def note(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Note an exception at an exit of the stack after the response.

        Each counts: the exceptions of some streams leave the exit of a context manager of FastAPI.
        """
        if exc_type is not None:
            self.failure = exc_type

    def insist(self, error: BaseException) -> None:
        """Raise `error`, because of which nothing was committed, where a dependency swallows it.

        The endpoint has returned its response, which would go out for work that is not stored.
        """

        def insist(exc_type: object, exc: object, traceback: object) -> None:
            if exc_type is not None:
                return
            if isinstance(error, Exception):
                raise error
            # The cancellation by a timeout of a dependency, which has handled it.
            raise TransactionAbortedError(
                "The request was cancelled before its commit, and a dependency handled the "
                "cancellation as if the work was stored; it was rolled back. Let that dependency "
                "raise an error after its timeout."
            ) from error

        self.failure = type(error)
        stack = self._before_response()
        assert stack is not None  # it is being unwound
        rest = stack.pop_all()
        stack.push(insist)
        stack.push_async_exit(rest)


class RequestUnit(UnitOfWork[S]):
    """A unit of work that ends with a request."""

    __slots__ = ("_units",)

    def __init__(
        self,
        session_maker: SessionFactory[S],
        units: RequestUnits,
        options: UnitOptions = NO_UNIT_OPTIONS,
        observer: CommitObserver | None = None,
        settings: object = NOT_GIVEN,
    ) -> None:
        super().__init__(session_maker, options, settings)
        self._units = units
        if observer is not None:
            record_of(sync_session(self.session)).observer = observer

    async def commit_unless_failed(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit before the response, unless an exception has left the endpoint, or reached this
        exit from the exit code of a dependency.
        """
        units = self._units
        units.note_endpoint(exc_type)
        if units.failure is not None:
            return
        try:
            await super().commit_unless_failed(exc_type, exc, traceback)
        except BaseException as error:
            units.insist(error)
            raise
        if self._sync is not None:
            record_of(self._sync).observer = None  # the response starts now
        if exc is not None:
            units.insist(exc)

    async def finish(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit what the stream wrote, unless an exception has left the endpoint or the stream,
        and close.
        """
        await super().finish(exc_type or self._units.failure, exc, traceback)


class EndpointStack(AsyncExitStack):
    """FastAPI's stack before the response, while its request has a session of ours.

    Another dependency may swallow an exception, and the exits below it would see none. So an exit
    of ours follows each context manager, and sees the exception before it.
    """

    async def enter_async_context(self, cm: AbstractAsyncContextManager[T, bool | None]) -> T:
        value = await super().enter_async_context(cm)
        self.push(vars(self)[_UNITS].note_endpoint)
        return value


class ResponseStack(AsyncExitStack):
    """FastAPI's stack after the response, watched in the same way."""

    async def enter_async_context(self, cm: AbstractAsyncContextManager[T, bool | None]) -> T:
        value = await super().enter_async_context(cm)
        self.push(vars(self)[_UNITS].note)
        return value


def _exit_stacks(connection: Any) -> tuple[AsyncExitStack, AsyncExitStack]:
    """Return FastAPI's exit stacks before and after the response."""
    scope = connection.scope
    if not hasattr(scope.get("route"), "dependant"):  # of an APIRoute or an APIWebSocketRoute
        raise TransactionStateError(
            f"Depends(get_db) cannot commit before the response of {scope.get('path')!r}: it is "
            "not served by an endpoint of FastAPI, but by app.frontend(), a Starlette route or a "
            "middleware. In a dependency of such a place write `async with db_context() as "
            "session`, with the function of create_db_context()."
        )
    before_response = scope.get(_FUNCTION_STACK)
    after_response = scope.get(_REQUEST_STACK)
    if isinstance(before_response, AsyncExitStack) and isinstance(after_response, AsyncExitStack):
        return before_response, after_response
    raise unsupported(
        "fastapi",
        f"exit stacks {_FUNCTION_STACK!r} and {_REQUEST_STACK!r} in the scope of the request",
        "Depends(get_db) cannot commit before the response",
        "Use FastAPI 0.121 or newer.",
    )


def _watch(stack: AsyncExitStack, kind: type[AsyncExitStack], units: RequestUnits) -> None:
    """Make a stack, which FastAPI has entered, one of `kind`."""
    if type(stack) is not AsyncExitStack:
        kind = type(kind.__name__, (kind, type(stack)), {})
    stack.__class__ = kind
    vars(stack)[_UNITS] = units
