"""Functions of the caller: which of them are async, and which would never run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from pgtoolset._arguments.shown import shown

if sys.version_info >= (3, 12):
    from inspect import iscoroutinefunction
else:
    from asyncio import iscoroutinefunction  # knows what is marked as one, as inspect does later

_WORK = "an async function of one session"


def is_async(value: object) -> bool:
    """Return whether a call of the value gives a coroutine.

    So does an async function, a partial of one, an object whose class has an async `__call__`, and
    what is marked as such a function, like an `AsyncMock`.
    """
    return _runs(value, iscoroutinefunction)


def is_generator(value: object) -> bool:
    """Return whether a call of the value gives a generator, and so runs nothing of its body."""
    return _runs(value, _is_generator)


def check_function(name: str, what: str, value: object) -> None:
    """Raise `TypeError` for a value that cannot be called, or whose call would run nothing.

    Args:
        name: the argument.
        what: the description of such a value: `"a function without parameters"`.
        value: what the caller gave.
    """
    if not callable(value):
        raise TypeError(f"{name} must be {what}, not {shown(value)}")
    if is_generator(value):
        raise TypeError(
            f"{name} must be {what}, and {shown(value)} is a generator: its body would never run"
        )


def check_plain_function(name: str, what: str, value: object) -> None:
    """Raise `TypeError` as `check_function` does, and for a function that is async."""
    check_function(name, what, value)
    if is_async(value):
        raise TypeError(f"{name} must be {what}, and {shown(value)} is async")


def check_predicate(name: str, value: object) -> None:
    """Raise `TypeError` for a value that is neither `None` nor a plain function of a row."""
    if value is not None:
        check_plain_function(name, "a plain function of the row", value)


def check_observer(name: str, value: object) -> None:
    """Raise `TypeError` for a value that is no plain function of an event, and for a class."""
    check_plain_function(name, "a plain function of one event", value)
    if isinstance(value, type):
        raise TypeError(f"{name} must be a plain function of one event, not {shown(value)}")


def check_work(work: object) -> None:
    """Raise `TypeError` for a value that cannot be an async function of one session."""
    check_function("work", _WORK, work)


def check_begun(work: object, result: object) -> None:
    """Raise `TypeError` where what `work` has returned for a session cannot be awaited."""
    if not inspect.isawaitable(result):
        raise TypeError(f"work must be {_WORK}; {shown(work)} returned {shown(result)}")


def check_not_awaitable(name: str, what: str, result: object) -> None:
    """Raise `TypeError` where the result of a plain function of the caller has to be awaited."""
    if inspect.isawaitable(result):
        close_unawaited(result)
        raise TypeError(f"{name} must be {what}, and it returned an awaitable")


def close_unawaited(result: object) -> None:
    """Close a coroutine that is refused; Python would warn that it was never awaited."""
    if isinstance(result, Coroutine):
        result.close()


def _runs(value: Any, is_kind: Callable[[Any], bool]) -> bool:
    """Return whether a function of a kind runs when the value is called."""
    while isinstance(value, partial):
        value = value.func
    if not callable(value):
        return False
    try:
        return is_kind(value) or is_kind(type(value).__call__)  # a class's: that of its metaclass
    except TypeError:
        return False  # a mock whose spec is a function: its code is a mock, too


def _is_generator(function: Any) -> bool:
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    is_awaitable = flags & inspect.CO_ITERABLE_COROUTINE  # of types.coroutine
    is_plain = inspect.isgeneratorfunction(function) and not is_awaitable
    return is_plain or inspect.isasyncgenfunction(function)
