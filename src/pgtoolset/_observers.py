"""The observers of an engine; whatever one of them does, the caller that reports an event goes on.

An engine keeps its observers in the attributes of its dialect: pools come and go, and the engines
that `execution_options()` makes have the same one. So nothing here outlives the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, Protocol
from weakref import ref

from sqlalchemy import Dialect

from pgtoolset.events import Event, Observer

logger = logging.getLogger("pgtoolset")

#: In the attributes of a dialect: its `Observers`.
_KEY = "pgtoolset.observers"

#: In the `record_info` of a connection of a pool: its open transaction, while that is observed.
OPEN = "pgtoolset.observed"


class OpenTransaction(Protocol):
    """An open transaction that is observed."""

    def lose(self) -> None:
        """Note that its connection is gone."""
        ...


class _Call:
    """A call of an observer that has not returned.

    A task that the observer starts has a copy of the context, and may go on after the call.

    Attributes:
        subscription: whose observer it is; `None` after the call.
        outer: the call in which it is one.
    """

    __slots__ = ("outer", "subscription")

    def __init__(self, subscription: Subscription, outer: _Call | None) -> None:
        self.subscription: Subscription | None = subscription
        self.outer = outer


#: The innermost call of an observer in which the code runs.
_call_here: ContextVar[_Call | None] = ContextVar("pgtoolset_observer", default=None)


class Subscription:
    """One call of `subscribe`.

    Attributes:
        observer: the observer; `None` after the end of the subscription.
    """

    __slots__ = ("__weakref__", "observer")

    def __init__(self, observer: Observer) -> None:
        self.observer: Observer | None = observer

    def tell(self, event: Event) -> None:
        """Call the observer with an event, unless the subscription has ended. Never raises.

        What an observer does on its own engine is an event again, and it is not told of that: each
        call would make another one.
        """
        outer = _call_here.get()
        if self.observer is None or self._is_called(outer):
            return
        call = _Call(self, outer)
        _call_here.set(call)
        try:
            _call(self.observer, event)
        finally:
            call.subscription = None
            _call_here.set(outer)

    def _is_called(self, call: _Call | None) -> bool:
        while call is not None:
            if call.subscription is self:
                return True
            call = call.outer
        return False


class Observers(list[Subscription]):
    """The observers of an engine: a list, so that it costs next to nothing to see it is empty."""

    __slots__ = ("__weakref__",)

    def add(self, observer: Observer) -> Callable[[], bool]:
        """Add an observer; return a function that removes it again.

        That returns whether the observer was the last one. It keeps neither the engine alive, nor
        the observer after it was called.
        """
        subscription = Subscription(observer)
        self.append(subscription)
        observers, added = ref(self), ref(subscription)

        def remove() -> bool:
            found, subscription = observers(), added()
            if found is None or subscription is None or subscription.observer is None:
                return False
            subscription.observer = None
            found.remove(subscription)
            return not found

        return remove

    def tell(self, event: Event) -> None:
        """Call each observer with an event. Never raises."""
        tell_each(tuple(self), event)


def tell_each(subscriptions: tuple[Subscription, ...], event: Event) -> None:
    """Call the observers of some subscriptions with an event. Never raises."""
    for subscription in subscriptions:
        subscription.tell(event)


def tell_soon(subscriptions: tuple[Subscription, ...], event: Event) -> None:
    """Do the same in a step of its own of the event loop; without a loop, do nothing.

    For the garbage collector, which may run in the middle of an observer.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    loop.call_soon(tell_each, subscriptions, event, context=Context())


def observers_of(dialect: Any) -> Observers:
    """Return the observers of an engine, by its dialect."""
    found: Observers | None = vars(dialect).get(_KEY)
    if found is None:
        found = Observers()
        vars(dialect)[_KEY] = found
    return found


def tell(dialect: Dialect, event: Event) -> None:
    """Tell the observers of an engine of an event. Never raises."""
    observers: Observers | None = vars(dialect).get(_KEY)
    if observers:
        observers.tell(event)


def forget_transaction(record_info: dict[Any, Any] | None) -> None:
    """Leave the open transaction of a connection out: it is one of the library's own questions."""
    if record_info is not None:
        record_info.pop(OPEN, None)


def _call(observer: Observer, event: Event) -> None:
    try:
        observer(event)
    except (KeyboardInterrupt, SystemExit) as error:
        # The program is to end, and the transaction still has to be whole.
        _raise_soon(error)
    except BaseException:
        logger.exception(
            "the observer %s has failed on a %s; the transaction goes on",
            getattr(observer, "__qualname__", type(observer).__qualname__),
            type(event).__name__,
        )


def _raise_soon(error: BaseException) -> None:
    """Raise in the event loop, which ends with it, and not in who tells of an event."""

    def raise_it() -> None:
        raise error

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise error from None
    loop.call_soon(raise_it, context=Context())
