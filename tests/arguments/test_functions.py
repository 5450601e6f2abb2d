"""`_arguments.functions`: which functions of the caller are async, and which would never run."""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset import (
    create_db_context,
    on_commit,
    run_transaction,
    wait_for_row_change,
)
from pgtoolset._arguments import (
    check_function,
    check_not_awaitable,
    check_plain_function,
    check_session_maker,
    close_unawaited,
    is_async,
    is_generator,
)
from pgtoolset.observe import subscribe
from pgtoolset.testing import create_test_client
from tests.support import Item

engine = create_async_engine("postgresql+asyncpg://127.0.0.1:9/database")
session_maker = async_sessionmaker(engine)


def plain(*given: object) -> None: ...


async def later(*given: object) -> None: ...


def generator(*given: object) -> Iterator[None]:
    yield


async def async_generator(*given: object) -> AsyncIterator[None]:
    yield


@types.coroutine
def old_coroutine(*given: object) -> Iterator[None]:
    yield


class Methods:
    """One method of each kind."""

    def plain(self, *given: object) -> None: ...

    async def later(self, *given: object) -> None: ...

    def generator(self, *given: object) -> Iterator[None]:
        yield

    @classmethod
    async def later_of_class(cls, *given: object) -> None: ...

    @staticmethod
    async def later_of_none(*given: object) -> None: ...


class Plain:
    """An object that is called."""

    def __call__(self, *given: object) -> None: ...


class Later:
    """An object whose call is async; a call of the class makes one."""

    async def __call__(self, *given: object) -> None: ...


class InheritsLater(Later):
    """The same by inheritance."""


class Generates:
    """An object whose call gives a generator."""

    def __call__(self, *given: object) -> Iterator[None]:
        yield


class GeneratesLater:
    """An object whose call gives an async generator."""

    async def __call__(self, *given: object) -> AsyncIterator[None]:
        yield


class Wrapper(Plain):
    """A plain object around an async function, under the name that a partial has for it."""

    func = staticmethod(later)


class WithAttribute(Plain):
    """Python looks for `__call__` in the class, so this attribute is never called."""

    def __init__(self) -> None:
        self.__dict__["__call__"] = later


class MakesLater(type):
    """A class of classes whose call is async."""

    async def __call__(cls, *given: object) -> None: ...


class MadeLater(metaclass=MakesLater):
    """A class that is called asynchronously."""


@wraps(later)
def wraps_later(*given: object) -> None: ...


def marked(*given: object) -> Any:
    return later()


if sys.version_info >= (3, 12):
    inspect.markcoroutinefunction(marked)
else:
    marked._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]

methods = Methods()

PLAIN: list[Any] = [
    *(plain, print, len, lambda: None, partial(plain, 1), partial(partial(plain), 1)),
    *(methods.plain, Methods.plain, Plain(), partial(Plain(), 1), Wrapper(), WithAttribute()),
    *(wraps_later, Plain, Later, partial(Later), str, asynccontextmanager(async_generator)),
    *(Mock(), MagicMock(), Mock(spec=plain), old_coroutine),
]
ASYNC: list[Any] = [
    *(later, partial(later, 1), partial(partial(later), 1), marked, partial(marked, 1)),
    *(methods.later, Methods.later, methods.later_of_class, methods.later_of_none),
    *(partial(methods.later), Later(), InheritsLater(), partial(Later(), 1), Later().__call__),
    *(MadeLater, AsyncMock(), AsyncMock(spec=later), partial(AsyncMock(), 1), Mock(spec=later)),
]
GENERATORS: list[Any] = [
    *(generator, async_generator, partial(generator, 1), partial(async_generator)),
    *(methods.generator, partial(methods.generator), Generates(), GeneratesLater()),
    partial(Generates(), 1),
]
NO_FUNCTIONS: list[Any] = [None, 5, "print", [print], object()]


@pytest.mark.parametrize("function", PLAIN)
def test_plain(function: Any) -> None:
    """A plain function is neither async nor a generator, whatever it stands around."""
    assert not is_async(function)
    assert not is_generator(function)
    check_plain_function("name", "a function", function)


@pytest.mark.parametrize("function", ASYNC)
async def test_async(function: Any) -> None:
    """A function whose call gives a coroutine is async, and the coroutine is there."""
    assert is_async(function)
    assert not is_generator(function)
    given = function(methods) if function is Methods.later else function()
    await given
    check_function("name", "a function", function)
    with pytest.raises(TypeError, match=r"^name must be a plain function, and .* is async$"):
        check_plain_function("name", "a plain function", function)


@pytest.mark.parametrize("function", GENERATORS)
def test_generators(function: Any) -> None:
    """A call of a generator function runs nothing, so it is refused as a function of any kind."""
    assert is_generator(function)
    assert not is_async(function)
    for check in (check_function, check_plain_function):
        with pytest.raises(TypeError, match=r"^name must be a function, and .* is a generator"):
            check("name", "a function", function)


@pytest.mark.parametrize("value", NO_FUNCTIONS)
def test_no_functions(value: Any) -> None:
    """What cannot be called is neither, and is refused."""
    assert not is_async(value)
    assert not is_generator(value)
    for check in (check_function, check_plain_function):
        with pytest.raises(TypeError, match=r"^name must be a function, not "):
            check("name", "a function", value)


def test_results() -> None:
    """An awaitable that a plain function returned is refused, and a coroutine is closed."""
    coroutine = later()
    with pytest.raises(TypeError, match=r"^until must be plain, and it returned an awaitable$"):
        check_not_awaitable("until", "plain", coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        coroutine.send(None)
    check_not_awaitable("until", "plain", 5)
    close_unawaited(5)


def test_factories() -> None:
    """A factory of sessions is refused where it is async, and not where what it makes is."""
    for function in ASYNC:
        with pytest.raises(TypeError, match=r"^session_maker must return a session, not a corout"):
            check_session_maker(function)
    for function in (Later, plain, partial(plain), Wrapper()):
        check_session_maker(function)


async def retry_on(function: Any) -> None:
    await run_transaction(session_maker, later, retry_on=function)


async def until(function: Any) -> None:
    async with session_maker() as session:
        await wait_for_row_change(session, Item, 1, until=function)


async def observer(function: Any) -> None:
    subscribe(engine, function)


async def settings(function: Any) -> None:
    create_db_context(session_maker, settings=function)


async def on_retry(function: Any) -> None:
    await run_transaction(session_maker, later, on_retry=function)


async def work(function: Any) -> None:
    await run_transaction(session_maker, function)


async def callback(function: Any) -> None:
    async with session_maker() as session, session.begin():
        on_commit(session, function)


async def app(function: Any) -> None:
    async with create_test_client(function):
        pass


@pytest.mark.parametrize(
    "function", [later, partial(later), Later(), partial(Later()), AsyncMock()]
)
@pytest.mark.parametrize("argument", [retry_on, until, observer, settings])
async def test_async_arguments(argument: Callable[..., Any], function: Any) -> None:
    """Where only a plain function is called, an async one is refused before any SQL."""
    with pytest.raises(TypeError, match=f"^{argument.__name__} must be a plain func.* is async$"):
        await argument(function)


@pytest.mark.parametrize("function", [generator, async_generator, Generates(), GeneratesLater()])
@pytest.mark.parametrize(
    "argument", [retry_on, until, observer, settings, on_retry, work, callback, app]
)
async def test_generator_arguments(argument: Callable[..., Any], function: Any) -> None:
    """A generator is refused before any SQL, where it would do nothing or count as true."""
    with pytest.raises(TypeError, match=f"^{argument.__name__} must be an? .* is a generator"):
        await argument(function)


async def test_retry_on_that_returns_a_coroutine() -> None:
    """The answer of a plain function around an async one is refused, and leaves no warning."""

    async def fails(session: AsyncSession) -> None:
        raise LookupError

    def retry_on(error: Exception) -> Any:
        return later()

    with pytest.raises(TypeError, match="retry_on must return True or False") as caught:
        await run_transaction(session_maker, fails, retry_on=retry_on)
    assert isinstance(caught.value.__cause__, LookupError)
